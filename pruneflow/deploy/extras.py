"""Optional dependencies, imported when they are needed."""

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
        name: Name of the module, such as `onnxruntime`.

    Raises:
        ImportError: If it is missing or broken; the message has the command to install it.

    Example:
        >>> require("not_there")  # doctest: +NORMALIZE_WHITESPACE
        Traceback (most recent call last):
        ...
        ImportError: `not_there` must be installed for this, got ModuleNotFoundError: No module
        named 'not_there'; run pip install 'pruneflow[deploy]'
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"`{name}` must be installed for {_USES.get(name, 'this')}, got "
            f"{type(error).__name__}: {error}; run {INSTALL}",
            name=name,
        ) from error
