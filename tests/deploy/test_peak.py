import os
import signal
import sys

import pytest
import torch
from torch import nn

from pruneflow.deploy.peak import peak_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Allocating(nn.Module):
    """Takes memory for a moment, or for as long as it runs."""

    def forward(self, batch):
        del batch
        return torch.ones(5_000_000).sum() + torch.ones(5_000_000).sum()


class Killed(nn.Module):
    def forward(self, batch):
        os.kill(os.getpid(), signal.SIGKILL)


class Local(nn.Module):
    """Known to this file alone."""


def test_what_counts_in_each_of_several_processes(tmp_path):
    # 40 MB of weights, 4 MB of outputs; 40 MB of inputs.
    inputs = torch.ones(1000, 10_000)
    batch, single = tmp_path / "batch.pt", tmp_path / "single.pt"
    torch.save(inputs, batch)
    torch.save(torch.ones(1), single)
    modules = {"linear": nn.Linear(10_000, 1000), "twice": Allocating(), "killed": Killed()}
    for name, module in modules.items():
        torch.save(module, tmp_path / f"{name}.pt")
    program = torch.export.export(nn.Linear(10_000, 1000), (inputs,))
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save({"no": "module"}, tmp_path / "dictionary.pt")
    linear, exported, killed, twice, dictionary = peak_bytes(
        [
            (tmp_path / "linear.pt", batch),
            (tmp_path / "program.pt2", batch),
            (tmp_path / "killed.pt", single),
            (tmp_path / "twice.pt", single),
            (tmp_path / "dictionary.pt", single),
        ],
        threads=1,
    )
    assert 43.5e6 < linear < 50e6  # weights and outputs, and no inputs
    assert 43.5e6 < exported < 50e6
    assert 19.5e6 < twice < 26e6  # what one line gave back the next one takes again
    assert killed == "its process ended with exit code -9"
    assert dictionary == "TypeError: 'dict' object is not callable"


def test_a_class_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    torch.save(Local(), tmp_path / "local.pt")
    torch.save(torch.ones(1), tmp_path / "batch.pt")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "tests" not in path])
    assert peak_bytes([(tmp_path / "local.pt", tmp_path / "batch.pt")], threads=1) == [
        "ModuleNotFoundError: No module named 'test_peak'"
    ]


def test_a_process_that_cannot_start_says_why_for_each(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert peak_bytes([(tmp_path / "a.pt", tmp_path / "b.pt")] * 2, threads=1) == [
        "exit code 1",
        "exit code 1",
    ]
