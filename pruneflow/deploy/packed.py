"""The packed file: where the survivors lie and what they are, all else of a `state_dict` as it is.

Entries whose bits are all zero are pruned; everything else, -0.0 and NaN included, comes back bit
for bit. A packed file is a safetensors file, so whatever reads those opens it. It holds

- metadata with one key, `pruneflow.packed`: JSON with `version` (1), `index_bytes` before
  compression, `index_crc32` and, if there is any, `metadata` of the caller;
- `index`, uint8: one zstd frame of JSON, a list with one object for each tensor, in their order;
- `data`, uint8: the streams of all tensors, one after the other.

What the index says of a tensor:

| key | value |
|---|---|
| `name`, `dtype`, `shape` | as in the `state_dict` |
| `kept` | how many of its words are not zero |
| `positions` | how it is written which: `all`, `gaps` or `mask` |
| `values` | the dtype the kept ones are written in: that of the tensor, or `float16` |
| `start` | where in `data` its streams begin |
| `streams` | `[bytes, stored bytes]` of each; a zstd frame where fewer are stored |
| `crc32` | of its stored bytes |
| `same_as` | null, or the name of the earlier tensor it is tied to, whose streams these are |

A tensor is a row of unsigned words of its item size (of 8 bytes where that is larger), in row-major
order. Its streams are

1. the positions, unless `all` are kept. `gaps`: a byte below 255 stands for that many zeros and
   then a survivor, 255 for 255 zeros. `mask`: word i is kept where bit i % 8 of byte i // 8 is set.
   Whichever takes fewer bytes is written.
2. the values, turned left by one bit, which puts the sign last: then one stream for each of their
   bytes, the lowest first. So exponents lie alone, and they are what compresses.
"""

from __future__ import annotations

import difflib
import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import zstandard
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from pruneflow.deploy.coding import DTYPES, Entry, decode, decompress, encode, expect
from pruneflow.files import write_whole

FORMAT, VERSION = "pruneflow.packed", 1

_MOST_INDEX_BYTES = 100_000_000  # as many as safetensors allows its own header


@dataclass(frozen=True)
class PackedTensor:
    """What a packed file holds of one tensor.

    Args:
        name: Its key in the `state_dict`.
        shape: Its shape.
        dtype: Its dtype, which `load_packed` gives back.
        nonzeros: Entries that are kept.
        bytes: What it takes in the file; 0 where it is tied to an earlier tensor.
        values: The dtype of the values in the file.
        same_as: The earlier tensor that it is tied to, if any.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nonzeros: int
    bytes: int
    values: torch.dtype
    same_as: str | None

    @property
    def entries(self) -> int:
        """All of them; of complex128, whose halves are kept or not alone, real and imaginary."""
        return math.prod(self.shape) * max(1, self.dtype.itemsize // 8)


def save_packed(
    state_dict: Mapping[str, Tensor],
    path: str | Path,
    *,
    values: Literal["same", "float16"] = "same",
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a `state_dict` with its pruned weights left out, whole or not at all.

    A zero with a sign is kept, or it could not be given back. What `torch.nn.utils.prune` leaves
    behind is full of them; `pruneflow.importers.fold` makes them plain zeros.

    Args:
        state_dict: Name -> tensor, on any device; tied tensors are written once.
        path: The file.
        values: `"same"` keeps every bit. `"float16"` rounds the survivors of pruned float32 and
            float64 tensors of two or more dimensions, which come back in their own dtype. All
            other tensors, and those with a survivor that would become infinite, NaN or zero, keep
            every bit; `inspect_packed` tells which.
        metadata: Texts to keep in the file, in its own metadata, below `metadata`.

    Returns:
        The bytes written.

    Raises:
        ValueError: If `values` is neither, or what came is no `state_dict` of plain tensors.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "model.packed"
        >>> weight = torch.zeros(1000, 1000).index_fill_(0, torch.tensor(7), 0.5)
        >>> save_packed({"weight": weight}, path) < 1000
        True
        >>> torch.equal(load_packed(path)["weight"], weight)
        True
    """
    if values not in ("same", "float16"):
        raise ValueError(
            f"`values` is expected to be 'same' or 'float16', but {values!r} came; take one of them"
        )
    tensors = {name: _plain(name, tensor) for name, tensor in state_dict.items()}
    entries: list[Entry] = []
    blobs: list[bytes] = []
    start = 0
    first: dict[object, Entry] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            entries.append(replace(first[place], name=name, same_as=first[place].name))
            continue
        entry, blob = encode(name, tensor, start, halve=values == "float16")
        first[place] = entry
        entries.append(entry)
        blobs.append(blob)
        start += len(blob)
    listed = json.dumps([vars(entry) for entry in entries], separators=(",", ":")).encode()
    index = zstandard.ZstdCompressor(level=9).compress(listed)
    about: dict[str, Any] = {
        "version": VERSION,
        "index_bytes": len(listed),
        "index_crc32": zlib.crc32(index),
    }
    if metadata:
        about["metadata"] = dict(metadata)
    contents = {
        "index": np.frombuffer(index, np.uint8),
        "data": np.frombuffer(b"".join(blobs), np.uint8),
    }
    path = Path(path)
    with write_whole(path) as temporary:
        save_file(contents, temporary, {FORMAT: json.dumps(about)})
    return path.stat().st_size


def load_packed(path: str | Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Read a packed file; nothing in it is executed.

    Args:
        path: The file.
        names: Of the tensors to read: their bytes alone are read and checked. None reads all.

    Returns:
        Name -> tensor on the CPU, contiguous, in the order of the `state_dict` that was saved;
        tied tensors are one object.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, damaged, another kind of file or of another version, or has
            no tensor of such a name.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "model.packed"
        >>> _ = save_packed(nn.Linear(2, 1).state_dict(), path)
        >>> list(load_packed(path)), list(load_packed(path, names=["bias"]))
        (['weight', 'bias'], ['bias'])
    """
    if isinstance(names, str):
        raise TypeError(
            f"`names` is expected to be a list of names, but {names!r} came; put it in brackets"
        )
    with _opened(path) as file:
        entries = _index(file, path)
        for name in names or ():
            if name not in entries:
                near = difflib.get_close_matches(name, entries, n=3, cutoff=0.4)
                raise ValueError(
                    f"`names` is expected to name tensors of {str(path)!r}, but it has no "
                    f"{name!r}; near names: {', '.join(near or list(entries)[:3])}"
                )
        tensors: dict[str, Tensor] = {}
        first: dict[str, Tensor] = {}
        with _damage_named(path):
            data = file.get_slice("data")
            for name, entry in entries.items():
                if names is None or name in names:
                    source = entry.same_as or name
                    if source not in first:
                        end = entry.start + entry.stored
                        stored = data[entry.start : end].tobytes() if entry.stored else b""
                        first[source] = decode(entry, stored)
                    tensors[name] = first[source]
    return tensors


def inspect_packed(path: str | Path) -> list[PackedTensor]:
    """List what a packed file holds; only its index is read and checked.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, another kind of file or of another version, or its index is
            damaged.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "model.packed"
        >>> _ = save_packed({"weight": torch.eye(3)}, path)
        >>> [(tensor.name, tensor.shape, tensor.nonzeros) for tensor in inspect_packed(path)]
        [('weight', (3, 3), 3)]
    """
    with _opened(path) as file:
        return [
            PackedTensor(
                entry.name,
                tuple(entry.shape),
                DTYPES[entry.dtype],
                entry.kept,
                0 if entry.same_as else entry.stored,
                DTYPES[entry.values],
                entry.same_as,
            )
            for entry in _index(file, path).values()
        ]


def _plain(name: str, tensor: Tensor) -> Tensor:
    # Subclasses hold their data in ways of their own: sharded, quantized, fake.
    if (
        not isinstance(name, str)
        or type(tensor) not in (Tensor, nn.Parameter)
        or tensor.layout is not torch.strided
        or tensor.is_meta
        or tensor.is_quantized
    ):
        what = type(tensor).__name__
        if isinstance(tensor, Tensor):
            what += f" of {tensor.dtype} and {tensor.layout} on {tensor.device}"
        raise ValueError(
            "`state_dict` is expected to hold plain dense tensors by name, but "
            f"{name!r} is a {what}; of a checkpoint give checkpoint['state_dict'], leave out what "
            "is no tensor, and give others as `to_dense()`, `dequantize()` or `full_tensor()` do"
        )
    return tensor.detach()


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path`={str(path)!r} is expected to be a file; check the path")
    with _damage_named(path):
        file = safe_open(path, framework="numpy")
    with file:
        yield file


@contextmanager
def _damage_named(path: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # there are as many kinds as there are ways to be damaged
        raise ValueError(
            f"`path`={str(path)!r} is expected to be a packed file, but it is truncated, damaged "
            f"or another kind of file ({error}); copy it again, or pack the model again"
        ) from error


def _index(file: Any, path: str | Path) -> dict[str, Entry]:
    about = (file.metadata() or {}).get(FORMAT)
    if about is None:
        raise ValueError(
            f"`path`={str(path)!r} is expected to be a packed file, but it is a safetensors file "
            "of another kind; read it with safetensors.torch.load_file, or pack it first"
        )
    with _damage_named(path):
        about = json.loads(about)
        version = about["version"]
    if version != VERSION:
        raise ValueError(
            f"`path`={str(path)!r} is expected to have version {VERSION} of the layout, but it has "
            f"{version!r}; update pruneflow"
        )
    with _damage_named(path):
        for part in ("index", "data"):
            found = file.get_slice(part).get_dtype(), len(file.get_slice(part).get_shape())
            expect(found == ("U8", 1), f"{part!r} is another kind of tensor")
        index = file.get_tensor("index").tobytes()
        expect(zlib.crc32(index) == about["index_crc32"], "the checksum of its index differs")
        expect(about["index_bytes"] <= _MOST_INDEX_BYTES, "its index is too long")
        entries = [Entry(**entry) for entry in json.loads(decompress(index, about["index_bytes"]))]
        for entry in entries:
            for dtype in (entry.dtype, entry.values):
                expect(dtype in DTYPES, f"{dtype!r} is no dtype of this PyTorch")
    return {entry.name: entry for entry in entries}
