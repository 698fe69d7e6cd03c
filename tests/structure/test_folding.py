import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn
from torch.nn.utils import prune
from two_layers import TwoLayers

from pruneflow import Linear, PruningCallback, sparsity
from pruneflow.structure.folding import fold, fold_model


class Layers(nn.Module):
    """Layers that differ in the order of their parameters."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True)
        self.cell = nn.GRUCell(3, 3)
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True)
        self.joint = nn.MultiheadAttention(4, 2)
        self.bilinear = nn.Bilinear(3, 3, 2)
        self.own = nn.ParameterDict({"shift": torch.ones(2), "kernel": torch.ones(2)})
        self.register_buffer("padding_mask", torch.ones(3))
        self.register_buffer("weight_orig", torch.ones(3))


@pytest.fixture
def pruned():
    """Layers under `torch.nn.utils.prune`, last parameters first; in `own` the last one alone."""
    torch.manual_seed(0)
    model = Layers()
    for module in model.modules():
        for name in reversed(list(module._parameters)):
            if module._parameters[name] is not None and name != "kernel":
                prune.random_unstructured(module, name, amount=0.5)
    return model


@pytest.fixture
def model_pruning(trainer, batches, tmp_path):
    """Train under Lightning's ModelPruning: the model it ends with, and its checkpoint."""

    def run(permanent):
        pruning = ModelPruning(
            "l1_unstructured",
            parameter_names=["weight"],
            amount=0.5,
            use_lottery_ticket_hypothesis=False,
            make_pruning_permanent=permanent,
        )
        model = TwoLayers()
        saver = ModelCheckpoint(tmp_path)
        trainer(pruning, saver, enable_checkpointing=True, max_epochs=2).fit(model, batches)
        return model, torch.load(saver.best_model_path, weights_only=True)

    return run


@pytest.mark.parametrize("permanent", [True, False])
def test_checkpoints_of_model_pruning_load_strict_and_go_on(
    model_pruning, trainer, batches, permanent
):
    pruned, checkpoint = model_pruning(permanent)
    assert ("body.weight_orig" in checkpoint["state_dict"]) != permanent
    plain = TwoLayers()
    plain.load_state_dict(fold(checkpoint["state_dict"]), strict=True)
    assert sparsity(plain) == 0.75
    points = torch.randn(8, 20)
    assert torch.equal(plain(points), pruned(points))
    zeros = plain.body.weight == 0
    kept = plain.body.weight[~zeros].clone()
    trainer(PruningCallback(None, from_zeros=True), max_epochs=2).fit(plain, batches)
    assert torch.equal(plain.body.weight == 0, zeros)
    assert not torch.equal(plain.body.weight[~zeros], kept)


def test_a_live_model_goes_on_to_a_higher_sparsity(model_pruning, trainer, batches):
    model, _ = model_pruning(False)
    assert prune.is_pruned(model)
    fold_model(model)
    zeros = model.body.weight == 0
    assert sparsity(model) == 0.75
    trainer(PruningCallback(Linear(0.9, 1), from_zeros=True), max_epochs=2).fit(model, batches)
    assert sparsity(model) == 0.9
    assert (model.body.weight[zeros] == 0).all()


def test_a_folded_model_is_as_if_it_had_never_been_pruned_by_torch(pruned):
    folded = fold(pruned.state_dict())
    parameters = {name.replace("_orig", ""): p for name, p in pruned.named_parameters()}
    plain = Layers()
    fold_model(pruned)
    assert [name for name, _ in pruned.named_parameters()] == [
        n for n, _ in plain.named_parameters()
    ]
    assert all(p is parameters[name] for name, p in pruned.named_parameters())
    assert list(pruned.state_dict()) == list(plain.state_dict())
    assert not prune.is_pruned(pruned)
    for name, value in pruned.state_dict().items():
        assert torch.equal(folded[name], value)
    plain.load_state_dict(folded, strict=True)
    hidden, _ = pruned.lstm(torch.ones(2, 1, 4))
    assert torch.equal(hidden, plain.lstm(torch.ones(2, 1, 4))[0])


def test_pruned_weights_are_plus_zero_whatever_they_were():
    layer = nn.Linear(4, 1)
    layer.weight.data[:] = torch.tensor([[-1.0, torch.nan, -torch.inf, -2.0]])
    prune.custom_from_mask(layer, "weight", torch.tensor([[0, 0, 0, 1]]))
    expected = torch.tensor([[0.0, 0.0, 0.0, -2.0]])
    weight = fold(layer.state_dict(keep_vars=True))["weight"]
    assert not weight.requires_grad
    fold_model(layer)
    for found in (weight, layer.weight):
        assert torch.equal(found, expected)
        assert found.signbit().tolist() == [[False, False, False, True]]


def test_half_precision_stays(pruned):
    state = {name: tensor.bfloat16() for name, tensor in pruned.state_dict().items()}
    state["conv.weight_mask"] = state["conv.weight_mask"].float()
    assert {tensor.dtype for tensor in fold(state).values()} == {torch.bfloat16}


def test_what_is_no_pair_is_left_alone():
    tensor = torch.ones(2)
    state = {
        "padding_mask": tensor,
        "weight_orig": tensor,
        "both": tensor,
        "both_orig": tensor,
        "both_mask": tensor,
        "extra": {"not": "a tensor"},
    }
    assert fold(state) == state
    pair = {"kernel_orig": tensor, "kernel_mask": tensor}
    assert set(fold(state | pair | {"kernel_scale": tensor})) == {*state, "kernel", "kernel_scale"}


def test_the_state_dict_that_came_is_not_changed_and_versions_are_kept(pruned):
    state = pruned.state_dict()
    before = list(state)
    folded = fold(state)
    assert list(state) == before
    assert folded._metadata == state._metadata
    assert fold(folded) == folded


def test_refuses_a_whole_checkpoint_and_a_mask_of_another_shape(pruned):
    with pytest.raises(ValueError, match=r"give checkpoint\['state_dict'\]"):
        fold({"epoch": 3, "state_dict": pruned.state_dict()})
    state = pruned.state_dict() | {"conv.weight_mask": torch.ones(3)}
    with pytest.raises(ValueError, match=r"got \(3,\) for 'conv\.weight' of shape \(4, 1, 3, 3\)"):
        fold(state)
