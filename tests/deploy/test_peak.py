import sys

import pytest
import torch
from torch import nn

from pruneflow.deploy.peak import peak_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def saved(folder, module, batch):
    torch.save(module, folder / "module.pt")
    torch.save(batch, folder / "batch.pt")
    return folder / "module.pt", folder / "batch.pt", 1


def test_weights_and_outputs_count_and_inputs_do_not(tmp_path):
    # 40 MB of weights, 4 MB of outputs; 80 MB of inputs.
    peak = peak_bytes(*saved(tmp_path, nn.Linear(10_000, 1000), torch.ones(2000, 10_000)))
    assert 44e6 < peak < 75e6


def test_an_exported_program_counts_like_its_module(tmp_path):
    _, batch, threads = saved(tmp_path, nn.ReLU(), torch.ones(2000, 10_000))
    program = torch.export.export(nn.Linear(10_000, 1000), (torch.ones(2000, 10_000),))
    torch.export.save(program, tmp_path / "program.pt2")
    assert 44e6 < peak_bytes(tmp_path / "program.pt2", batch, threads) < 75e6


class Local(nn.Module):
    """Known to this file alone."""


def test_a_class_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    given = saved(tmp_path, Local(), torch.ones(1))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "tests" not in path])
    with pytest.raises(RuntimeError, match="No module named 'test_peak'"):
        peak_bytes(*given)
