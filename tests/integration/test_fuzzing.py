"""Any small network, dtype, layout, schedule and scope: exact counts, or an error that says why."""

import re

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from pruneflow import (
    Compounding,
    Cubic,
    Explicit,
    InPlace,
    Linear,
    OneShot,
    Pruner,
    PruningCallback,
    Random,
    Reparametrize,
    magnitude,
)
from pruneflow.pruning.importance import Context
from pruneflow.pruning.schedules import sparsity_per_round
from pruneflow.structure.parameters import select

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIMIZERS = (
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-4, weight_decay=0.1),  # 1e-8 is 0 in float16
    lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, weight_decay=0.1, amsgrad=True),
)


class Scale(nn.Module):
    """A parameter of any shape, also of none."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, inputs):
        return self.weight * inputs


class Tied(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return self.second(self.first(inputs))


class Fed(nn.Module):
    """A layer with inputs of its own; calling it gives a loss."""

    def __init__(self, layer, *shapes):
        super().__init__()
        self.layer, self.shapes = layer, shapes

    def forward(self):
        dtype = next(self.parameters()).dtype
        outputs = self.layer(*(torch.randn(shape, dtype=dtype) for shape in self.shapes))
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return outputs.double().square().sum()


class Branches(nn.ModuleList):
    def forward(self):
        return sum(branch() for branch in self)


# What makes a layer of sizes a and b, both at least 1, and the shapes of its inputs.
LAYERS = (
    lambda a, b: Fed(nn.Conv1d(a, b, 2), (2, a, 4)),
    lambda a, b: Fed(nn.Conv2d(2 * a, 2 * b, (1, 3), groups=2), (2, 2 * a, 3, 3)),
    lambda a, b: Fed(nn.Conv3d(1, a, 2), (1, 1, 3, 3, 3)),
    lambda a, b: Fed(nn.ConvTranspose2d(a, b, 2), (1, a, 3, 3)),
    lambda a, b: Fed(nn.Bilinear(a, b, 2), (2, a), (2, b)),
    lambda a, b: Fed(nn.LSTM(a, b, num_layers=2, bidirectional=True), (3, 2, a)),
    lambda a, b: Fed(nn.GRUCell(a, b), (2, a)),
    lambda a, b: Fed(nn.BatchNorm2d(a), (2, a, 3, 3)),
    lambda a, b: Fed(nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.Linear(b, 1)), (2, a)),
    lambda a, b: Fed(nn.TransformerEncoderLayer(2 * a, 2, b, dropout=0.0), (3, 1, 2 * a)),
    lambda a, b: Fed(Tied(a), (2, a)),
)
shapes = st.lists(st.integers(0, 4), max_size=4)
sizes = st.integers(1, 5)
layers = (
    st.builds(lambda make, a, b: make(a, b), st.sampled_from(LAYERS), sizes, sizes)
    | st.builds(lambda a, b: Fed(nn.Linear(a, b), (2, a)), st.integers(0, 5), st.integers(0, 5))
    | shapes.map(lambda shape: Fed(Scale(*shape), shape))
)


def lay_out(tensor, layout):
    """A copy with the same values, laid out otherwise in memory."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.clone(memory_format=torch.channels_last)
    if layout == "with gaps":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor.clone()


@st.composite
def leaves(draw):
    """A layer of any dtype and layout, often with equal weights, zeros and negative zeros."""
    leaf = draw(layers).to(draw(st.sampled_from(DTYPES)))
    steps = draw(st.sampled_from([None, 8, 2, 0.01]))  # a hundredth: all are (negative) zeros
    layout = draw(st.sampled_from(["contiguous", "transposed", "channels_last", "with gaps"]))
    for parameter in leaf.parameters():
        values = parameter.detach()
        values = values if steps is None else (values * steps).round() / steps
        parameter.data = lay_out(values, layout)
    return leaf


networks = st.recursive(
    leaves(), lambda inner: st.lists(inner, min_size=1, max_size=3).map(Branches)
)
networks = st.tuples(st.integers(0, 5), networks).map(
    lambda drawn: Branches([Fed(nn.Linear(drawn[0], 2), (2, drawn[0])), drawn[1]])
)
fractions = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.5, 0.9, 0.999])
paths = st.lists(fractions, min_size=1, max_size=4).map(sorted)
rounds = st.integers(1, 4)
schedules = (
    paths
    | st.builds(Explicit, paths.filter(lambda path: path[-1] > 0), fractions)
    | st.builds(Explicit.from_amounts, st.lists(st.floats(0, 0.9), min_size=1, max_size=4))
    | st.builds(OneShot, fractions)
    | st.builds(Compounding, fractions, rounds=rounds)
    | st.builds(Linear, fractions, rounds)
    | st.builds(Cubic, fractions, rounds)
)


def whole(name, tensor, context):
    """Magnitude that does not say it is elementwise."""
    return tensor.abs()


def naive(scores, masks, sparsity, groups):
    """The masks by one stable sort: pruned weights first, then the lowest, then the earliest."""
    new = {}
    for group in groups:
        parts = [scores[name].double().numpy().ravel() for name in group]
        kept = [masks[name].numpy().ravel() for name in group]
        first = np.where(np.concatenate(kept), np.concatenate(parts), -1)
        order = np.argsort(first, kind="stable")
        keep = np.ones(len(order), dtype=bool)
        keep[order[: round(sparsity * len(order))]] = False
        ends = np.cumsum([len(part) for part in parts])[:-1]
        for name, part in zip(group, np.split(keep, ends), strict=True):
            new[name] = torch.from_numpy(part).reshape(scores[name].shape)
    return new


def refused_by_reparametrize(model):
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if "first.weight" in name or "out_proj" in name]


def state_of(model, names):
    state = model.state_dict()
    return {name: state[name].clone() for name in names}


def check_zeros(model, masks):
    for name, weight in state_of(model, masks).items():
        pruned = weight[~masks[name]]
        assert not pruned.any()
        assert not pruned.signbit().any()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:.*neither pruned nor counted")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), seed=st.integers(0, 9))
def test_prunes_exactly_what_a_stable_sort_says_and_holds_it(data, seed):
    torch.manual_seed(seed)
    model = data.draw(networks)
    masking = data.draw(st.sampled_from([InPlace, Reparametrize]))
    include = data.draw(st.sampled_from([None, [name for name, _ in model.named_parameters()]]))
    exclude = refused_by_reparametrize(model) if masking is Reparametrize else []
    names = list(select(model, include, exclude).slots)
    cut = data.draw(st.integers(1, len(names)))
    parts = {f"part {part[0]}": part for part in (names[:cut], names[cut:]) if part}
    scopes = {"global": [names], "layer": [[name] for name in names], "parts": parts.values()}
    scope = data.draw(st.sampled_from(sorted(scopes)))
    importance = data.draw(st.sampled_from([magnitude, whole, Random(3)]))
    optimizer = data.draw(st.sampled_from(OPTIMIZERS))(model.parameters())
    pruner = Pruner(
        model,
        importance=importance,
        scope=parts if scope == "parts" else scope,
        include=include,
        exclude=exclude,
        optimizers=[optimizer],
        masking=masking(),
        optimizer_state=data.draw(st.sampled_from(["keep", "zero_pruned", "reset"])),
    )
    plain = [list(model.state_dict()), list(map(id, model.parameters()))]
    held = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in names}
    for number, sparsity in enumerate(sparsity_per_round(data.draw(schedules)), start=1):
        for _ in range(data.draw(st.integers(0, 2))):
            optimizer.zero_grad()
            model().backward()
            nn.utils.clip_grad_value_(model.parameters(), 1.0)
            optimizer.step()
            check_zeros(model, held)
        before = state_of(model, names)
        masks = pruner.prune_to(sparsity, round=number)
        scores = {name: importance(name, before[name], Context(number)) for name in names}
        expected = naive(scores, held, sparsity, scopes[scope])
        after = state_of(model, names)
        assert list(masks) == list(pruner.masks) == names
        for name, mask in masks.items():
            assert torch.equal(mask, expected[name])
            assert torch.equal(pruner.masks[name], mask)
            assert not (mask & ~held[name]).any()
            assert torch.equal(after[name][mask], before[name][mask])
        check_zeros(model, masks)
        held = masks
    pruner.remove()
    check_zeros(model, held)
    assert [list(model.state_dict()), list(map(id, model.parameters()))] == plain


@settings(deadline=None)
@given(schedule=schedules)
@example(Explicit([0.01, 0.01], target=0.35))
def test_schedules_never_fall_and_end_at_their_target(schedule):
    sparsities = sparsity_per_round(schedule)
    assert list(sparsities) == sorted(sparsities)
    assert sparsities[-1] == (schedule[-1] if isinstance(schedule, list) else schedule.target)


def test_an_amount_that_would_need_endless_rounds_is_refused():
    with pytest.raises(ValueError, match=r"`amount` must be above 0 .* got 5e-324"):
        Compounding(target=0.5, amount=5e-324)


class Counts(L.Callback):
    """Exact zeros after each step, and the epoch and step it was."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = pl_module.state_dict()
        zeros = sum(int((state[f"{layer}.weight"] == 0).sum()) for layer in ("body", "head"))
        position = {"epoch": trainer.current_epoch, "step": trainer.global_step - 1}
        self.seen.append((position, zeros))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    schedule=schedules,
    start=st.integers(0, 3),
    every=st.integers(1, 3),
    unit=st.sampled_from(["epoch", "step"]),
    length=st.integers(1, 6),
    masking=st.sampled_from([InPlace, Reparametrize]),
)
def test_a_trainer_follows_any_plan_that_fits(
    model, batches, trainer, schedule, start, every, unit, length, masking
):
    torch.manual_seed(0)
    model = type(model)()
    clock = {f"start_{unit}": start, f"{unit}s_per_round": every}
    pruning = PruningCallback(schedule, masking=masking(), **clock)
    counts = Counts()
    fit = trainer(pruning, counts, **{"max_epochs": -1, f"max_{unit}s": length})
    sparsities = (0.0, *sparsity_per_round(schedule))
    if start + (len(sparsities) - 2) * every >= length:
        with pytest.raises(ValueError, match=rf"`max_{unit}s`={length}.*raise `max_{unit}s` to"):
            fit.fit(model, batches)
        return
    fit.fit(model, batches)
    for position, zeros in counts.seen:
        due = 0 if position[unit] < start else (position[unit] - start) // every + 1
        assert zeros == round(sparsities[min(due, len(sparsities) - 1)] * 1100)
    assert len(counts.seen) == (length if unit == "step" else 4 * length)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


@pytest.mark.filterwarnings("ignore:`optimizers` was not given to Pruner")
@settings(deadline=None)
@given(
    argument=st.sampled_from(["sparsity", "scope", "importance", "optimizers", "masking"]),
    value=anything,
)
@example("sparsity", "0.5")
@example("scope", ["layer"])
@example("scope", None)
@example("include", "*.weight")
@example("include", ["*.weight", nn.Linear(1, 1)])
@example("exclude", "1.*")
@example("importance", "magnitude")
@example("importance", Random)
@example("importance", lambda name, tensor, context: (9 * tensor.abs()).int())
@example("importance", lambda name, tensor, context: tensor > 0)
@example("importance", lambda name, tensor, context: tensor.abs().tolist())
@example("optimizers", torch.optim.SGD(nn.Linear(2, 2).parameters()))
@example("masking", Reparametrize)
@example("optimizer_state", "zero")
def test_an_argument_of_any_kind_is_good_or_refused_by_name(argument, value):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    arguments = {"sparsity": 0.5, "optimizers": [], argument: value}
    sparsity = arguments.pop("sparsity")
    try:
        pruner = Pruner(model, **arguments)
        masks = [pruner.prune_to(sparsity) for _ in range(2)]
    except (ValueError, TypeError) as error:
        assert re.search(rf"`{argument}`.* must .*got .*; ", str(error), re.DOTALL)  # noqa: PT017
    else:
        assert [held.pruned for held in masks] == [round(sparsity * 18)] * 2
