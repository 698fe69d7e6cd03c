"""Masks of torch's own methods, compared with torch's own functions."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pruneflow import Context, MaskSet, Pruner
from pruneflow.pruning.torch_methods import TorchPruning


class EveryOther(prune.BasePruningMethod):
    """Prune every other entry."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t, default_mask):
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


def masks_of(method, tensor, target, before=None):
    return TorchPruning(method, "layer").masks({"t": tensor}, before or {}, target, Context(1))


def conv():
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, 3)


def pruned(layer, **kwargs):
    return Pruner(layer, optimizers=[], scope="layer", **kwargs)


@pytest.mark.parametrize("amount", [0.4, 0.5, 0.75])
def test_l1_class_equals_l1_unstructured(amount):
    ours, theirs = conv(), conv()
    masks = pruned(ours, importance=prune.L1Unstructured).prune_to(amount)
    prune.l1_unstructured(theirs, "weight", amount)
    assert torch.equal(masks["weight"], theirs.weight_mask.bool())
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("n", [1, 2, float("inf")])
def test_ln_structured_class_equals_ln_structured(n, dim):
    ours, theirs = conv(), conv()
    method = partial(prune.LnStructured, n=n, dim=dim)
    masks = pruned(ours, importance=method).prune_to(0.34)
    prune.ln_structured(theirs, "weight", amount=0.34, n=n, dim=dim)
    assert torch.equal(masks["weight"], theirs.weight_mask.bool())


def test_structured_class_over_rounds_counts_channels_from_the_dense_number():
    pruner = pruned(conv(), importance=partial(prune.LnStructured, n=2, dim=0))
    for target, channels in ((0.25, 2), (0.5, 4), (0.625, 5)):
        mask = pruner.prune_to(target)["weight"]
        empty = ~mask.any(dim=(1, 2, 3))
        assert int(empty.sum()) == channels
        assert torch.equal(~mask, empty[:, None, None, None].expand_as(mask))


@pytest.mark.parametrize("amount", [0.3, 20])
@pytest.mark.parametrize("cls", [prune.L1Unstructured, prune.RandomUnstructured])
def test_instance_over_rounds_equals_repeated_calls(cls, amount):
    ours, theirs = conv(), conv()
    function = {
        prune.L1Unstructured: prune.l1_unstructured,
        prune.RandomUnstructured: prune.random_unstructured,
    }[cls]
    pruner = pruned(ours, importance=cls(amount))
    torch.manual_seed(1)
    for _ in range(3):
        masks = pruner.prune()
    torch.manual_seed(1)
    for _ in range(3):
        function(theirs, "weight", amount)
    assert torch.equal(masks["weight"], theirs.weight_mask.bool())


def test_random_structured_instance_equals_random_structured():
    ours, theirs = conv(), conv()
    torch.manual_seed(2)
    masks = pruned(ours, importance=prune.RandomStructured(2, dim=1)).prune()
    torch.manual_seed(2)
    prune.random_structured(theirs, "weight", amount=2, dim=1)
    assert torch.equal(masks["weight"], theirs.weight_mask.bool())


def test_global_class_equals_global_unstructured():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 3))

    ours, theirs = model(), model()
    pruner = Pruner(ours, importance=prune.L1Unstructured, optimizers=[])
    masks = pruner.prune_to(0.6)
    prune.global_unstructured(
        [(theirs[0], "weight"), (theirs[1], "weight")], prune.L1Unstructured, amount=0.6
    )
    assert torch.equal(masks["0.weight"], theirs[0].weight_mask.bool())
    assert torch.equal(masks["1.weight"], theirs[1].weight_mask.bool())


def test_identity_and_custom_from_mask_and_a_users_own():
    layer = nn.Linear(3, 2)
    assert pruned(layer, importance=prune.Identity()).prune().pruned == 0
    given = torch.tensor([[1, 0, 1], [0, 1, 1]])
    masks = pruned(layer, importance=prune.CustomFromMask(given)).prune()
    assert torch.equal(masks["weight"], given.bool())
    pruner = pruned(nn.Linear(3, 2), importance=EveryOther)
    assert pruner.prune()["weight"].tolist() == [[False, True, False], [True, False, True]]
    # As PruningContainer has it: the second round sees only what the first has left.
    assert pruner.prune()["weight"].tolist() == [[False, False, False], [True, False, False]]


def test_tensors_outside_any_module_equal_torch_prune_method():
    tensor = torch.tensor([0.5, -3.0, 1.0, -0.1])
    expected = prune.L1Unstructured(amount=2).prune(tensor)
    masks = masks_of(prune.L1Unstructured(amount=2), tensor, None)
    assert torch.equal(tensor * masks["t"], expected)


def test_a_partial_with_an_amount_keeps_it():
    method = partial(prune.L1Unstructured, amount=0.25)
    assert pruned(nn.Linear(4, 4), importance=method).prune().pruned == 4


def test_bad_input():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"must not keep its own amount .* call `prune\(\)`"):
        pruned(layer, importance=prune.L1Unstructured(0.5)).prune_to(0.5)
    with pytest.raises(ValueError, match="must keep its own amount"):
        pruned(layer, importance=prune.L1Unstructured).prune()
    with pytest.raises(ValueError, match="`scope` must be 'layer' for LnStructured"):
        Pruner(layer, importance=prune.LnStructured(0.5, n=2), optimizers=[]).prune()
    half = MaskSet({"t": torch.tensor([True, False])})
    with pytest.raises(ValueError, match=r"at least the present one, 0\.5"):
        masks_of(prune.L1Unstructured, torch.ones(2), 0.0, half)
