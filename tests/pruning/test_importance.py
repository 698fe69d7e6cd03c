"""Scores, each against a derivation of its own."""

from functools import partial, update_wrapper

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruneflow import (
    Context,
    Pruner,
    compute_masks,
    gradients,
    input_norms,
    lamp,
    magnitude,
    taylor,
    wanda,
)
from pruneflow.pruning.importance import needs_of


def mean_output(model, batch):
    return model(batch).mean()


# -- LAMP ------------------------------------------------------------------------------------------


@given(values=st.lists(st.integers(-5, 5), min_size=1, max_size=12))
def test_lamp_is_its_definition(values):
    weights = torch.tensor(values, dtype=torch.float32)
    expected = []
    for i, weight in enumerate(values):
        # Of equal weights the first one counts as the lowest.
        not_lower = [w for j, w in enumerate(values) if (abs(w), j) >= (abs(weight), i)]
        total = sum(w * w for w in not_lower)
        expected.append(weight * weight / total if weight else 0.0)
    scores = lamp()("weight", weights, Context(1))
    torch.testing.assert_close(scores, torch.tensor(expected), check_dtype=False)


def test_lamp_compares_layers_by_share_and_not_by_scale():
    weights = {"large": torch.tensor([100.0, 200.0, 300.0]), "small": torch.tensor([1.0, 2.0, 3.0])}
    by_lamp = compute_masks(weights, 0.5, importance=lamp())
    assert by_lamp["large"].tolist() == by_lamp["small"].tolist()[:3] or by_lamp.pruned == 3
    assert int((~by_lamp["large"]).sum()) in (1, 2)
    by_magnitude = compute_masks(weights, 0.5, importance=magnitude)
    assert not by_magnitude["small"].any()


def test_lamp_orders_a_layer_as_what_it_is_based_on():
    weights = torch.randn(50, generator=torch.Generator().manual_seed(0))
    slopes = torch.randn(50, generator=torch.Generator().manual_seed(1))
    context = Context(1, {"weight": slopes})
    based = lamp(taylor)("weight", weights, context)
    assert torch.equal(based.argsort(), taylor("weight", weights, context).argsort())
    assert needs_of(lamp(taylor)) is gradients
    assert needs_of(lamp()) is None


@pytest.mark.parametrize("wrong", [None, "magnitude", nn.Linear])
def test_lamp_of_what_is_no_importance(wrong):
    with pytest.raises(
        TypeError, match=r"`importance` must be a function .* try lamp\(magnitude\)"
    ):
        lamp(wrong)
    with pytest.raises(TypeError, match=r"`importance` must be .* try lamp\(\)"):
        Pruner(nn.Linear(2, 2), importance=lamp, optimizers=[])


# -- Wanda -----------------------------------------------------------------------------------------


def reference_wanda(weight, norms, sparsity):
    """The published algorithm: in each row, the lowest |weight| x norm go."""
    metric = weight.abs() * norms
    mask = torch.ones_like(weight, dtype=torch.bool)
    lowest = metric.sort(dim=1, stable=True).indices[:, : int(weight.shape[1] * sparsity)]
    return mask.scatter_(1, lowest, False)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_wanda_prunes_each_row_as_the_published_algorithm_does(scope):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 5))
    batches = [torch.randn(16, 20) * torch.arange(1.0, 21), torch.randn(4, 20)]
    inputs = torch.cat(batches)
    hidden = model[1](model[0](inputs)).detach()
    expected = {
        "0.weight": reference_wanda(model[0].weight.detach(), inputs.norm(dim=0), 0.5),
        "2.weight": reference_wanda(model[2].weight.detach(), hidden.norm(dim=0), 0.5),
    }
    evidence = input_norms(model, batches, mean_output)
    pruner = Pruner(model, importance=wanda, scope=scope, optimizers=[])
    masks = pruner.prune_to(0.5, evidence=evidence)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": 1},
        {"dilation": 2},
        {"groups": 3, "padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
def test_input_norms_of_a_convolution_are_those_of_its_unfolded_patches(settings):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 9, 3, **settings)
    images = torch.randn(5, 6, 8, 8)
    found = input_norms(layer, [images[:2], images[2:]], mean_output)["weight"]
    assert [a in (1, b) for a, b in zip(found.shape, layer.weight.shape, strict=True)] == [True] * 4
    # Each output is a sum of products; with one weight at a time and the others at zero, the
    # squares of the outputs add up to what that weight sees.
    norms = found.expand_as(layer.weight)
    for out, into, row, column in ((0, 0, 0, 0), (1, 1, 0, 2), (5, 0, 2, 1), (8, 1, 1, 2)):
        layer.weight.data.zero_()[out, into, row, column] = 1
        layer.bias.data.zero_()
        seen = layer(images)[:, out].square().sum().sqrt()
        torch.testing.assert_close(norms[out, into, row, column], seen)


def test_wanda_goes_by_what_the_inputs_are_and_not_by_the_weights_alone():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data[:] = torch.tensor([[1.0, 2.0]])
    evidence = input_norms(layer, [torch.tensor([[10.0, 1.0]])], mean_output)
    masks = Pruner(layer, importance=wanda, optimizers=[]).prune_to(0.5, evidence=evidence)
    assert masks["weight"].tolist() == [[True, False]]


def test_every_row_loses_the_same_share_over_rounds():
    torch.manual_seed(0)
    layer = nn.Linear(40, 10, bias=False)
    layer.weight.data[0] *= 100
    pruner = Pruner(layer, importance=wanda, optimizers=[])
    for target in (0.25, 0.5, 0.75):
        evidence = input_norms(layer, [torch.randn(8, 40)], mean_output)
        mask = pruner.prune_to(target, evidence=evidence)["weight"]
        assert (~mask).sum(1).tolist() == [int(40 * target)] * 10


def test_what_was_never_called_is_named_before_anything_changes():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs):
            return self.used(inputs)

    model = Half()
    pruner = Pruner(model, importance=wanda, optimizers=[])
    evidence = input_norms(model, [torch.ones(1, 4)], mean_output)
    before = model.used.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"`evidence` must .* got none for unused\.weight; `exclude`"
    ):
        pruner.prune_to(0.5, evidence=evidence)
    with pytest.raises(
        ValueError, match=r"`evidence` must be given .* needs input_norms, got None"
    ):
        pruner.prune_to(0.5)
    with pytest.raises(ValueError, match=r"`evidence` must have the shapes .* \(1, 3\) for used"):
        pruner.prune_to(0.5, evidence=evidence | {n: torch.ones(1, 3) for n in pruner.names})
    assert torch.equal(model.used.weight, before)
    assert not pruner.masks


# -- what an importance says of itself -------------------------------------------------------------


def wrapped(name, tensor, context):
    return taylor(name, tensor, context)


@pytest.mark.parametrize(
    "importance",
    [partial(taylor), partial(partial(taylor)), update_wrapper(lambda *a: taylor(*a), taylor)],
    ids=["partial", "partial of a partial", "wraps"],
)
def test_a_function_round_an_importance_needs_what_that_needs(importance):
    layer = nn.Linear(4, 2)
    layer(torch.randn(8, 4)).square().sum().backward()
    expected = (layer.weight * layer.weight.grad).abs().flatten().detach()
    mask = Pruner(layer, importance=importance, optimizers=[]).prune_to(0.5)["weight"].flatten()
    assert expected[mask].min() >= expected[~mask].max()


@pytest.mark.parametrize("importance", [wrapped, lambda *a: taylor(*a)], ids=["function", "lambda"])
def test_evidence_that_is_not_asked_for_is_named(importance):
    layer = nn.Linear(4, 2)
    layer(torch.randn(8, 4)).sum().backward()
    with pytest.raises(
        ValueError, match=r"`importance` must declare the evidence .* attribute `needs`"
    ):
        Pruner(layer, importance=importance, optimizers=[]).prune_to(0.5)


def test_needs_of_its_own_may_be_any_function():
    def seen(model, batches, loss):
        return {name: torch.full_like(p, 2.0) for name, p in model.named_parameters()}

    def importance(name, tensor, context):
        return tensor.abs() ** context.evidence[name]

    importance.needs = seen
    layer = nn.Linear(4, 2)
    pruner = Pruner(layer, importance=importance, optimizers=[])
    with pytest.raises(ValueError, match="needs seen, got None"):
        pruner.prune_to(0.5)
    assert pruner.prune_to(0.5, evidence=seen(layer, [], None)).pruned == 4


@pytest.mark.parametrize("unknown", ["hessian", 1, ["gradients"]])
def test_evidence_that_nobody_knows_is_refused_at_once(unknown):
    def importance(name, tensor, context):
        return tensor.abs()

    importance.needs = unknown
    with pytest.raises(
        ValueError, match=r"`needs` of an importance must be an evidence function, got .* try"
    ):
        Pruner(nn.Linear(4, 2), importance=importance, optimizers=[])


def test_evidence_may_be_named():
    def importance(name, tensor, context):
        return tensor.abs() * context.evidence[name]

    importance.needs = "input_norms"
    assert needs_of(importance) is input_norms


def test_the_older_way_to_ask_for_gradients_still_works():
    def importance(name, tensor, context):
        return context.gradients[name].abs()

    importance.needs_gradients = True
    layer = nn.Linear(4, 1, bias=False)
    F.linear(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), layer.weight).sum().backward()
    mask = Pruner(layer, importance=importance, optimizers=[]).prune_to(0.5)["weight"]
    assert mask.tolist() == [[False, False, True, True]]
