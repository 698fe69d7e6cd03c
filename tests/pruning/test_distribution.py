"""Which sparsity each tensor gets."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruneflow import (
    NM,
    Channels,
    PerLayer,
    Pruner,
    PruningCallback,
    compute_masks,
    erk,
    magnitude,
    uniform_plus,
)
from pruneflow.pruning.distribution import groups_of

SHAPES = {
    "conv1": torch.Size([8, 3, 3, 3]),
    "conv2": torch.Size([64, 8, 3, 3]),
    "conv3": torch.Size([64, 64, 1, 1]),
    "fc": torch.Size([10, 64]),
}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3), st.just(3)),
    ),
    min_size=1,
    max_size=6,
).map(lambda found: {f"layer{i}": torch.Size(shape) for i, shape in enumerate(found)})


def counts(distribution, of, sparsity):
    return {n: round(s * math.prod(of[n])) for [n], s in groups_of(distribution, of, sparsity)}


@given(of=shapes, sparsity=st.floats(0, 0.999))
def test_erk_is_its_definition_and_its_total_exact(of, sparsity):
    found = counts(erk, of, sparsity)
    sizes = {name: math.prod(shape) for name, shape in of.items()}
    assert sum(found.values()) == round(sparsity * sum(sizes.values()))
    raw = {name: sum(of[name]) / sizes[name] for name in of}
    kept = {name: sizes[name] - found[name] for name in of}
    # One factor for all that is not dense: density = factor x raw, to one weight.
    part = [name for name in of if found[name]]
    for one in part:
        for other in part:
            low, high = (
                (kept[one] - 1) / raw[one] / sizes[one],
                (kept[one] + 1) / raw[one] / sizes[one],
            )
            assert low <= (kept[other] + 1) / raw[other] / sizes[other]
            assert high >= (kept[other] - 1) / raw[other] / sizes[other]
    # What is dense would be denser than dense by that factor.
    for name in set(of) - set(part):
        for other in part:
            factor = (kept[other] + 1) / raw[other] / sizes[other]
            assert factor * raw[name] * sizes[name] >= sizes[name] - 1


def test_erk_by_hand():
    # raw densities 0.2 and 0.1333: with 200 of 400 weights kept, 20 e + 40 e = 200.
    of = {"a": torch.Size([10, 10]), "b": torch.Size([30, 10])}
    assert counts(erk, of, 0.5) == {"a": 100 - 67, "b": 300 - 133}


@given(sparsity=st.floats(0, 0.9))
def test_uniform_plus_leaves_the_first_convolution_dense_and_a_fifth_of_the_last_layer(sparsity):
    found = counts(uniform_plus, SHAPES, sparsity)
    assert sum(found.values()) == round(sparsity * sum(SIZES.values()))
    assert found["conv1"] == 0
    assert found["fc"] <= round(0.8 * SIZES["fc"])
    middle = [found[name] / SIZES[name] for name in ("conv2", "conv3")]
    assert abs(middle[0] - middle[1]) < 1 / 1000
    if middle[0] <= 0.8:
        assert abs(found["fc"] / SIZES["fc"] - middle[0]) < 1 / 100


def test_uniform_plus_says_how_much_can_go():
    with pytest.raises(
        ValueError, match=r"`sparsity` must be at most .* keeps conv1 dense .* got 0\.99"
    ):
        groups_of("uniform_plus", SHAPES, 0.99)


@given(part=st.floats(0, 1))
def test_per_layer_goes_in_step_and_its_total_is_exact(part):
    scope = PerLayer({"conv1": 0.2, "conv[23]": 0.9, "fc": 0.5})
    ideal = {"conv1": 0.2, "conv2": 0.9, "conv3": 0.9, "fc": 0.5}
    total = sum(ideal[name] * SIZES[name] for name in SIZES) / sum(SIZES.values())
    found = counts(scope, SHAPES, part * total)
    assert sum(found.values()) == round(part * total * sum(SIZES.values()))
    for name, count in found.items():
        assert abs(count - part * ideal[name] * SIZES[name]) <= 1


@pytest.mark.parametrize(
    "scope", [erk, uniform_plus, PerLayer({"*": 0.8})], ids=["erk", "uniform_plus", "PerLayer"]
)
def test_rounds_only_add_although_counts_have_to_be_whole(scope):
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    masks = None
    for step in range(1, 80):
        new = compute_masks(weights, step / 100, importance=magnitude, scope=scope, masks=masks)
        assert new.pruned == round(step / 100 * new.weights)
        assert masks is None or not any((new[name] & ~masks[name]).any() for name in new)
        masks = new


def test_a_layer_that_is_ahead_of_its_count_stays_so_and_another_makes_up_for_it():
    # Largest remainders give the first tensor 1 of 45 and 0 of 46.
    weights = {"a": torch.rand(2, 5) + 1, "b": torch.rand(2, 8) + 1, "c": torch.rand(8, 8) + 1}
    of = {name: weight.shape for name, weight in weights.items()}
    assert counts(erk, of, 45 / 90) == {"a": 1, "b": 2, "c": 42}
    assert counts(erk, of, 46 / 90) == {"a": 0, "b": 3, "c": 43}
    before = compute_masks(weights, 45 / 90, importance=magnitude, scope=erk)
    after = compute_masks(weights, 46 / 90, importance=magnitude, scope=erk, masks=before)
    assert after.pruned == 46
    assert not any((after[name] & ~before[name]).any() for name in after)


def test_a_function_of_ones_own():
    def last_only(shapes, sparsity):
        *others, last = shapes
        wanted = sparsity * sum(math.prod(shape) for shape in shapes.values())
        return [(others, 0.0), ([last], wanted / math.prod(shapes[last]))]

    weights = {"a": torch.arange(1.0, 5), "b": torch.arange(1.0, 13)}
    masks = compute_masks(weights, 0.5, importance=magnitude, scope=last_only)
    assert (masks["a"].all(), int((~masks["b"]).sum())) == (True, 8)


# -- bad input -------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, inputs):
        return self.head(self.body(inputs).relu())


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ("ekr", "`scope` must be 'global', 'layer', 'uniform_plus', 'erk', .* got 'ekr'"),
        (erk.__class__, "`scope` must be .* got <class 'function'>"),
        (PerLayer({"boddy*": 0.5, "head*": 0.5}), "no match for group 'boddy*'"),
        (PerLayer({"*": 0.5, "head*": 0.5}), "'head.weight' in 2 groups"),
        (PerLayer({"head*": 0.5}), "'body.weight' in 0 groups"),
        (
            lambda shapes, s: [(["body.weight"], s)],
            "must put each of body.weight, head.weight in one group",
        ),
        (
            lambda shapes, s: [([n], 0.9) for n in shapes],
            "must distribute the sparsity 0.0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_scope_that_does_not_fit_is_refused_before_anything_is_pruned(scope, message):
    with pytest.raises(ValueError, match=message.replace("*", ".*").replace("(", r"\(")):
        Pruner(Two(), scope=scope, optimizers=[])


@pytest.mark.parametrize("sparsities", [{}, {"*": 1.0}, {"*": "half"}, [0.5]])
def test_per_layer_refuses_what_is_no_sparsity(sparsities):
    with pytest.raises(ValueError, match="`sparsities`"):
        PerLayer(sparsities)


@pytest.mark.parametrize("scope", [erk, "erk", "uniform_plus", PerLayer({"*": 0.5})])
def test_costs_are_refused_where_weights_are_shared_out(scope):
    with pytest.raises(ValueError, match="`costs` must be None with scope"):
        Pruner(Two(), scope=scope, costs={"body.weight": 1.0, "head.weight": 2.0}, optimizers=[])


def test_what_does_not_go_with_a_distribution_is_refused():
    pruner = Pruner(Two(), scope="erk", granularity=Channels(torch.zeros(1, 4)), optimizers=[])
    with pytest.raises(ValueError, match="`scope` must be 'global' or 'layer' for channels"):
        pruner.prune_to(0.5)
    pruner = Pruner(Two(), scope="erk", granularity=NM(2, 4), optimizers=[])
    with pytest.raises(ValueError, match=r"`sparsity` must be at most 0\.5 with NM"):
        pruner.prune_to(0.5)


def test_a_schedule_that_contradicts_the_sparsities_of_layers_is_refused_before_training(
    trainer, batches, model
):
    scope = PerLayer({"body.*": 0.5, "head.*": 0.5})
    with pytest.raises(
        ValueError, match=r"`schedule` must end at .* PerLayer, 0\.5, got 0\.9; set its target"
    ):
        trainer(PruningCallback([0.3, 0.9], scope=scope)).fit(model, batches)
    with pytest.raises(
        ValueError, match=r"`schedule` must end at .* PerLayer, 0\.5, got 0\.4; set its target"
    ):
        trainer(PruningCallback([0.3, 0.4], scope=scope)).fit(model, batches)
    trainer(PruningCallback([0.3, 0.5], scope=scope)).fit(model, batches)
    assert int((model.head.weight == 0).sum()) == 50
