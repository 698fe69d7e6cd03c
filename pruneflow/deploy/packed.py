"""The packed file format: a `state_dict` without its zeros.

Entries whose bits are all zero are left out; everything else, including -0.0 and NaN, is restored
bit for bit. A packed file is a safetensors file with

- metadata with one key, `pruneflow.packed`: JSON with `version` (1), `index_bytes` before
  compression, `index_crc32` and, if given, `metadata` of the caller;
- `index`, uint8: a zstd frame of JSON, a list with one object per tensor, in order;
- `data`, uint8: the concatenated streams of all tensors;
- `modules`, uint8, if the `state_dict` has `_metadata`, the versions of its modules: a zstd frame
  of JSON. The metadata of the file then also has `modules_bytes` and `modules_crc32`.

An entry of the index has

| key | value |
|---|---|
| `name`, `dtype`, `shape` | as in the `state_dict` |
| `kept` | number of words that are not zero |
| `positions` | encoding of their positions: `all`, `gaps` or `mask` |
| `values` | dtype of the stored values: that of the tensor, or `float16` |
| `start` | offset of its streams in `data` |
| `streams` | `[bytes, stored bytes]` of each stream; a zstd frame if fewer bytes are stored |
| `crc32` | checksum of its stored bytes |
| `same_as` | null, or the earlier tensor it is tied to, with which it shares its streams |

A tensor is a row-major sequence of unsigned words of its item size, or of 8 bytes if that is
larger. Its streams are

1. the positions, unless `all` words are kept. `gaps`: a byte below 255 is that many zeros followed
   by a kept word, 255 is 255 zeros. `mask`: word i is kept if bit i % 8 of byte i // 8 is set. The
   shorter of the two is used.
2. the values, rotated left by one bit to move the sign last: one stream for each of their bytes,
   the lowest first. This separates the exponents, which compress well.
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

from pruneflow.deploy.coding import DTYPES, Entry, check, decode, decompress, encode
from pruneflow.errors import expect
from pruneflow.files import write_whole
from pruneflow.state_dicts import described, with_description

FORMAT, VERSION = "pruneflow.packed", 1

_MOST_INDEX_BYTES = 100_000_000  # the limit of safetensors for its header
_MOST_TIMES_LONGER = 1000  # than its frame: entries have different checksums
# Tensors take at most this many bytes plus this many times the size of the file.
_MOST_ZEROS, _MOST_TIMES_LARGER = 2**30, 2**15


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a packed file.

    Args:
        name: Its key in the `state_dict`.
        shape: Its shape.
        dtype: Its dtype once loaded.
        nonzeros: Number of entries kept.
        bytes: Its size in the file; 0 if it is tied to an earlier tensor.
        values: The dtype of its values in the file.
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
        """Number of entries; real and imaginary parts count separately for complex128."""
        return math.prod(self.shape) * max(1, self.dtype.itemsize // 8)


def save_packed(
    state_dict: Mapping[str, Tensor],
    path: str | Path,
    *,
    values: Literal["same", "float16"] = "same",
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a `state_dict` without its pruned weights, atomically.

    -0.0 is stored like a nonzero value, since everything is restored bit for bit. Weights pruned by
    `torch.nn.utils.prune` are full of -0.0; `pruneflow.fold` turns them into plain zeros.

    Args:
        state_dict: Name -> tensor, on any device; tied tensors are written once.
        path: The file.
        values: `"same"` is lossless. `"float16"` rounds the remaining values of pruned float32 and
            float64 tensors of two or more dimensions; they are loaded in their original dtype. All
            other tensors, and those with a value that would become infinite, NaN or zero, are
            lossless; `inspect_packed` shows which.
        metadata: Metadata to store in the file, under its key `metadata`.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: If `values` is neither of these, or `state_dict` does not hold plain tensors.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "model.packed"
        >>> weight = torch.zeros(1000, 1000).index_fill_(0, torch.tensor(7), 0.5)
        >>> save_packed({"weight": weight}, path) < 1000
        True
        >>> torch.equal(load_packed(path)["weight"], weight)
        True
    """
    remedy = "'same' is lossless"
    expect(values in ("same", "float16"), "values", "be 'same' or 'float16'", repr(values), remedy)
    tensors = {name: _plain(name, tensor) for name, tensor in state_dict.items()}
    entries: list[Entry] = []
    blobs: list[bytes] = []
    start = 0
    first: dict[object, Entry] = {}
    for name, tensor in tensors.items():
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and memory in first:
            entries.append(replace(first[memory], name=name, same_as=first[memory].name))
            continue
        entry, blob = encode(name, tensor, start, halve=values == "float16")
        first[memory] = entry
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
        names: Names of the tensors to read and check; None for all.

    Returns:
        Name -> contiguous tensor on the CPU, in the order of the saved `state_dict` and with its
        `_metadata`; tied tensors are the same object.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If `names` is a string.
        ValueError: If it is truncated, damaged, another kind of file or of another version, or does
            not have one of the names.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "model.packed"
        >>> _ = save_packed(nn.Linear(2, 1).state_dict(), path)
        >>> list(load_packed(path)), list(load_packed(path, names=["bias"]))
        (['weight', 'bias'], ['bias'])
    """
    listed, remedy = not isinstance(names, str), "put it in brackets"
    expect(listed, "names", "be a list of names", repr(names), remedy, error=TypeError)
    with _opened(path) as file:
        about = _header(file, path)
        entries = _index(file, about, path)
        for name in names or ():
            if name not in entries:
                near = difflib.get_close_matches(name, entries, n=3, cutoff=0.4)
                raise ValueError(
                    f"`names` must be tensors in {str(path)!r}, got {name!r}; near names: "
                    f"{', '.join(near or list(entries)[:3])}"
                )
        tensors: dict[str, Tensor] = {}
        first: dict[str, Tensor] = {}
        with _checking(path):
            data = file.get_slice("data")
            for name, entry in entries.items():
                if names is None or name in names:
                    source = entry.same_as or name
                    if source not in first:
                        end = entry.start + entry.stored
                        stored = data[entry.start : end].tobytes() if entry.stored else b""
                        first[source] = decode(entry, stored)
                    tensors[name] = first[source]
            check(("modules" in file.keys()) == ("modules_crc32" in about), "a part is missing")  # noqa: SIM118
            modules = _part(file, about, "modules") if "modules_crc32" in about else None
            return with_description(tensors, modules)


def inspect_packed(path: str | Path) -> list[PackedTensor]:
    """List the tensors of a packed file; only its index is read and checked.

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
            for entry in _index(file, _header(file, path), path).values()
        ]


def _plain(name: str, tensor: Tensor) -> Tensor:
    kind = type(tensor).__name__
    if isinstance(tensor, Tensor):
        kind += f" of {tensor.dtype} and {tensor.layout} on {tensor.device}"
    expect(
        isinstance(name, str)
        and type(tensor) in (Tensor, nn.Parameter)  # subclasses may be sharded, quantized or fake
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized,
        "state_dict",
        "map names to plain dense tensors",
        f"{name!r}: a {kind}",
        "pass checkpoint['state_dict'] instead of a checkpoint, leave out values that are not "
        "tensors, and convert others with `to_dense()`, `dequantize()` or `full_tensor()`",
    )
    return tensor.detach()


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    is_file, remedy = Path(path).is_file(), "check the path"
    expect(is_file, "path", "be a file", repr(str(path)), remedy, error=FileNotFoundError)
    with _checking(path):
        file = safe_open(path, framework="numpy")
    with file:
        yield file


@contextmanager
def _checking(path: str | Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged files can raise anything
        raise ValueError(
            f"`path` must be a packed file, got {str(path)!r}, which is truncated, damaged or "
            f"another kind of file ({error}); copy it again, or pack the model again"
        ) from error


def _header(file: Any, path: str | Path) -> dict[str, Any]:
    text = (file.metadata() or {}).get(FORMAT)
    if text is None:
        raise ValueError(
            f"`path` must be a packed file, got {str(path)!r}, a plain safetensors file; read it "
            "with safetensors.torch.load_file, or pack it first"
        )
    with _checking(path):
        about: dict[str, Any] = json.loads(text)
        version = about["version"]
    got = f"version {version!r} in {str(path)!r}"
    expect(version == VERSION, "path", f"have format version {VERSION}", got, "update pruneflow")
    return about


def _index(file: Any, about: dict[str, Any], path: str | Path) -> dict[str, Entry]:
    with _checking(path):
        listed = json.loads(_part(file, about, "index"))
        objects = isinstance(listed, list) and all(isinstance(entry, dict) for entry in listed)
        check(objects, "its index is not a list of tensors")
        kind, shape = file.get_slice("data").get_dtype(), file.get_slice("data").get_shape()
        check(kind == "U8" and len(shape) == 1, "'data' is another kind of tensor")
        return _checked([Entry(**entry) for entry in listed], shape[0])


def _part(file: Any, about: dict[str, Any], name: str) -> str:
    """Read `index` or `modules`."""
    check(file.get_slice(name).get_dtype() == "U8", f"{name!r} is another kind of tensor")
    frame, size = file.get_tensor(name).tobytes(), about[f"{name}_bytes"]
    check(zlib.crc32(frame) == about[f"{name}_crc32"], f"the checksum of its {name} does not match")
    fits = size <= min(_MOST_INDEX_BYTES, len(frame) * _MOST_TIMES_LONGER)
    check(fits, f"its {name} is too long")
    return decompress(frame, size).decode()


def _checked(listed: list[Entry], size: int) -> dict[str, Entry]:
    """Check entries and return them by name: their streams are consecutive, in `size` bytes.

    This bounds the memory for reading a file. Zeros take no bytes, so there is another limit on the
    total size of the tensors.
    """
    entries: dict[str, Entry] = {}
    end = total = 0
    for entry in listed:
        entry.check()
        check(entry.name not in entries, f"it has two tensors named {entry.name!r}")
        if entry.same_as is None:
            check(entry.start == end, f"{entry.name!r} does not start where the previous one ends")
            end += entry.stored
            total += entry.bytes
        else:
            earlier = entries.get(entry.same_as) if isinstance(entry.same_as, str) else None
            same = replace(entry, name=entry.same_as, same_as=None) == earlier
            check(same, f"{entry.name!r} is tied to {entry.same_as!r}, which does not match")
        entries[entry.name] = entry
    check(end <= size, "it ends before its tensors do")
    most = _MOST_ZEROS + size * _MOST_TIMES_LARGER
    check(total <= most, f"its tensors would take {total} bytes")
    return entries
