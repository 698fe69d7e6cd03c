import time
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from pruneflow import NM, compute_masks, latency, magnitude, multiply_adds, sparsity_report
from pruneflow.structure.parameters import locate


def test_multiply_adds_of_a_weight_are_the_places_it_is_used_at():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.Flatten(2),
        nn.Linear(64, 5),
    ).train()
    costs = multiply_adds(model, torch.zeros(3, 2, 8, 8))
    assert costs == {"0.weight": 3 * 16, "2.weight": 3 * 16, "4.weight": 3 * 2}
    assert all(module.training for module in model.modules())
    assert not model[1].running_mean.any()
    total = sparsity_report(model, torch.zeros(3, 2, 8, 8)).multiply_adds
    slots = locate(model)
    assert sum(cost * slots[name].parameter.numel() for name, cost in costs.items()) == total


def test_shared_and_unused_layers_cost_what_they_are_used():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.one(self.one(self.two(x)))

    assert multiply_adds(Shares(), torch.zeros(1, 4)) == {"one.weight": 3.0, "unused.weight": 0.0}


class Layers(nn.Module):
    """Layers, and code that uses them."""

    def __init__(self, code):
        super().__init__()
        self.one, self.two, self.code = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), code
        self.listed = nn.ModuleList([self.one, self.two])
        self.experts = nn.Parameter(torch.ones(3, 4, 5))
        self.old = nn.Parameter(torch.ones(4, 6))

    def forward(self, x):
        return self.code(self, x)


CODE = {
    "listed": (lambda m, x: m.listed[1](m.listed[0](x)), {"one": 2, "two": 2}),
    "twice": (lambda m, x: m.one(m.listed[0](x)), {"one": 4}),
    "function": (lambda m, x: F.linear(x, m.one.weight), {"one": 2}),
    "matrix": (lambda m, x: (x @ m.two.weight.T)[None].expand(3, 2, 4) @ m.experts,
               {"two": 2, "experts": 2}),
    "transposed": (lambda m, x: torch.addmm(m.old[0], x, m.old), {"old": 2}),
    "both": (lambda m, x: x @ (m.one.weight @ m.two.weight), {"one": 2, "two": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", CODE)
def test_a_weight_costs_what_is_multiplied_by_it(name):
    code, expected = CODE[name]
    unused = {"one.weight": 0, "two.weight": 0}
    costs = {n if n in ("experts", "old") else f"{n}.weight": c for n, c in expected.items()}
    model, example = Layers(code), torch.zeros(2, 4)
    assert multiply_adds(model, example) == unused | costs
    wrapped = nn.Sequential(nn.ModuleDict({"x": model}).x)
    assert multiply_adds(wrapped, example) == {f"0.{n}": c for n, c in (unused | costs).items()}
    compiled = torch.compile(model, backend="eager")
    assert multiply_adds(compiled, example) == unused | costs


def test_attention_and_masked_weights_count_as_well():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    prune.l1_unstructured(layer.linear1, "weight", 0.5)
    costs = multiply_adds(layer, torch.zeros(1, 3, 8))
    assert costs == dict.fromkeys(costs, 3.0)
    assert len(costs) == 4
    report = sparsity_report(layer, torch.zeros(1, 3, 8))
    assert report.multiply_adds - report.remaining_multiply_adds == 3 * 8 * 16 // 2


def test_latency_counts_layers_under_two_names_and_tied_ones_once():
    model = Layers(lambda m, x: m.listed[1](m.one(x)))
    model.listed[1].weight = model.one.weight
    costs = latency(model, torch.zeros(2, 4), repeats=3)
    assert list(costs) == ["one.weight"] and costs["one.weight"] > 0


class Slow(nn.Linear):
    """Takes its time."""

    def forward(self, x):
        time.sleep(0.004)
        return super().forward(x)


def test_latency_is_the_time_of_the_layers_shared_out_among_their_weights():
    model = nn.Sequential(Slow(8, 8), nn.Linear(8, 8), Slow(8, 4))
    costs = latency(model, torch.zeros(2, 8), repeats=5)
    seconds = {name: cost * locate(model)[name].parameter.numel() for name, cost in costs.items()}
    assert seconds["0.weight"] > 0.004 < seconds["2.weight"]
    assert seconds["1.weight"] < 0.004
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)


costs_of = st.tuples(*[st.sampled_from([1.0, 0.25, 3.0, 64.0])] * 2)


@given(costs=costs_of, sparsity=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_as_few_weights_go_as_reach_the_fraction_of_the_cost(costs, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "a": torch.randn(30, generator=generator),
        "b": torch.randn(9, 5, generator=generator),
    }
    price = dict(zip(weights, costs, strict=True))
    masks = compute_masks(weights, sparsity, importance=magnitude, costs=price)
    total = sum(Fraction(price[name]) * weights[name].numel() for name in weights)
    gone = [
        (price[n], abs(float(w)) / price[n] ** 0.25)
        for n in weights
        for w, keep in zip(weights[n].flatten(), masks[n].flatten(), strict=True)
        if not keep
    ]
    removed = sum(Fraction(cost) for cost, _ in gone)
    assert float(removed / total) >= sparsity * (1 - 1e-9)
    if gone:  # without the last one to go the target would be missed
        last = max(gone, key=lambda each: each[1])
        assert float((removed - Fraction(last[0])) / total) < sparsity


def test_what_costs_more_goes_first_among_equals_and_rounds_only_add():
    weights = {"cheap": torch.arange(1.0, 9), "dear": torch.arange(1.0, 9)}
    price = {"cheap": 1.0, "dear": 16.0}  # scores of "dear" count half
    masks, settings = None, {"importance": magnitude, "costs": price}
    for target, cheap, dear in ((0.3, 1, 3), (0.5, 2, 5), (0.5, 2, 5), (0.99, 7, 8)):
        new = compute_masks(weights, target, masks=masks, **settings)
        assert (int((~new["cheap"]).sum()), int((~new["dear"]).sum())) == (cheap, dear)
        assert masks is None or not any((new[name] & ~masks[name]).any() for name in new)
        masks = new
    with pytest.raises(ValueError, match=r"the present one, 0\.992647, got 0.5"):
        compute_masks(weights, 0.5, masks=masks, **settings)


def test_n_of_m_by_cost():
    weights = {"a": torch.randn(4, 8), "b": torch.randn(4, 8)}
    price = {"a": 1.0, "b": 5.0}
    some = compute_masks(weights, 0.3, importance=magnitude, costs=price, granularity=NM(2, 4))
    assert 0.3 <= 1 - (some["a"].sum() + 5 * some["b"].sum()) / 192 < 0.3 + 5 / 192
    all_of_it = compute_masks(
        weights, 0.5, importance=magnitude, costs=price, granularity=NM(2, 4), masks=some
    )
    assert all((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() for mask in all_of_it.values())


def test_refuses_costs_that_are_none():
    weights = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    with pytest.raises(ValueError, match="got none for b, c; add them, or `exclude`"):
        compute_masks(weights, 0.5, importance=magnitude, costs={"a": 1.0, "b": 0.0})
