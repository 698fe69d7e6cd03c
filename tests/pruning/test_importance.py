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
