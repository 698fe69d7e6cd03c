"""Deployment: packed files, smaller networks, a sparse runtime, ONNX."""

from pruneflow.deploy.forms import Form, measure_forms
from pruneflow.deploy.onnx import OnnxModel, export_onnx
from pruneflow.deploy.packed import PackedTensor, inspect_packed, load_packed, save_packed
from pruneflow.deploy.runtime import sparse_compile
from pruneflow.deploy.semi_structured import to_semi_structured
from pruneflow.deploy.shrink import shrink

__all__ = [
    "Form",
    "OnnxModel",
    "PackedTensor",
    "export_onnx",
    "inspect_packed",
    "load_packed",
    "measure_forms",
    "save_packed",
    "shrink",
    "sparse_compile",
    "to_semi_structured",
]
