import pytest
import torch

from pruneflow.data.splits import spread, stratified_split

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[
    torch.randperm(100, generator=torch.Generator().manual_seed(7))
]


@pytest.mark.parametrize("size", [0.1, 0.33, 7, 50, 99])
@pytest.mark.parametrize("seed", [0, 1])
def test_classes_are_held_out_in_proportion(size, seed):
    kept, held_out = stratified_split(LABELS, size, seed)
    count = size if isinstance(size, int) else round(size * 100)
    assert len(held_out) == count
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(100))
    for label, share in enumerate((0.5, 0.3, 0.2)):
        assert abs((LABELS[held_out] == label).sum().item() - share * count) <= 1


def test_the_seed_alone_decides():
    torch.manual_seed(0)
    first = stratified_split(LABELS, 0.2, seed=3)[1]
    torch.manual_seed(1)
    assert torch.equal(first, stratified_split(LABELS, 0.2, seed=3)[1])
    assert not torch.equal(first, stratified_split(LABELS, 0.2, seed=4)[1])


@pytest.mark.parametrize("size", [0, 100, 0.0, 1.0, -0.1, 1.5, 0.001])
def test_holding_out_nothing_or_everything_is_refused(size):
    with pytest.raises(ValueError, match="`val_size` must hold out"):
        stratified_split(LABELS, size, seed=0)


@pytest.mark.parametrize("counts", [[10, 10], [1, 99], [3, 0, 7], [5], [30, 20, 10, 1]])
def test_every_first_part_of_a_spread_order_has_each_class_in_proportion(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = spread(labels)
    assert order.sort().values.tolist() == list(range(len(labels)))
    for first in range(1, len(labels) + 1):
        shares = labels[order[:first]].bincount(minlength=len(counts))
        wanted = torch.tensor(counts) * first / len(labels)
        assert (shares - wanted).abs().max() <= 1
    assert torch.equal(order, spread(labels))
