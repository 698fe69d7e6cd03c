"""What a run hands over classifies pictures, as the trained network did."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pruneflow import load_classifier
from pruneflow.data import Digits
from pruneflow.data.images import pixels
from pruneflow.deploy import save_packed
from pruneflow.deploy.classifying import Description, describe, metadata
from pruneflow.models import small_cnn, torchvision_model

SMALL = {"_target_": "pruneflow.models.small_cnn", "_partial_": True, "width": 4}


@pytest.fixture(scope="module")
def data():
    data = Digits()
    data.setup()
    return data


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """A network, and the folder that it was saved in."""
    torch.manual_seed(0)
    network, folder = small_cnn(10, 1, width=4).eval(), tmp_path_factory.mktemp("run")
    about = metadata(describe(SMALL, data))
    save_file(network.state_dict(), folder / "model.safetensors", about)
    save_packed(network.state_dict(), folder / "model.packed", metadata=about)
    return network, folder


@pytest.mark.parametrize("file", ["", "model.safetensors", "model.packed"])
def test_names_and_probabilities_are_those_of_the_network(data, saved, file):
    network, folder = saved
    classifier = load_classifier(folder / file)
    assert classifier.classes == data.classes and classifier.image_shape == (1, 8, 8)
    images, _ = next(iter(data.test_dataloader()))
    with torch.no_grad():
        probabilities = network(images).softmax(1)
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    for image, expected in zip(images[:5], probabilities, strict=False):
        raw = (image * std + mean).clamp(0, 1)
        eight_bit = (raw * 255).round().to(torch.uint8)
        picture = Image.fromarray(eight_bit[0].numpy())
        picture.save(folder / "picture.png")
        for given in (raw, eight_bit, picture, folder / "picture.png", str(folder / "picture.png")):
            name, probability = classifier.predict(given)
            assert name == data.classes[int(expected.argmax())]
            assert probability == pytest.approx(float(expected.max()), abs=1e-5)


def test_a_batch_gives_logits(data, saved):
    network, folder = saved
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    scaled = (images / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    classifier = load_classifier(folder)
    assert not classifier.training
    torch.testing.assert_close(classifier(images), network(scaled))
    torch.testing.assert_close(classifier(images / 255), network(scaled))


@pytest.mark.parametrize(("mode", "size"), [("L", (8, 8)), ("RGB", (20, 30)), ("RGBA", (9, 8))])
def test_pictures_of_any_mode_and_size_are_brought_into_shape(saved, mode, size):
    picture = Image.new(mode, size, "white")
    white = load_classifier(saved[1]).predict(torch.ones(1, 8, 8))
    assert load_classifier(saved[1]).predict(picture) == white


def test_rgb_pictures_become_what_image_folders_read():
    picture = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    assert (pixels(picture, 3, (10, 10)).transpose(1, 2, 0) == np.asarray(picture)).all()
    assert pixels(picture, 3, (4, 6)).shape == (3, 6, 4)
    with pytest.raises(ValueError, match="`channels` must be 1, 3 or 4, got 2"):
        pixels(picture, 2, (4, 4))


def test_torchvision_networks_are_built_without_what_they_started_from(data, tmp_path):
    node = {
        "_target_": "pruneflow.models.torchvision_model",
        **{"name": "resnet18", "stem": "cifar", "weights": "gone.pt"},
    }
    network = torchvision_model("resnet18", 10, in_channels=1, stem="cifar")
    save_file(network.state_dict(), tmp_path / "model.safetensors", metadata(describe(node, data)))
    assert load_classifier(tmp_path).predict(torch.zeros(1, 8, 8)).name in data.classes


class Mine(nn.Module):
    built = 0

    def __init__(self, num_classes, in_channels, width):
        super().__init__()
        Mine.built += 1
        self.layer = nn.Linear(64 * in_channels, num_classes)

    def forward(self, images):
        return self.layer(images.flatten(1))


def test_code_that_a_file_names_is_not_run(data, tmp_path):
    mine = Mine(10, 1, 2)
    about = describe({"_target_": f"{__name__}.Mine", "width": 2}, data)
    save_file(mine.state_dict(), tmp_path / "model.safetensors", metadata(about))
    before = Mine.built
    with pytest.raises(
        ValueError, match=r"`network` must be given .*Mine\(width=2, num_classes=10,"
    ):
        load_classifier(tmp_path)
    assert Mine.built == before
    assert load_classifier(tmp_path, Mine(10, 1, 2)).predict(torch.zeros(1, 8, 8)).name


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.zeros(3, 8, 8), r"`picture` must have shape \(1, 8, 8\), got \(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), r"got \(1, 1, 8, 8\)"),
        (torch.full((1, 8, 8), -0.5), r"`picture` must hold floats in \[0, 1\], got -0.5 to -0.5"),
    ],
)
def test_tensors_that_are_no_such_picture_are_refused(saved, picture, message):
    with pytest.raises(ValueError, match=message):
        load_classifier(saved[1]).predict(picture)


def test_files_that_say_nothing_of_pictures_are_refused(data, tmp_path):
    network = small_cnn(10, 1, width=4)
    with pytest.raises(FileNotFoundError, match="`path` must be a run folder or a file"):
        load_classifier(tmp_path)
    save_file(network.state_dict(), tmp_path / "plain.safetensors")
    save_packed(network.state_dict(), tmp_path / "plain.packed")
    (tmp_path / "text.safetensors").write_text("text")
    for file in ("plain.safetensors", "plain.packed", "text.safetensors"):
        with pytest.raises(ValueError, match="`path` must be a file of a run"):
            load_classifier(tmp_path / file)
    about: Description = {**describe(SMALL, data), "mean": None}
    save_file(network.state_dict(), tmp_path / "model.safetensors", metadata(about))
    with pytest.raises(ValueError, match="`mean` and `std` must be known"):
        load_classifier(tmp_path)


def test_what_is_said_of_a_classifier_is_plain_and_in_the_order_of_the_labels(data):
    about = describe(SMALL, data)
    assert json.loads(json.dumps(about)) == about
    assert about["classes"] == [str(digit) for digit in range(10)]
    assert about["arguments"] == {"width": 4, "num_classes": 10, "in_channels": 1}
    assert 0 < about["mean"][0] < 1 and 0 < about["std"][0] < 1
