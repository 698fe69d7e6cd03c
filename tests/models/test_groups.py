"""The options of conf/{data,model,optimizer,lr_scheduler}."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf"


def options(group):
    return sorted((CONF / group).glob("*.yaml"))


def read(path, **changes):
    return OmegaConf.merge({"seed": 5}, {"node": OmegaConf.load(path)}, {"node": changes}).node


def named(path):
    return path.stem


def test_data_options_take_the_same_keys():
    assert len({frozenset(OmegaConf.load(path)) for path in options("data")}) == 1


@pytest.mark.parametrize("path", options("data"), ids=named)
def test_data_take_the_runs_seed(path, tmp_path):
    data = instantiate(read(path, root=str(tmp_path), mean=[0.5], val_size=100))
    assert (data.seed, data.root, data.val_size) == (5, tmp_path, 100)


@pytest.mark.parametrize("path", options("model"), ids=named)
def test_models_are_called_with_what_the_data_know(path):
    changes = {"name": "squeezenet1_1"} if path.stem == "torchvision" else {}
    network = instantiate(read(path, **changes))(num_classes=7, in_channels=1).eval()
    assert network(torch.zeros(1, 1, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("schedule", options("lr_scheduler"), ids=named)
@pytest.mark.parametrize("path", options("optimizer"), ids=named)
def test_optimizers_and_schedules_combine(path, schedule):
    factory = instantiate(read(path, lr=0.5, weight_decay=0.25))
    optimizer = factory([torch.zeros(1, requires_grad=True)])
    scheduler = instantiate(read(schedule), epochs=8)(optimizer)
    assert optimizer.defaults["lr"] == 0.5
    assert optimizer.defaults["weight_decay"] == 0.25
    assert 0 < scheduler.get_last_lr()[0] <= 0.5
