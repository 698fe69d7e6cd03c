import copy

import pytest
import torch
import torchvision
from lightning.fabric import Fabric
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from unusual import Conv1D

from pruneflow import Channels, Pruner
from pruneflow.structure import layer_types
from pruneflow.structure.parameters import check_storage, locate, select, unwrap


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.up = nn.ConvTranspose1d(2, 2, 2)
        self.norm = nn.BatchNorm2d(4)
        self.embedding = nn.Embedding(5, 4)
        self.lstm = nn.LSTM(4, 4)
        self.cell = nn.GRUCell(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.mixed = nn.Bilinear(2, 2, 2)
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(4, 5)


def names(*args, **kwargs):
    return list(select(*args, **kwargs).slots)


def test_defaults():
    assert names(Everything()) == [
        "conv.weight",
        "up.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "cell.weight_ih",
        "cell.weight_hh",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "mixed.weight",
        "head.weight",
    ]


def test_locate_names_every_parameter_as_pytorch_does():
    model = Everything()
    assert sorted(locate(model)) == sorted(name for name, _ in model.named_parameters())
    assert all(slot.parameter is model.get_parameter(name) for name, slot in locate(model).items())


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        (["head.*"], ["head.weight"]),  # a wide glob takes what is prunable by default, no bias
        (["head.bias"], ["head.bias"]),
        (["norm.*"], ["norm.weight", "norm.bias"]),
        (
            ["*.bias"],
            [
                "conv.bias",
                "up.bias",
                "norm.bias",
                "attention.out_proj.bias",
                "mixed.bias",
                "head.bias",
            ],
        ),
        (
            ["[cehmnu]*.weight"],
            [
                "conv.weight",
                "up.weight",
                "norm.weight",
                "embedding.weight",
                "mixed.weight",
                "head.weight",
            ],
        ),
        (["attention.*"], ["attention.in_proj_weight", "attention.out_proj.weight"]),
        ([nn.Embedding], ["embedding.weight"]),
        ([nn.BatchNorm2d], ["norm.weight"]),
        ([nn.LSTM], ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]),
        ([nn.Conv2d, "h*"], ["conv.weight", "head.weight"]),
        (["scale"], ["scale"]),
    ],
)
def test_include(include, expected):
    assert names(Everything(), include) == expected


def test_exclude_wins_and_takes_types():
    model = Everything()
    kept = names(model, ["conv.*", "head.*"], exclude=["head.weight"])
    assert kept == ["conv.weight"]
    assert "lstm.weight_ih_l0" not in names(model, exclude=(nn.LSTM,))


def test_all_patterns_that_match_nothing_are_named_with_near_names():
    with pytest.raises(ValueError, match="near names") as error:
        select(Everything(), include=["haed.weight"], exclude=["atention.*", nn.Conv3d])
    message = str(error.value)
    assert "'haed.weight'" in message
    assert "head.weight" in message
    assert "attention.*" in message
    assert "Conv3d" in message


def test_nothing_left_is_refused():
    with pytest.raises(ValueError, match="at least one tensor"):
        select(nn.Linear(2, 2), exclude=["weight"])


def test_tied_weights_count_once_and_answer_to_every_name():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert names(model) == ["a.weight"]
    assert names(model, ["b.weight"]) == ["a.weight"]
    with pytest.raises(ValueError, match="at least one tensor"):
        select(model, exclude=["b.weight"])


def test_a_weight_tied_to_an_embedding_is_not_prunable_by_default():
    model = nn.ModuleDict({"out": nn.Linear(3, 5), "embedding": nn.Embedding(5, 3)})
    model["out"].weight = model["embedding"].weight
    with pytest.raises(ValueError, match="at least one tensor"):
        select(model)
    assert names(model, ["out.weight"]) == ["out.weight"]


class Experts(nn.Module):
    """Those of a mixture, in one tensor."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 8))
        self.down = nn.ParameterList([torch.randn(8, 4)])


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(layer_types, "_TYPES", dict(layer_types._TYPES))


def test_weights_of_unknown_layers_are_named_with_their_share():
    model = nn.Sequential(Conv1D(4, 8), nn.Linear(8, 2), Experts())
    selection = select(model)
    assert list(selection.slots) == ["1.weight"]
    assert list(selection.dense) == ["0.weight", "2.up", "2.down.0"]
    assert selection.describe_dense() == (
        "Trained tensors that stay dense (share of all parameters): "
        "0.weight (17.2%), 2.up (51.6%), 2.down.0 (17.2%)"
    )
    with pytest.warns(UserWarning, match=r"86\.0% of all .*0\.weight \(17\.2%\).*register_layer"):
        selection.warn_overlooked()


def test_repeated_blocks_are_named_once():
    model = nn.Sequential(*(Conv1D(2, 2) for _ in range(12)), nn.Linear(2, 2))
    assert "parameters): *.weight (12, " in select(model).describe_dense()


@pytest.mark.parametrize(
    "patterns",
    [
        {"include": [nn.Linear]},
        {"exclude": [Conv1D, Experts, nn.ParameterList]},
        {"exclude": ["0.*", "2.*"]},
    ],
)
def test_what_is_left_dense_on_purpose_is_no_surprise(patterns):
    model = nn.Sequential(Conv1D(4, 8), nn.Linear(8, 2), Experts())
    selection = select(model, **patterns)
    assert list(selection.slots) == ["1.weight"]
    assert list(selection.dense) == ["0.weight", "2.up", "2.down.0"]
    selection.warn_overlooked()  # warnings are errors here


def test_a_type_picks_weights_alone_and_a_default_hides_nothing():
    model = nn.Sequential(Conv1D(4, 8), nn.Linear(8, 2))
    assert names(model, [nn.Linear, Conv1D]) == ["0.weight", "1.weight"]
    assert names(model, ["*.weight"]) == ["0.weight", "1.weight"]
    assert names(model, ["*"]) == ["0.weight", "1.weight"]


def test_a_registered_layer_is_prunable_by_default(registered):
    layer_types.register_layer(Conv1D, input_dim=0)
    layer_types.register_layer(Experts, ("up", "d*"))
    model = nn.Sequential(Conv1D(4, 8), nn.Linear(8, 2), Experts())
    assert names(model) == ["0.weight", "1.weight", "2.up"]
    assert layer_types.input_dim(model[0], "weight") == 0
    assert layer_types.input_dim(type("Sub", (Conv1D,), {})(2, 2), "weight") == 0
    assert layer_types.input_dim(model[0], "bias") is None
    with pytest.raises(TypeError, match="`layer` must be a module type, got"):
        layer_types.register_layer(model[0])


def test_tensors_without_values_are_refused_by_name():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"meta device.*: 0\.weight, 1\.weight; call"):
        Pruner(model, optimizers=[])


def test_what_names_no_weights_is_not_registered():
    with pytest.raises(TypeError, match=r"`weights` must be the name .*, got 5"):
        layer_types.register_layer(nn.Linear, 5)


def test_more_of_torch_is_known():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 4, proj_size=2)
            self.waves = nn.Linear(3, 3, dtype=torch.complex64)
            self.deformable = torchvision.ops.DeformConv2d(2, 2, 3)

    assert names(Net()) == [
        *(f"lstm.weight_{kind}_l0" for kind in ("ih", "hh", "hr")),
        "waves.weight",
        "deformable.weight",
    ]


def test_lazy_parameters_are_refused_by_name():
    with pytest.raises(ValueError, match="got uninitialized lazy layers: 0; run the model once"):
        select(nn.Sequential(nn.LazyLinear(3)))


def views_of_one():
    whole = torch.randn(4, 6)
    return {"even": nn.Parameter(whole[:, ::2]), "odd": nn.Parameter(whole[:, 1::2])}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (lambda w: {"a": w, "b": nn.Parameter(w.data.t())}, "a and b"),
        (lambda w: {"a": w, "b": nn.Parameter(w.data[1:])}, "a and b"),
        (lambda w: {"a": nn.Parameter(w.data[:1].expand(3, 4))}, r"a \(its own entries"),
        (lambda w: views_of_one(), None),
        (lambda w: dict(nn.LSTM(4, 4).named_parameters()), None),
        (lambda w: {"a": w, "b": nn.Parameter(w.data.clone())}, None),
    ],
)
def test_tensors_that_share_memory_are_refused(tensors, named):
    tensors = {n: t.detach() for n, t in tensors(nn.Parameter(torch.randn(3, 4))).items()}
    if named is None:
        check_storage(tensors, {})
    else:
        with pytest.raises(ValueError, match=f"do not share memory, got {named}"):
            check_storage(tensors, {})


def test_frozen_are_left_out_and_listed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    selection = select(model)
    assert list(selection.slots) == ["1.weight"]
    assert list(selection.frozen) == ["0.weight"]


def test_a_buffer_that_is_named_like_a_mask_is_none():
    model = nn.Linear(4, 4)
    model.register_buffer("weight_mask", torch.ones(4, 4))
    assert names(model) == ["weight"]
    assert select(model).slots["weight"].weight.data_ptr() == model.weight.data_ptr()


def test_names_do_not_show_compilation_or_torch_prune():
    model = nn.Sequential(nn.Linear(2, 2))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    slot = locate(torch.compile(model))["0.weight"]
    assert slot.parameter is model[0].weight_orig
    assert int((slot.weight == 0).sum()) == 2


class Named(nn.Module):
    """Its layers have the names that wrappers give to what they wrap."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self._forward_module = nn.Linear(4, 4)
        self.not_orig_mod = nn.Linear(4, 4)

    def forward(self, x):
        return self.not_orig_mod(self._forward_module(self.module(x)))


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def within(wrap):
    """Wrap the layers of a model, not the model."""

    def wrapping(model):
        model.module[1] = wrap(model.module[1])
        model.module = wrap(model.module)
        return model

    return wrapping


class Task(nn.Module):
    """A wrapper of somebody's own, which says where the model is."""

    wraps = "network"

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


@pytest.mark.parametrize(
    "wrap",
    [
        Task,
        lambda model: AveragedModel(Task(torch.compile(model))),
        within(Task),
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        torch.compile,
        checkpoint_wrapper,
        offload_wrapper,
        AveragedModel,
        lambda model: Fabric(accelerator="cpu").setup(model),
        lambda model: Fabric(accelerator="cpu").setup(torch.compile(model)),
        lambda model: nn.DataParallel(torch.compile(checkpoint_wrapper(model))),
        within(nn.DataParallel),
        within(torch.compile),
        within(checkpoint_wrapper),
        within(lambda layer: AveragedModel(checkpoint_wrapper(layer))),
    ],
)
def test_names_are_those_of_the_plain_model_in_any_wrapper(one_process, wrap):
    plain, model = Named(), wrap(Named())
    assert list(locate(model)) == list(locate(plain))
    assert names(model, ["module.*"], ["module.1.*"]) == ["module.0.weight"]
    pruner, other = Pruner(plain, optimizers=[]), Pruner(model, optimizers=[])
    masks = pruner.prune_to(0.5)
    other.hold(masks)
    for name, slot in locate(model).items():
        assert name not in masks or torch.equal(slot.parameter != 0, masks[name])
    pruner.hold(other.prune_to(0.75))
    assert pruner.masks.sparsity == 0.75
    pruner.apply_to(model)


@pytest.mark.parametrize("wraps", [None, "nowhere", "forward", 3, ["network"]])
def test_what_names_no_module_is_no_wrapper(monkeypatch, wraps):
    monkeypatch.setattr(Task, "wraps", wraps)
    task = Task(nn.Linear(2, 2))
    assert list(locate(task)) == ["network.weight", "network.bias"]
    assert unwrap(task) is task


@pytest.mark.parametrize(
    "wrap", [Task, nn.DataParallel, checkpoint_wrapper, within(checkpoint_wrapper)]
)
def test_channels_go_by_the_names_of_the_plain_model_too(wrap):
    torch.manual_seed(0)
    plain = Named()
    model = wrap(copy.deepcopy(plain))
    channels = Channels(torch.zeros(1, 4))
    masks = [
        Pruner(network, granularity=channels, optimizers=[]).prune_to(0.5)
        for network in (plain, model)
    ]
    assert list(masks[0]) == list(masks[1])
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
