import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pruneflow.models import load_weights, small_cnn, torchvision_model
from pruneflow.run.folder import load_cached, save_cached, save_network
from pruneflow.state_dicts import load_safetensors


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pixels", [8, 9, 28])
def test_small_cnn_takes_any_small_image(channels, pixels):
    network = small_cnn(num_classes=7, in_channels=channels, width=4)
    assert network(torch.zeros(2, channels, pixels, pixels)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("channels", [1, 3])
def test_cifar_stem_keeps_the_resolution(name, channels):
    network = torchvision_model(name, 10, in_channels=channels, stem="cifar")
    assert network.conv1.weight.shape == (64, channels, 3, 3)
    shapes = []
    network.layer1.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    network.layer4.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    assert network.eval()(torch.zeros(2, channels, 32, 32)).shape == (2, 10)
    assert shapes[0] == (2, 64, 32, 32)
    assert shapes[1][2:] == (4, 4)


@pytest.mark.parametrize(
    "name",
    ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "googlenet"],
)
def test_any_torchvision_network_is_built_and_trains_without_warnings(name):
    network = torchvision_model(name, num_classes=5, in_channels=1)
    logits = network(torch.zeros(2, 1, 64, 64))
    assert logits.shape == (2, 5)
    logits.sum().backward()


def test_the_first_convolution_alone_changes_with_the_channels():
    usual, grey = (torchvision_model("resnet18", 10, in_channels=k) for k in (3, 1))
    shapes = [
        {key: value.shape for key, value in network.state_dict().items()}
        for network in (usual, grey)
    ]
    assert shapes[1].pop("conv1.weight") == (64, 1, 7, 7)
    del shapes[0]["conv1.weight"]
    assert shapes[0] == shapes[1]
    assert (grey.conv1.stride, grey.conv1.padding, grey.conv1.bias) == ((2, 2), (3, 3), None)


def test_unknown_name_gets_near_ones():
    with pytest.raises(ValueError, match=r"`name`.*'resnet_18'.*resnet18"):
        torchvision_model("resnet_18", 10)


def test_stems_are_refused_by_name():
    with pytest.raises(ValueError, match=r"`stem` .* got 'cifar' for 'squeezenet1_1'; use"):
        torchvision_model("squeezenet1_1", 10, stem="cifar")
    with pytest.raises(ValueError, match=r"`stem`.*'tiny'"):
        torchvision_model("resnet18", 10, stem="tiny")


@pytest.fixture
def saved(tmp_path):
    network = torchvision_model("resnet18", 10, stem="cifar")
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    return network, tmp_path


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_are_read_from_a_file(saved, suffix):
    network, folder = saved
    again = torchvision_model("resnet18", 10, stem="cifar", weights=folder / f"weights.{suffix}")
    for key, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_another_number_of_classes_starts_the_head_afresh(saved, caplog):
    network, folder = saved
    with caplog.at_level(logging.WARNING):
        other = torchvision_model(
            "resnet18", 7, stem="cifar", weights=folder / "weights.safetensors"
        )
    assert "fc.bias" in caplog.text
    assert other.fc.weight.shape == (7, 512)
    assert torch.equal(network.layer4[1].conv2.weight, other.layer4[1].conv2.weight)


def test_weights_that_do_not_fit_are_refused(saved):
    _, folder = saved
    weights = folder / "weights.pt"
    with pytest.raises(ValueError, match=r"conv1\.weight of shape \(64, 3, 3, 3\), not"):
        torchvision_model("resnet18", 10, weights=weights)
    with pytest.raises(ValueError, match=r"missing: layer1.*; unknown: none"):
        torchvision_model("resnet34", 10, stem="cifar", weights=weights)
    with pytest.raises(ValueError, match=r"`weights`.*IMAGENET1K_V1.*'nowhere.pt'"):
        torchvision_model("resnet18", 10, weights="nowhere.pt")


@pytest.mark.parametrize("prefix", ["", "network.", "net.", "model.module.", "a.b.c."])
def test_load_weights_reads_lightning_checkpoints(saved, prefix):
    network, folder = saved
    state = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "last.ckpt")
    other = torchvision_model("resnet18", 10, stem="cifar")
    load_weights(other, folder / "last.ckpt")
    for key, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    with pytest.raises(ValueError, match=r"fc\.weight of shape \(10, 512\), not \(7, 512\)"):
        load_weights(torchvision_model("resnet18", 7, stem="cifar"), folder / "last.ckpt")
    with pytest.raises(ValueError, match=r"`weights` must be a file, got 'nowhere'"):
        load_weights(other, "nowhere")


FOREIGN = {
    "a LightningModule that has more than the network": {
        "state_dict": {"net.weight": 1, "net.bias": 2, "criterion.weight": 3, "ema_decay": 4}
    },
    "a training script": {"model": {"weight": 1, "bias": 2}, "optimizer": {"state": {0: {"m": 3}}}},
    "DataParallel in one": {"model": {"module.weight": 1, "module.bias": 2}, "epoch": 3},
    "compiled": {"_orig_mod.weight": 1, "_orig_mod.bias": 2},
}


def tensors(node):
    """A nested dict with a tensor in the place of each number, as long as the number says."""
    shapes = {1: (1, 3), 2: (1,)}
    return {
        key: tensors(value) if isinstance(value, dict) else torch.ones(shapes.get(value, (7,)))
        for key, value in node.items()
    }


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_network_is_found_wherever_it_lies(tmp_path, kind):
    torch.save(tensors(FOREIGN[kind]), tmp_path / "last.ckpt")
    network = nn.Linear(3, 1)
    load_weights(network, tmp_path / "last.ckpt")
    assert network.weight.eq(1).all() and network.bias.eq(1).all()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"net.weight": 1, "net.bais": 2},
            r"bias, weight, got net\.bais, net\.weight in .* \(missing: bias; unknown: bais\);",
        ),
        (
            {"student.weight": 1, "student.bias": 2, "teacher.weight": 1, "teacher.bias": 2},
            r"must hold the network once, got copies .* 'student\.', 'teacher\.' in .*; save the",
        ),
        ({}, r"got none in .* \(missing: bias, weight; unknown: none\); check"),
    ],
)
def test_names_that_came_and_that_are_wanted_are_said(tmp_path, state, message):
    torch.save(tensors(state), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=message):
        load_weights(nn.Linear(3, 1), tmp_path / "last.ckpt")


def test_pickled_modules_are_not_executed(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"`weights`.*state_dict"):
        torchvision_model("resnet18", 10, weights=tmp_path / "module.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "run", "pt", "ckpt"])
def test_a_network_that_asks_for_its_version_comes_back(tmp_path, suffix):
    network = torchvision_model("mnasnet0_5", 10)
    path = tmp_path / f"weights.{suffix}"
    match suffix:
        case "safetensors":  # of another program: it says nothing of versions
            save_file(network.state_dict(), path)
        case "run":
            path = path.with_suffix(".safetensors")
            save_cached(network, path, [])
        case "pt":
            torch.save(network.state_dict(), path)
        case "ckpt":
            state = {f"network.{key}": value for key, value in network.state_dict().items()}
            torch.save({"state_dict": state}, path)
    other = torchvision_model("mnasnet0_5", 10)
    load_weights(other, path)
    assert torch.equal(network.classifier[1].weight, other.classifier[1].weight)
    if suffix == "run":
        assert load_cached(torchvision_model("mnasnet0_5", 10), path) == []


def test_a_file_says_of_which_versions_its_modules_are(tmp_path):
    network = small_cnn(10, 1)
    save_network(network, tmp_path / "model.safetensors")
    found = load_safetensors(tmp_path / "model.safetensors")
    assert found._metadata == network.state_dict()._metadata
