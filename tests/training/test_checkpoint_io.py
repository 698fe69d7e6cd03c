import os
import pickle
import tempfile
import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from pruneflow.models import small_cnn
from pruneflow.training.checkpoint_io import AtomicCheckpointIO


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of 1,000 weights."""
    path = tmp_path / "saved.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(1000.0)}, path)
    return path


def test_a_trainer_resumes_exactly_and_needs_no_temporary_folder(
    trainer, model, batches, tmp_path, monkeypatch
):
    def fit(epochs, ckpt_path=None):
        checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)
        settings = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
        fitting = trainer(checkpoints, max_epochs=epochs, **settings)
        fitting.fit(model, datamodule=batches, ckpt_path=ckpt_path)
        return fitting, {name: value.clone() for name, value in model.state_dict().items()}

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    stale = tmp_path / "checkpoints" / ".killed.partial.ckpt"
    stale.parent.mkdir()
    stale.touch()
    os.utime(stale, times=(0, time.time() - 7200))
    with pytest.warns(UserWarning, match="exists and is not empty"):
        _, expected = fit(4)
    assert sorted(path.name for path in stale.parent.iterdir()) == [
        "epoch=0-step=4.ckpt",
        "epoch=1-step=8.ckpt",
        "epoch=2-step=12.ckpt",
        "epoch=3-step=16.ckpt",
    ]
    with pytest.warns(UserWarning, match="exists and is not empty"):
        resumed, weights = fit(4, stale.with_name("epoch=1-step=8.ckpt"))
    assert resumed.global_step == 16
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: data[:-1], id="without its last byte"),
        pytest.param(lambda data: data[4096:], id="without its beginning"),
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
        pytest.param(lambda data: data.replace(data[2000:2512], bytes(512)), id="a block of zeros"),
        pytest.param(lambda data: flip(data, len(data) // 2), id="one bit"),
    ],
)
def test_a_damaged_checkpoint_is_refused(saved, damage):
    damaged = damage(saved.read_bytes())
    assert damaged != saved.read_bytes()
    saved.write_bytes(damaged)
    with pytest.raises(
        ValueError,
        match=r"got .*saved\.ckpt', which is .* damaged .* delete it",
    ):
        AtomicCheckpointIO().load_checkpoint(saved)


def test_a_bit_of_a_weight_is_damage_that_torch_does_not_see(saved):
    saved.write_bytes(flip(saved.read_bytes(), 2000))
    assert not torch.equal(torch.load(saved)["weights"], torch.arange(1000.0))
    with pytest.raises(ValueError, match="damaged"):
        AtomicCheckpointIO().load_checkpoint(saved)


def test_what_would_run_code_is_read_only_when_asked_for(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "network.ckpt"
    io.save_checkpoint({"network": small_cnn(10, 1)}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        io.load_checkpoint(path)
    network = io.load_checkpoint(path, weights_only=False)["network"]
    assert isinstance(network, torch.nn.Sequential)


def test_a_failure_leaves_the_checkpoint_before_it(saved):
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        AtomicCheckpointIO().save_checkpoint({"what": lambda: None}, saved)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(saved)["weights"], torch.arange(1000.0))
    assert [path.name for path in saved.parent.iterdir()] == ["saved.ckpt"]


def test_urls_are_left_to_lightning():
    io, url = AtomicCheckpointIO(), "memory://folder/saved.ckpt"
    io.save_checkpoint({"epoch": 3}, url)
    assert io.load_checkpoint(url) == {"epoch": 3}
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({}, url, storage_options={"some": "option"})


def test_a_missing_checkpoint_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "missing.ckpt")
