"""The metadata of a `state_dict`: the version of each module.

PyTorch keeps it in the attribute `_metadata`, which files of plain tensors lose. Some networks,
such as torchvision's MNASNet, cannot load a `state_dict` without it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_KEY = "pruneflow.modules"  # in the metadata of a safetensors file


def described(state_dict: Mapping[str, Tensor], prefix: str = "") -> str | None:
    """The metadata of the modules under a prefix, as JSON; None if there is none.

    Example:
        >>> from torch import nn
        >>> described(nn.BatchNorm1d(2).state_dict())
        '{"":{"version":2}}'
    """
    modules: Mapping[str, Mapping[str, Any]] = getattr(state_dict, "_metadata", None) or {}
    plain = {
        f"{module}."[len(prefix) : -1]: {
            key: value for key, value in about.items() if isinstance(value, int | str)
        }
        for module, about in modules.items()
        if f"{module}.".startswith(prefix)
    }
    return json.dumps(plain, separators=(",", ":")) if plain else None


def with_description(tensors: Mapping[str, Tensor], text: str | None) -> OrderedDict[str, Tensor]:
    """A `state_dict` with the metadata that `described` returned.

    Raises:
        ValueError: If `text` is not such metadata.
    """
    state_dict: Any = OrderedDict(tensors)
    if text is not None:
        modules = json.loads(text)
        if not isinstance(modules, dict) or not all(isinstance(m, dict) for m in modules.values()):
            raise ValueError("the metadata of its modules is not a mapping of mappings")
        state_dict._metadata = OrderedDict(modules)
    result: OrderedDict[str, Tensor] = state_dict
    return result


def save_safetensors(
    state_dict: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write a `state_dict` that `load_safetensors` can read; equal ones give equal bytes.

    Args:
        state_dict: Tensors that do not share memory.
        path: The file.
        metadata: More metadata to store in the file.
    """
    text = described(state_dict)
    modules = {} if text is None else {_KEY: text}
    save_file(dict(state_dict), path, {**modules, **metadata})
    with path.open("r+b") as file:  # safetensors writes metadata in random order
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(ordered.ljust(length))


def load_safetensors(path: str | Path) -> OrderedDict[str, Tensor]:
    """Read a safetensors file as the `state_dict` it was written from.

    Raises:
        safetensors.SafetensorError: If it is not a safetensors file.
        ValueError: If the metadata of its modules is damaged.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return with_description(tensors, (file.metadata() or {}).get(_KEY))
