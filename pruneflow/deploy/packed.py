"""The packed file: where the survivors lie and what they are, all else of a `state_dict` as it is.

Entries whose bits are all zero are pruned; everything else, -0.0 and NaN included, comes back bit
for bit. A packed file is a safetensors file, so whatever reads those opens it. It holds

- metadata with one key, `pruneflow.packed`: JSON with `version` (1), `index_bytes` before
  compression, `index_crc32` and, if there is any, `metadata` of the caller;
- `index`, uint8: one zstd frame of JSON, a list with one object for each tensor, in their order;
- `data`, uint8: the streams of all tensors, one after the other;
- `modules`, uint8, if the `state_dict` has `_metadata`, of which version its modules are: one zstd
  frame of JSON. The metadata of the file then has `modules_bytes` and `modules_crc32` too.

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
from collections import OrderedDict
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
from pruneflow.state_dicts import described, with_description

FORMAT, VERSION = "pruneflow.packed", 1

_MOST_INDEX_BYTES = 100_000_000  # as many as safetensors allows its own header
_MOST_TIMES_LONGER = 1000  # than its frame; entries differ in their checksums
_MOST_ZEROS, _MOST_TIMES_LARGER = 2**30, 2**15  # bytes that tensors take, however few they are here


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
    behind is full of them; `pruneflow.fold` makes them plain zeros.

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
    parts = {"index": json.dumps([vars(entry) for entry in entries], separators=(",", ":"))}
    if (modules := described(state_dict)) is not None:
        parts["modules"] = modules
    about: dict[str, Any] = {"version": VERSION}
    if metadata:
        about["metadata"] = dict(metadata)
    contents = {"data": np.frombuffer(b"".join(blobs), np.uint8)}
    for name, text in parts.items():
        frame = zstandard.ZstdCompressor(level=9).compress(text.encode())
        about |= {f"{name}_bytes": len(text.encode()), f"{name}_crc32": zlib.crc32(frame)}
        contents[name] = np.frombuffer(frame, np.uint8)
    path = Path(path)
    with write_whole(path) as temporary:
        save_file(contents, temporary, {FORMAT: json.dumps(about)})
    return path.stat().st_size


def load_packed(path: str | Path, names: Collection[str] | None = None) -> OrderedDict[str, Tensor]:
    """Read a packed file; nothing in it is executed.

    Args:
        path: The file.
        names: Of the tensors to read: their bytes alone are read and checked. None reads all.

    Returns:
        Name -> tensor on the CPU, contiguous, in the order of the `state_dict` that was saved;
        tied tensors are one object. It has the versions of the modules that this one had.

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
        about = _about(file, path)
        entries = _index(file, about, path)
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
            expect(("modules" in file.keys()) == ("modules_crc32" in about), "a part is missing")  # noqa: SIM118
            modules = _part(file, about, "modules") if "modules_crc32" in about else None
            return with_description(tensors, modules)


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
            for entry in _index(file, _about(file, path), path).values()
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


def _about(file: Any, path: str | Path) -> dict[str, Any]:
    text = (file.metadata() or {}).get(FORMAT)
    if text is None:
        raise ValueError(
            f"`path`={str(path)!r} is expected to be a packed file, but it is a safetensors file "
            "of another kind; read it with safetensors.torch.load_file, or pack it first"
        )
    with _damage_named(path):
        about: dict[str, Any] = json.loads(text)
        version = about["version"]
    if version != VERSION:
        raise ValueError(
            f"`path`={str(path)!r} is expected to have version {VERSION} of the layout, but it has "
            f"{version!r}; update pruneflow"
        )
    return about


def _index(file: Any, about: dict[str, Any], path: str | Path) -> dict[str, Entry]:
    with _damage_named(path):
        listed = json.loads(_part(file, about, "index"))
        objects = isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed)
        expect(objects, "its index is no list of tensors")
        kind, shape = file.get_slice("data").get_dtype(), file.get_slice("data").get_shape()
        expect(kind == "U8" and len(shape) == 1, "'data' is another kind of tensor")
        return _checked([Entry(**entry) for entry in listed], shape[0])


def _part(file: Any, about: dict[str, Any], name: str) -> str:
    """A text of the file."""
    expect(file.get_slice(name).get_dtype() == "U8", f"{name!r} is another kind of tensor")
    frame, size = file.get_tensor(name).tobytes(), about[f"{name}_bytes"]
    expect(zlib.crc32(frame) == about[f"{name}_crc32"], f"the checksum of its {name} differs")
    fits = size <= min(_MOST_INDEX_BYTES, len(frame) * _MOST_TIMES_LONGER)
    expect(fits, f"its {name} is too long")
    return decompress(frame, size).decode()


def _checked(listed: list[Entry], size: int) -> dict[str, Entry]:
    """The entries by name, if they take `size` bytes one after the other, and each byte once.

    So what is read takes no more memory than those bytes can hold. Tensors that are all zeros are
    no bytes, and there is a bound of its own on what they promise.
    """
    entries: dict[str, Entry] = {}
    end = promised = 0
    for entry in listed:
        entry.check()
        expect(entry.name not in entries, f"it has two tensors of the name {entry.name!r}")
        if entry.same_as is None:
            expect(entry.start == end, f"{entry.name!r} does not begin where the one before ends")
            end += entry.stored
            promised += entry.bytes
        else:
            earlier = entries.get(entry.same_as) if isinstance(entry.same_as, str) else None
            same = replace(entry, name=entry.same_as, same_as=None) == earlier
            expect(same, f"{entry.name!r} is tied to {entry.same_as!r}, which is no such tensor")
        entries[entry.name] = entry
    expect(end <= size, "it ends before its tensors do")
    most = _MOST_ZEROS + size * _MOST_TIMES_LARGER
    expect(promised <= most, f"its tensors would take {promised} bytes")
    return entries
