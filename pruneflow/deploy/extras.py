"""Packages that only parts of deploy/ need: imported when they are, named when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

INSTALL = "pip install 'pruneflow[deploy]'"

_USES = {
    "onnxruntime": "running ONNX files",
    "onnxscript": "exporting to ONNX",
    "openvino": "comparing with OpenVINO",
}


def require(name: str) -> ModuleType:
    """Import a package of the extra `[deploy]`.

    Args:
        name: As it is imported, such as `onnxruntime`.

    Raises:
        ImportError: If it is missing, or there and broken, with the command that installs it.

    Example:
        >>> require("not_there")  # doctest: +NORMALIZE_WHITESPACE
        Traceback (most recent call last):
        ...
        ImportError: `not_there` is expected to be installed for this, but importing it gave: No
        module named 'not_there'; run pip install 'pruneflow[deploy]'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"`{name}` is expected to be installed for {_USES.get(name, 'this')}, but importing it "
            f"gave: {error}; run {INSTALL}",
            name=name,
        ) from error
