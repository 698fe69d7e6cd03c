import json
import sys

import pytest

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
    with pytest.raises(ImportError, match=r"gave: libtbb\.so\.12 is missing; run pip"):
        require("openvino_broken")
