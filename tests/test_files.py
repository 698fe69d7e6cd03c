import errno
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pruneflow.files import sweep, write_whole
from pruneflow.state_dicts import load_safetensors, save_safetensors


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "sub" / "report.json"
    with write_whole(target) as path:
        path.write_text("old")

    def fail():
        with write_whole(target) as path:
            path.write_text("half of the n")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("name", ["a" * 250 + ".ckpt", "\u00e4" * 125 + ".json", "b" * 255])
def test_names_may_be_as_long_as_the_file_system_takes(tmp_path, name):
    with write_whole(tmp_path / name) as path:
        path.write_text("whole")
        assert path.name.startswith(".")
        assert ".partial" in path.name
    assert (tmp_path / name).read_text() == "whole"


def test_whoever_may_read_a_new_file_may_read_it(tmp_path):
    (tmp_path / "any").touch()
    for _ in range(2):  # the second replaces what somebody made private
        with write_whole(tmp_path / "model.safetensors") as path:
            path.write_text("weights")
            path.chmod(0o600)
        assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
        (tmp_path / ".model.partial.safetensors").touch(0o600)  # left by a killed writer


def test_who_reads_the_old_file_goes_on_reading_it_whole(tmp_path):
    target = tmp_path / "report.json"
    target.write_text("old")
    with target.open() as reader:
        with write_whole(target) as path:
            path.write_text("new and longer")
        assert reader.read() == "old"  # the new file took its place, nothing was written into it
    assert target.read_text() == "new and longer"


def test_a_killed_process_leaves_no_half_written_file(tmp_path):
    target = tmp_path / "report.json"
    target.write_text("old")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from pruneflow.files import write_whole\n"
        "with write_whole(Path(sys.argv[1])) as path:\n"
        "    path.write_text('half of the n'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    with write_whole(target) as path:
        path.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_keeps_the_suffix_by_which_savers_choose_the_format(tmp_path):
    with write_whole(tmp_path / "plot.png") as path:
        assert path.suffix == ".png"
        path.touch()


def test_sweeps_only_what_nobody_writes_any_more(tmp_path):
    with write_whole(tmp_path / "living.ckpt") as living:
        living.touch()
        for name in (".killed.partial.ckpt", ".other.partial.csv", "whole.ckpt", ".hidden.ckpt"):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, times=(0, time.time() - 7200))
        sweep(tmp_path, ".ckpt")
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {living.name, ".other.partial.csv", "whole.ckpt", ".hidden.ckpt"}
    sweep(tmp_path / "missing")


def test_a_block_that_fails_on_a_full_disk_says_so(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    for free, raised in ((0, OSError), (10**9, RuntimeError)):
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: usage(1, 1, free))
        with pytest.raises(raised) as error, write_whole(tmp_path / "file"):
            raise RuntimeError("unexpected pos")
        assert getattr(error.value, "errno", errno.ENOSPC) == errno.ENOSPC
        assert not [*tmp_path.iterdir()]


def test_the_same_state_dict_gives_the_same_bytes_and_reads_back(tmp_path):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    about = {name: f'{name} – "\\ \n' for name in "abcdefgh"}
    for index in range(8):
        save_safetensors(network.state_dict(), tmp_path / f"{index}", about)
    assert len({(tmp_path / f"{index}").read_bytes() for index in range(8)}) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert about.items() <= file.metadata().items()
    found = load_safetensors(tmp_path / "0")
    assert found._metadata == network.state_dict()._metadata
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())
