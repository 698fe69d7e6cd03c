import builtins
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune

from pruneflow import Given, MaskSet, Random, compute_masks, magnitude
from pruneflow.pruning.distribution import groups_of


def tensors(seed=0, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_four_weights():
    weights = {"w": torch.tensor([0.1, -4.0, 3.0, -0.2])}
    masks = compute_masks(weights, 0.5, importance=magnitude)
    assert masks["w"].tolist() == [False, True, True, False]


@given(
    seed=st.integers(0, 99),
    sparsity=st.floats(0, 0.999),
    scope=st.sampled_from(["global", "layer", {"one": ["a", "b"], "two": ["c"]}]),
)
def test_exact_counts_and_every_kept_score_is_at_least_every_pruned_one(seed, sparsity, scope):
    weights = tensors(seed, a=(7, 3), b=(50,), c=(2, 3, 3, 3))
    masks = compute_masks(weights, sparsity, importance=magnitude, scope=scope)
    shapes = {name: weight.shape for name, weight in weights.items()}
    for group, _ in groups_of(scope, shapes, sparsity):
        scores = torch.cat([weights[name].abs().flatten() for name in group])
        keep = torch.cat([masks[name].flatten() for name in group])
        assert int((~keep).sum()) == round(sparsity * len(keep))
        if 0 < int(keep.sum()) < len(keep):
            assert scores[keep].min() >= scores[~keep].max()


@given(path=st.lists(st.floats(0, 0.99), min_size=2, max_size=5).map(sorted))
def test_masks_only_shrink_even_when_weights_change(path):
    masks = None
    for round, sparsity in enumerate(path, start=1):
        weights = tensors(round, a=(9, 5), b=(30,))
        new = compute_masks(
            weights, sparsity, importance=Random(3), masks=masks, round=round, scope="global"
        )
        assert new.pruned == builtins.round(sparsity * 75)
        if masks is not None:
            assert not any((new[name] & ~masks[name]).any() for name in new)
        masks = new


def test_two_rounds_of_gamma():
    weights = tensors(w=(1000,))
    once = compute_masks(weights, 0.2, importance=magnitude)
    twice = compute_masks(weights, 1 - 0.8**2, importance=magnitude, masks=once)
    assert twice.pruned == 360


def test_pruned_weights_go_first_even_if_a_survivor_is_zero():
    weights = {"w": torch.tensor([0.0, 5.0, 5.0, 0.0])}
    before = MaskSet({"w": torch.tensor([True, True, True, False])})
    masks = compute_masks(weights, 0.25, importance=magnitude, masks=before)
    assert masks["w"].tolist() == [True, True, True, False]


def test_no_score_brings_a_pruned_weight_back():
    scores = Given({"w": torch.tensor([-float("inf"), 1.0, 2.0, 3.0])})
    before = MaskSet({"w": torch.tensor([True, False, True, True])})
    masks = compute_masks({"w": torch.ones(4)}, 0.25, importance=scores, masks=before)
    assert masks["w"].tolist() == [True, False, True, True]


def test_ties_go_in_tensor_order_then_flat_index():
    weights = {"b": torch.ones(3), "a": torch.ones(2, 2)}
    masks = compute_masks(weights, 4 / 7, importance=magnitude)
    assert masks["b"].tolist() == [False, False, False]
    assert masks["a"].tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("amount", [0.37, 0, 11])
def test_layer_scope_equals_l1_unstructured(amount):
    weight = tensors(w=(6, 5))["w"]
    layer = torch.nn.Linear(5, 6)
    layer.weight.data.copy_(weight)
    prune.l1_unstructured(layer, "weight", amount=amount)
    sparsity = amount if isinstance(amount, float) else amount / 30
    masks = compute_masks({"w": weight}, sparsity, importance=magnitude, scope="layer")
    assert torch.equal(masks["w"], layer.weight_mask.bool())


def test_global_scope_equals_global_unstructured_over_rounds():
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 4))
    weights = {
        name: model.get_parameter(name).detach().clone() for name in ("0.weight", "1.weight")
    }
    masks = None
    kept = 720
    for _ in range(3):
        prune.global_unstructured(
            [(model[0], "weight"), (model[1], "weight")], prune.L1Unstructured, amount=0.3
        )
        kept -= round(0.3 * kept)  # torch rounds from the remainder: hence the same count is asked
        masks = compute_masks(weights, 1 - kept / 720, importance=magnitude, masks=masks)
        for name in weights:
            expected = model.get_submodule(name[0]).weight_mask.bool()
            assert torch.equal(masks[name], expected)


def test_given_scores_equal_torch_importance_scores():
    weight, scores = tensors(w=(4, 4))["w"], tensors(1, w=(4, 4))["w"].abs()
    layer = torch.nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", amount=0.5, importance_scores=scores)
    masks = compute_masks({"w": weight}, 0.5, importance=Given({"w": scores}))
    assert torch.equal(masks["w"], layer.weight_mask.bool())


def test_random_scores_depend_on_seed_round_name_alone():
    weights = tensors(a=(40, 5), b=(40, 5))
    masks = compute_masks(weights, 0.5, importance=Random(1))
    torch.manual_seed(123)
    assert all(
        torch.equal(mask, again)
        for mask, again in zip(
            masks.values(),
            compute_masks(weights, 0.5, importance=Random(1)).values(),
            strict=True,
        )
    )
    assert not torch.equal(masks["a"], masks["b"])
    assert not torch.equal(
        masks["a"], compute_masks(weights, 0.5, importance=Random(1), round=2)["a"]
    )
    assert not torch.equal(masks["a"], compute_masks(weights, 0.5, importance=Random(2))["a"])


@given(shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4))
def test_packs_one_bit_a_weight_and_back(shapes):
    generator = torch.Generator().manual_seed(0)
    masks = MaskSet(
        {str(i): torch.rand(shape, generator=generator) < 0.5 for i, shape in enumerate(shapes)}
    )
    state = masks.state()
    assert sum(len(packed["bits"]) for packed in state.values()) <= masks.weights / 8 + len(masks)
    again = MaskSet.from_state(state)
    assert list(again) == list(masks)
    assert all(torch.equal(again[name], masks[name]) for name in masks)


def test_damaged_bits_are_refused():
    state = MaskSet({"w": torch.ones(20, dtype=torch.bool)}).state()
    state["w"]["bits"] = state["w"]["bits"][:-1]
    with pytest.raises(ValueError, match=r"`state` must have 3 bytes for w .*, got 2 bytes"):
        MaskSet.from_state(state)


def test_masks_of_another_model_are_refused():
    masks = MaskSet({"w": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="tensors in this model, got w;"):
        masks.check({"v": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"`masks` must .* got \(2, 3\) for w \(3, 2\)"):
        masks.check({"w": torch.zeros(3, 2)})
    with pytest.raises(TypeError, match=r"`masks` must be bool .* got torch\.float32 for w"):
        MaskSet({"w": torch.ones(3)})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_not_finite_are_refused_by_name(value, dtype):
    weights = {"good": torch.ones(3, dtype=dtype), "bad": torch.ones(3, dtype=dtype)}
    weights["bad"][1] = value
    with pytest.raises(ValueError, match="got NaN or infinity in bad; nothing was changed"):
        compute_masks(weights, 0.5, importance=Random(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sparsity=1.0), r"`sparsity` must be a number in \[0, 1\)"),
        (dict(importance=lambda n, t, c: t[0]), "`importance` must return scores of shape"),
        (
            dict(importance=lambda n, t, c: t * math.nan),
            "must return finite scores, got NaN for 'w'",
        ),
        (
            dict(importance=Given({})),
            "an entry for each tensor to prune, such as w, got entries for none",
        ),
        (dict(importance=Given({"w": torch.ones(2)})), r"the shape \(2, 2\) for w, got \(2,\)"),
        (dict(scope="filter"), "`scope` must be 'global', 'layer'"),
        (dict(scope={"a": ["x*"], "b": ["w"]}), "no match for group 'a'"),
        (dict(scope={"a": ["w"], "b": ["*"]}), "'w' in 2 groups"),
        (
            dict(sparsity=0.25, masks={"w": torch.tensor([[True, False], [False, False]])}),
            "at least the present one, 0.75",
        ),
    ],
)
def test_bad_input(change, message):
    arguments = dict(sparsity=0.5, importance=magnitude) | change
    with pytest.raises(ValueError, match=message):
        compute_masks({"w": torch.ones(2, 2)}, **arguments)
