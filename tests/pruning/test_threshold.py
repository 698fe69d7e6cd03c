"""The exact k-th score over many tensors, against a stable sort of the joined vector."""

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pruneflow.pruning import threshold
from pruneflow.pruning.threshold import (
    Elementwise,
    Threshold,
    find_cost_threshold,
    find_threshold,
    keep_masks,
    local_keep_masks,
)

N = 1_000_000


def functions(tensors: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
    return [lambda tensor=tensor: tensor for tensor in tensors]


def join(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.double().reshape(-1) for tensor in tensors])


def oracle(tensors: Sequence[Tensor], k: int) -> Tensor:
    keep = torch.ones(sum(tensor.numel() for tensor in tensors), dtype=torch.bool)
    keep[join(tensors).argsort(stable=True)[:k]] = False
    return keep


def check(tensors: Sequence[Tensor], k: int) -> Threshold:
    scores = functions(tensors)
    found = find_threshold(scores, k)
    masks = list(keep_masks(scores, found))
    assert [mask.shape for mask in masks] == [tensor.shape for tensor in tensors]
    assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks]), oracle(tensors, k))
    joined = join(tensors)
    assert int((joined < found.value).sum()) == k - found.ties
    assert int((joined == found.value).sum()) >= found.ties
    return found


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and sample so finely that a handful of entries takes every path."""
    monkeypatch.setattr(threshold, "_CPU_CHUNK", 4)
    monkeypatch.setattr(threshold, "_COLUMNS", 2)
    monkeypatch.setattr(threshold, "_STRIDE", 2)


@pytest.fixture
def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Brackets of the counting passes."""
    brackets: list[tuple[float, float]] = []
    count = threshold._count

    def counted(scores: Any, lo: float, hi: float, gather: Any) -> tuple[int, int, Tensor]:
        brackets.append((lo, hi))
        return count(scores, lo, hi, gather)

    monkeypatch.setattr(threshold, "_count", counted)
    return brackets


# Few values, among them the nasty ones, so that ties and mixed dtypes meet all the time.
NASTY = (
    -math.inf,
    -2.0,
    -0.1,
    -0.0,
    0.0,
    1e-300,
    1e-40,
    0.1,
    1 + 2**-30,
    1.0,
    7e4,
    1e300,
    math.inf,
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    """Up to five tensors of 0 to 3 dimensions, of any dtype and any order of dimensions."""
    made = []
    for shape in draw(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5)):
        values = draw(
            st.lists(
                st.sampled_from(NASTY) | st.floats(-1, 1),
                min_size=math.prod(shape),
                max_size=math.prod(shape),
            )
        )
        tensor = torch.tensor(values, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))
        made.append(tensor.reshape(shape).permute(draw(st.permutations(range(len(shape))))))
    return made


@given(tensors(), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_agrees_with_a_stable_sort(made: list[Tensor], share: float) -> None:
    check(made, round(share * sum(tensor.numel() for tensor in made)))


def test_agrees_with_a_stable_sort_in_small_pieces(small_pieces: None) -> None:
    test_agrees_with_a_stable_sort()


def in_lockstep(parts: Sequence[Sequence[Tensor]], k: int) -> list[list[Tensor]]:
    """The masks of each process's parts, with threads for processes."""
    barrier = threading.Barrier(len(parts))
    sent = list[Tensor]([torch.empty(0)] * len(parts))

    def run(rank: int) -> list[Tensor]:
        def gather(tensor: Tensor) -> Tensor:
            sent[rank] = tensor
            barrier.wait()
            joined = torch.cat(sent)
            barrier.wait()
            return joined

        scores = functions(parts[rank])
        found = find_threshold(scores, k, gather)
        return list(local_keep_masks(scores, found, gather, rank))

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


@given(tensors(), st.floats(0, 1), st.data())
@settings(deadline=None)
def test_parts_in_several_processes_agree_with_a_stable_sort(
    made: list[Tensor], share: float, data: st.DataObject
) -> None:
    made = [tensor.reshape(1) if tensor.dim() == 0 else tensor for tensor in made]
    parts = []
    for tensor in made:
        ends = st.lists(st.integers(0, len(tensor)), min_size=2, max_size=2).map(sorted)
        parts.append(tensor.tensor_split(data.draw(ends)))  # among them empty ones
    k = round(share * sum(tensor.numel() for tensor in made))
    masks = in_lockstep(list(zip(*parts, strict=True)), k)
    whole = [torch.cat(shares).reshape(-1) for shares in zip(*masks, strict=True)]
    assert torch.equal(torch.cat(whole), oracle(made, k))


def test_parts_in_several_processes_and_small_pieces(small_pieces: None) -> None:
    test_parts_in_several_processes_agree_with_a_stable_sort()


def test_four_weights() -> None:
    scores = functions([torch.tensor([3.0, 1.0]), torch.tensor([[2.0], [4.0]])])
    found = find_threshold(scores, 2)
    assert found == Threshold(value=3.0, ties=0)
    assert [mask.tolist() for mask in keep_masks(scores, found)] == [
        [True, False],
        [[False], [True]],
    ]


@pytest.mark.parametrize("k", range(7))
def test_ties_go_in_tensor_order_then_flat_index(k: int) -> None:
    made = [torch.ones(2), torch.ones(2, 2).T]
    check(made, k)
    masks = keep_masks(functions(made), find_threshold(functions(made), k))
    assert torch.cat([mask.reshape(-1) for mask in masks]).tolist() == [False] * k + [True] * (
        6 - k
    )


def test_ties_do_not_depend_on_memory_layout(small_pieces: None) -> None:
    rows = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).reshape(2, 3, 2, 2) % 2
    last = rows.contiguous(memory_format=torch.channels_last)
    for k in range(rows.numel() + 1):
        found = check([last], k)
        (mask,) = keep_masks(functions([last]), found)
        assert torch.equal(mask, next(keep_masks(functions([rows]), found)))
        assert mask.is_contiguous(memory_format=torch.channels_last)


def test_marked_entries_go_first_and_infinite_ones_last() -> None:
    made = [torch.tensor([1.0, -math.inf, math.inf]), torch.tensor([-math.inf, -5.0])]
    assert check(made, 2) == Threshold(-5.0, 0)
    assert check(made, 4) == Threshold(math.inf, 0)
    assert check(made, 5) == Threshold(math.inf, 1)


def test_dtypes_are_compared_exactly() -> None:
    near = 0.1  # float32 holds 0.100000001490116..., float16 0.09997558...
    made = [torch.tensor([near], dtype=dtype) for dtype in DTYPES]
    for k in range(5):
        check(made, k)
    assert check(made, 1).value == 0.1  # float64's, which float32 does not hold
    assert check([torch.tensor([7e4], dtype=torch.float64), torch.tensor([65504.0]).half()], 1)


def adversaries() -> dict[str, Tensor]:
    index = torch.arange(N)
    random = torch.Generator().manual_seed(1)
    normal = torch.randn(N, generator=random)
    return {
        "normal": normal,
        "all equal": torch.full((N,), 0.5),
        "two values": (index % 2).float(),
        "half zeros": normal.relu(),
        "all -inf but a few": torch.where(index % 100_000 == 7, normal, -math.inf),
        "ascending": index.float(),
        "descending": -index.float(),
        "period of the sample": (index % threshold._STRIDE).float(),
        "small numbers of one value": normal.mul(4).round(),
        "needles": torch.where(index % 9973 == 0, normal * 1e30, normal * 1e-30),
        "bfloat16": normal.bfloat16(),
        "float16": normal.half(),
        "float64": normal.double() + 1e-12,
    }


@pytest.mark.parametrize("name", adversaries())
def test_adversaries(name: str, count_passes: list[tuple[float, float]]) -> None:
    scores = adversaries()[name]
    parts = [scores[:10], scores[10 : N // 2].reshape(2, -1), scores[N // 2 :]]
    for k in (1, N // 3, N // 2, N - 1, N):
        count_passes.clear()
        check(parts, k)
        assert len(count_passes) <= 3


@pytest.mark.parametrize("sample", [[-1e9] * 50, [1e9] * 50, [-1e9, 1e9] * 25, [], [0.0] * 2000])
def test_a_sample_that_misleads_costs_passes_but_no_exactness(
    sample: list[float],
    monkeypatch: pytest.MonkeyPatch,
    count_passes: list[tuple[float, float]],
) -> None:
    monkeypatch.setattr(
        threshold, "_sample", lambda score, *_: (torch.tensor(sample), score().numel())
    )
    scores = torch.randn(5000, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    for k in (1, 1700, 2500, 4999, 5000):
        count_passes.clear()
        check([scores], k)
        assert len(count_passes) <= 6


def test_elementwise_scores_are_the_same(small_pieces: None) -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    kept = weight > -0.5
    last = weight.contiguous(memory_format=torch.channels_last)
    numel = weight.numel()

    def score(weight: Tensor, kept: Tensor, power: float) -> Tensor:
        assert weight.numel() < numel  # never the whole
        return torch.where(kept, weight.abs() ** power, -math.inf)

    whole = torch.where(kept, weight.abs() ** 2.0, -math.inf)
    pieces = [Elementwise(score, last, kept, power=2.0)]
    for k in range(weight.numel() + 1):
        found = check([whole], k)
        assert find_threshold(pieces, k) == found
        assert torch.equal(next(keep_masks(pieces, found)), oracle([whole], k).view_as(weight))


def test_parameters_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0, 3.0]))
    for score in (lambda: weight, lambda: weight.abs(), Elementwise(torch.abs, weight)):
        (mask,) = keep_masks([score], find_threshold([score], 1))
        assert mask.tolist() == [True, False, True]
        assert not mask.requires_grad
    assert weight.tolist() == [2.0, -1.0, 3.0]


@pytest.mark.parametrize("k", [-1, 4])
def test_refuses_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"`k` must be from 0 to 3.* got {k};"):
        find_threshold(functions([torch.ones(2), torch.ones(1)]), k)


@pytest.mark.parametrize("k", [1, 500, N])
@pytest.mark.parametrize("lucky", [7, 999_999])
def test_refuses_nan(k: int, lucky: int) -> None:
    scores = torch.arange(N, dtype=torch.float32)
    scores[lucky] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        find_threshold(functions([scores]), k)


def test_nothing_to_prune() -> None:
    assert find_threshold([], 0) == Threshold(-math.inf, 0)
    assert check([torch.empty(0), torch.tensor(1.0)], 0) == Threshold(-math.inf, 0)
    assert check([torch.empty(0, 3), torch.tensor(1.0)], 1) == Threshold(math.inf, 0)


def test_random_state_is_not_used_up() -> None:
    before = torch.get_rng_state()
    check([torch.arange(10_000.0)], 5000)
    assert torch.equal(torch.get_rng_state(), before)


def test_thread_count_is_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        scores = functions([torch.tensor([1.0, math.nan])])
        with pytest.raises(ValueError, match="NaN"):
            find_threshold(scores, 1)
        assert torch.get_num_threads() == 3
        for _ in keep_masks(scores, Threshold(1.0, 0)):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations made and that are still alive; keeps the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        for tensor in filter(is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self.live.keys():  # no view, nothing in place
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def peak_bytes(scores: Sequence[Callable[[], Tensor]], k: int) -> int:
    with LiveBytes() as live:
        found = find_threshold(scores, k)
        for mask in keep_masks(scores, found):
            del mask
    return live.peak


def test_live_bytes_sees_what_lives() -> None:
    with LiveBytes() as live:
        one = torch.zeros(1000)
        two = one + 1
        assert live.peak == 8000
        del two
        three = one.view(10, 100) + 1
        del one
        assert live.peak == 8000
        torch.cat([three, three, three])
    assert live.peak == 16_000


@pytest.mark.parametrize("values", ["normal", "all equal", "half zeros"])
def test_memory_is_bounded_by_one_tensor(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "_CPU_CHUNK", 2**14)
    weights = list(adversaries()[values].abs().chunk(10))
    largest = weights[0].nbytes
    collected = 4 * 3 * math.sqrt(threshold._STRIDE * N)  # 4 bytes; a bracket of six deviations
    scores = [lambda weight=weight: weight + 1 for weight in weights]
    pieces = [Elementwise(torch.abs, weight) for weight in weights]
    for k in (N // 4, N // 2):
        # One tensor's scores, the mask (a quarter), what is collected (held twice while joined).
        assert peak_bytes(scores, k) < 1.3 * largest + 2.5 * collected
        assert peak_bytes(pieces, k) < 0.5 * largest + 2.5 * collected


def cheapest_prefix(
    tensors: list[torch.Tensor], costs: list[float], target: float
) -> list[torch.Tensor]:
    """Prune entries in the order (score, tensor, index) until they cost enough."""
    entries = sorted(
        (float(value), i, j)
        for i, tensor in enumerate(tensors)
        for j, value in enumerate(tensor.tolist())
    )
    masks, spent = [torch.ones_like(tensor, dtype=torch.bool) for tensor in tensors], 0.0
    for _, i, j in entries:
        if spent >= target:
            break
        masks[i][j], spent = False, spent + costs[i]
    return masks


@given(
    seed=st.integers(0, 2**16),
    levels=st.sampled_from([1, 3, 20, 10**6]),
    costs=st.lists(st.sampled_from([0.5, 1.0, 2.0, 7.0, 100.0]), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
@settings(max_examples=60)
def test_a_cost_is_reached_by_the_fewest_of_the_lowest_scores(
    seed: int, levels: int, costs: list[float], share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randint(levels, (int(n),), generator=generator).float()
        for n in torch.randint(1, 1500, (len(costs),), generator=generator)
    ]
    if seed % 3 == 0:
        tensors[0][::2] = -math.inf
    target = share * sum(cost * len(tensor) for cost, tensor in zip(costs, tensors, strict=True))
    found = find_cost_threshold(functions(tensors), costs, target)
    masks = list(keep_masks(functions(tensors), found))
    for mask, expected in zip(masks, cheapest_prefix(tensors, costs, target), strict=True):
        assert torch.equal(mask, expected)


def test_a_cost_of_scores_that_are_no_numbers_is_refused() -> None:
    with pytest.raises(threshold.NaNScoresError, match="NaN"):
        find_cost_threshold(functions([torch.tensor([1.0, math.nan])]), [1.0], 1.5)
