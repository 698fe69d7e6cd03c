import logging

import pytest
import torch
from torch import fx, nn

from pruneflow.deploy import onnx as ours
from pruneflow.deploy.onnx import OnnxModel, export_onnx, mismatch

onnx = pytest.importorskip("onnx", reason="needs pip install 'pruneflow[deploy]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'pruneflow[deploy]'")
pytest.importorskip("onnxscript", reason="needs pip install 'pruneflow[deploy]'")


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )
    network(torch.randn(8, 3, 4, 4))  # running statistics that are not those of the start
    network[0].weight.data[:, 0] = 0
    return network


def images(count):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def evaluated(network, batch):
    return network.eval()(batch)


@pytest.mark.parametrize("size", [1, 2])
def test_a_file_takes_any_batch_whatever_the_example_had(network, tmp_path, size):
    export_onnx(network, images(size), tmp_path / "network.onnx")
    model = OnnxModel(tmp_path / "network.onnx", threads=1)
    for other in (1, 2, 7):
        assert torch.allclose(model(images(other)), evaluated(network, images(other)), atol=1e-6)


def test_nothing_is_said_and_one_file_is_written(network, tmp_path, capfd, caplog):
    levels = [logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")]
    export_onnx(network, images(1), tmp_path / "new" / "network.onnx", opset=17)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert levels == [logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["network.onnx"]


def test_the_model_is_left_as_it_was(network, tmp_path):
    network.train()
    network[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    export_onnx(network, images(2), tmp_path / "network.onnx")
    assert [module.training for module in network] == [True, False, True, True, True]
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_traced_graphs_are_exported_as_well(network, tmp_path):
    export_onnx(fx.symbolic_trace(network.eval()), images(1), tmp_path / "graph.onnx")
    found = OnnxModel(tmp_path / "graph.onnx")(images(3))
    assert torch.allclose(found, evaluated(network, images(3)), atol=1e-6)


@pytest.mark.parametrize("opset", [18, 20])
def test_the_opset_asked_for_is_the_one_written(network, tmp_path, opset):
    export_onnx(network, images(1), tmp_path / "network.onnx", opset=opset)
    (written,) = [
        entry.version
        for entry in onnx.load(tmp_path / "network.onnx").opset_import
        if entry.domain in ("", "ai.onnx")
    ]
    assert written == opset


def test_an_opset_that_cannot_be_written_is_refused(network, tmp_path):
    with pytest.raises(ValueError, match=r"`opset` .* 1000"):
        export_onnx(network, images(1), tmp_path / "network.onnx", opset=1000)
    assert not list(tmp_path.iterdir())


def test_a_fixed_batch_is_what_the_file_takes(network, tmp_path):
    export_onnx(network, images(2), tmp_path / "network.onnx", dynamic_batch=False)
    model = OnnxModel(tmp_path / "network.onnx")
    assert model(images(2)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"`batch` .* \[2, 3, 4, 4\], got .* \(3, 3, 4, 4\)"):
        model(images(3))
    with pytest.raises(ValueError, match=r"`batch` .* tensor\(float\) .* torch.float64"):
        model(images(2).double())


class Pairs(nn.Module):
    """Knows its batch size."""

    def forward(self, batch):
        return batch.reshape(2, 4) + 1


def test_a_model_of_one_batch_size_needs_dynamic_batch_false(tmp_path):
    with pytest.raises(
        ValueError, match=r"batches of any size, .* batch of 1: .*dynamic_batch=False"
    ):
        export_onnx(Pairs(), torch.ones(2, 4), tmp_path / "pairs.onnx")
    assert not list(tmp_path.iterdir())
    export_onnx(Pairs(), torch.ones(2, 4), tmp_path / "pairs.onnx", dynamic_batch=False)
    assert OnnxModel(tmp_path / "pairs.onnx")(torch.ones(2, 4)).shape == (2, 4)


class Branching(nn.Module):
    def forward(self, batch):
        return batch if batch.sum() > 0 else -batch


class Counting(nn.Module):
    """Gives something else at each call."""

    calls = 0.0

    def forward(self, batch):
        self.calls += 1
        return batch * self.calls


class Two(nn.Module):
    def forward(self, batch):
        return batch, batch


class NotANumber(nn.Module):
    def forward(self, batch):
        return batch * torch.nan


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Branching(), ValueError, "`model` must be exportable by torch.onnx"),
        (Counting(), ValueError, "`model` .* same outputs in ONNX Runtime, got .* of their norm"),
        (NotANumber(), ValueError, "off by nan of their norm"),
        (Two(), TypeError, "`model` .* one tensor, got tuple"),
    ],
)
def test_what_is_refused_leaves_the_old_file(tmp_path, model, error, message):
    (tmp_path / "model.onnx").write_bytes(b"old")
    with pytest.raises(error, match=message):
        export_onnx(model, torch.ones(2, 4), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_more_weights_than_one_file_holds_are_refused(network, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"at most 1,000 bytes of weights"):
        export_onnx(network, images(1), tmp_path / "network.onnx")


def test_an_example_without_a_sample_is_refused(network, tmp_path):
    with pytest.raises(ValueError, match=r"`example_input` .* \(0, 3, 4, 4\)"):
        export_onnx(network, images(0), tmp_path / "network.onnx")


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`path` must be an ONNX file .*, got .*model\.onnx"):
        OnnxModel(path)


def test_a_truncated_file_and_no_threads_are_refused(network, tmp_path):
    path = tmp_path / "network.onnx"
    export_onnx(network, images(1), path)
    with pytest.raises(ValueError, match=r"`threads` .*, got 0"):
        OnnxModel(path, threads=0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="`path` must be an ONNX file"):
        OnnxModel(path)


def test_outputs_agree_within_a_share_of_their_norm():
    ones = torch.ones(4)
    assert mismatch(ones, ones * (1 + 0.9e-4)) is None
    assert mismatch(ones, ones * (1 + 1.1e-4)) is not None
    assert mismatch(ones * 0, ones * 0) is None
    assert mismatch(ones * 0, ones * 1e-9) is not None
    assert mismatch(ones, ones * torch.inf) is not None
    assert mismatch(ones, ones * torch.nan) is not None


def test_a_tensor_that_forward_moves_is_refused(tmp_path):
    class Normalised(nn.Linear):
        def forward(self, x):
            self.weight.data = nn.functional.normalize(self.weight.data)
            return super().forward(x)

    with pytest.raises(ValueError, match=r"`model` must not assign to `\.data`.*0\.weight"):
        export_onnx(nn.Sequential(Normalised(4, 2)), torch.zeros(2, 4), tmp_path / "a.onnx")
