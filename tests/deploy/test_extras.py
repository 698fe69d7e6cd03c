import json
import subprocess
import sys

import pytest
import torch

import pruneflow
from pruneflow.deploy.extras import require


def test_gives_the_package():
    assert require("json") is json


def test_names_what_is_missing_its_use_and_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"`onnxruntime` .* for running ONNX files") as caught:
        require("onnxruntime")
    assert str(caught.value).endswith("run pip install 'pruneflow[deploy]'")
    assert caught.value.name == "onnxruntime"


def test_a_package_that_is_there_and_broken_says_why(monkeypatch, tmp_path):
    (tmp_path / "openvino_broken.py").write_text("raise ImportError('libtbb.so.12 is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"got ImportError: libtbb\.so\.12 is missing; run pip"):
        require("openvino_broken")


def test_packing_from_the_command_line_does_not_import_lightning(tmp_path):
    torch.save({"weight": torch.eye(3)}, tmp_path / "model.pt")
    code = (
        "import sys; from pruneflow.deploy.__main__ import main; main(sys.argv[1:]); "
        "print(sorted({'lightning', 'torchmetrics', 'torchvision', 'hydra'} & set(sys.modules)))"
    )
    arguments = ["pack", str(tmp_path / "model.pt"), str(tmp_path / "model.packed")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_who_has_no_shards_does_not_wait_for_what_shards_are_made_of():
    code = (
        "import sys, pruneflow.deploy, pruneflow.distributed; "
        "print(sorted({'torch.distributed.fsdp', 'torch.distributed.tensor'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_imported_when_first_asked_for_is_there_all_the_same():
    assert set(pruneflow.__all__) <= set(dir(pruneflow))
    former = {"Gradients": "Calibration"}
    for name in pruneflow.__all__:
        assert getattr(pruneflow, name).__name__ == former.get(name, name)
    with pytest.raises(AttributeError, match="module 'pruneflow' has no attribute 'nonsense'"):
        pruneflow.nonsense  # noqa: B018
