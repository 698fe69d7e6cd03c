"""Encode tensors as the streams of a packed file, and decode them; see `packed` for the format."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[Any]  # unsigned integers, 1-D

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
# Gaps and values look random: short matches cost zstd more than they save, so these settings mostly
# leave entropy coding. benchmarks/packed.py compares them with zstd's levels.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)
_MOST_TIMES_SMALLER = 2**15  # zstd spends at least 4 bytes on a block of 128 KiB
_MOST_DIMENSIONS = 64  # of a tensor
_HALVED = {"float32": np.float32, "float64": np.float64}


@dataclass(frozen=True)
class Entry:
    """The entry of one tensor in the index of a packed file, with the same keys."""

    name: str
    dtype: str
    shape: Sequence[int]
    kept: int
    positions: str
    values: str
    start: int
    streams: Sequence[tuple[int, int]]
    crc32: int
    same_as: str | None = None

    @property
    def stored(self) -> int:
        """Total bytes stored in its streams."""
        return sum(stored for _, stored in self.streams)

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def words(self) -> int:
        """Number of words in the tensor."""
        return self.bytes // min(8, DTYPES[self.dtype].itemsize)

    def check(self) -> None:
        """Check that `encode` could have created the entry, before allocating memory for it.

        Raises:
            ValueError: With the problem.
        """
        name = self.name
        # JSON can hold lone surrogates, which cannot be encoded again.
        text = isinstance(name, str) and name == name.encode(errors="ignore").decode()
        check(text, f"the name {name!r} is not text")
        shaped = _are_counts(self.shape) and len(self.shape) <= _MOST_DIMENSIONS
        check(shaped, f"the shape of {name!r} is not a list of sizes")
        counts = _are_counts([self.kept, self.start, self.crc32])
        check(counts, f"the counts of {name!r} are not integers")
        pairs = isinstance(self.streams, list) and all(map(_are_counts, self.streams))
        pairs = pairs and all(len(pair) == 2 for pair in self.streams)
        check(pairs, f"the streams of {name!r} are not pairs of lengths")
        for dtype in (self.dtype, self.values):
            known = isinstance(dtype, str) and dtype in DTYPES
            check(known, f"{dtype!r} is not a dtype of this version of PyTorch")
        halved = self.positions != "all" and self.dtype in _HALVED and self.values == "float16"
        check(halved or self.values == self.dtype, f"the values of {name!r} have another dtype")
        for size, stored in self.streams:
            fits = stored <= size <= stored * _MOST_TIMES_SMALLER
            check(fits, "a stream is too short for its size")
        sizes, planes = [size for size, _ in self.streams], min(8, DTYPES[self.values].itemsize)
        check(
            self.positions in ("all", "gaps", "mask"),
            f"{self.positions!r} is not a kind of positions",
        )
        where = [] if self.positions == "all" else sizes[:1]
        check(len(sizes) == len(where) + planes, "a stream is missing")
        least, most = {
            "all": (0, 0),
            "mask": (-(-self.words // 8),) * 2,
            "gaps": (self.kept, self.kept + self.words // 255),
        }[self.positions]
        same = self.kept == self.words if self.positions == "all" else self.kept <= self.words
        same = same and all(size == self.kept for size in sizes[len(where) :])
        check(same and least <= sum(where) <= most, "the numbers of values and positions differ")


def encode(name: str, tensor: Tensor, start: int, *, halve: bool) -> tuple[Entry, bytes]:
    """Encode a tensor as its entry and the bytes of its streams.

    Args:
        name: Name of the tensor.
        tensor: A tensor of any dtype, shape and strides.
        start: Offset of its streams in the file.
        halve: Store the values of a pruned weight as float16 if it can represent them.

    Example:
        >>> tensor = torch.tensor([[0, 0, 7], [0, 9, 0]], dtype=torch.uint8)
        >>> entry, stored = encode("name", tensor, 0, halve=False)
        >>> entry.kept, entry.positions, entry.streams, list(stored)
        (2, 'mask', [(1, 1), (2, 2)], [20, 14, 18])
    """
    words = _words(tensor)
    dtype = values = str(tensor.dtype).removeprefix("torch.")
    positions, streams = "all", []
    nonzero = words != 0
    if not nonzero.all():
        kept = np.flatnonzero(nonzero)
        mask = _stream(np.packbits(nonzero, bitorder="little"))
        gaps = _stream(_gaps(kept))
        positions, stream = min(("mask", mask), ("gaps", gaps), key=lambda way: len(way[1][1]))
        streams.append(stream)
        words = words[kept]
        prunable = tensor.dim() > 1 and dtype in _HALVED
        halved = _halved(words, dtype) if halve and prunable else None
        if halved is not None:
            words, values = halved, "float16"
    streams += map(_stream, _planes(words))
    stored = b"".join(stored for _, stored in streams)
    lengths = [(size, len(stored)) for size, stored in streams]
    crc32 = zlib.crc32(stored)
    shape = list(tensor.shape)
    entry = Entry(name, dtype, shape, len(words), positions, values, start, lengths, crc32)
    return entry, stored


def decode(entry: Entry, stored: bytes) -> Tensor:
    """Decode the bytes of a tensor's streams.

    Raises:
        Exception: Of any type, if the bytes do not match the entry, or it is inconsistent.
    """
    dtype, values, count = DTYPES[entry.dtype], DTYPES[entry.values], entry.words
    width = min(8, dtype.itemsize)
    ends = list(accumulate((length for _, length in entry.streams), initial=0))
    check(zlib.crc32(stored) == entry.crc32, f"the checksum of {entry.name!r} does not match")
    streams = [
        _unpacked(stored[start:end], size)
        for (size, _), (start, end) in zip(entry.streams, pairwise(ends), strict=True)
    ]
    where: slice | Words = slice(None)
    expected = count
    if entry.positions != "all":
        where = {"mask": _from_mask, "gaps": _from_gaps}[entry.positions](streams.pop(0))
        expected = len(where)
    kept = _joined(streams)
    check(len(kept) == entry.kept == expected, "the numbers of values and positions differ")
    if values != dtype:
        kept = kept.view(np.float16).astype(_HALVED[entry.dtype]).view(f"u{width}")
    words = np.zeros(count, f"u{width}")  # untouched pages take no memory
    words[where] = kept
    return torch.from_numpy(words.view(np.uint8)).view(dtype).reshape(tuple(entry.shape))


def decompress(frame: bytes, size: int) -> bytes:
    """Decompress a zstd frame of `size` bytes.

    Raises:
        ValueError: If it declares another size, or more than its length allows, so that damaged
            files do not lead to large allocations.
        zstandard.ZstdError: If it is damaged.
    """
    check(zstandard.frame_content_size(frame) == size, "a stream has another size")
    check(size <= len(frame) * _MOST_TIMES_SMALLER, "a stream is too short for its size")
    data: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    return data


def check(condition: bool, problem: str) -> None:
    """Raise a ValueError with the problem, unless a condition on a packed file holds."""
    if not condition:
        raise ValueError(problem)


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _words(tensor: Tensor) -> Words:
    """The bits of a tensor, row-major."""
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    data: Words = plain.reshape(-1).view(torch.uint8).numpy()
    return data.view(f"u{min(8, tensor.itemsize)}")


def _stream(array: Words) -> tuple[int, bytes]:
    data = array.tobytes()
    compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    return len(data), min(data, compressor.compress(data), key=len)


def _unpacked(stored: bytes, size: int) -> Words:
    return np.frombuffer(stored if len(stored) == size else decompress(stored, size), np.uint8)


def _gaps(positions: Words) -> Words:
    """Number of zeros before each position: a byte 255 for every 255, then the rest."""
    full, rest = np.divmod(np.diff(positions, prepend=-1) - 1, 255)
    gaps = np.full(len(rest) + full.sum(), 255, np.uint8)
    gaps[np.cumsum(full + 1) - 1] = rest
    return gaps


def _from_gaps(gaps: Words) -> Words:
    survivors = gaps < 255
    ends: Words = np.cumsum(gaps + survivors.astype(np.int64))
    return ends[survivors] - 1


def _from_mask(mask: Words) -> Words:
    return np.flatnonzero(np.unpackbits(mask, bitorder="little"))


def _planes(words: Words) -> list[Words]:
    """One array for each byte of the words rotated left by one bit, the lowest first."""
    rotated = (words << 1) | (words >> (8 * words.itemsize - 1))
    return [(rotated >> (8 * byte)).astype(np.uint8) for byte in range(words.itemsize)]


def _joined(planes: Sequence[Words]) -> Words:
    *lower, highest = planes
    rotated: Words = highest.astype(f"u{len(planes)}")
    for plane in reversed(lower):
        rotated <<= 8
        rotated |= plane
    return (rotated >> 1) | (rotated << (8 * rotated.itemsize - 1))


def _halved(words: Words, dtype: str) -> Words | None:
    """The words of the values in float16; None if it cannot represent one of them."""
    values = words.view(_HALVED[dtype])
    with np.errstate(all="ignore"):
        halves = values.astype(np.float16)
    representable = np.isfinite(halves) & ((halves == 0) == (values == 0))
    return halves.view(np.uint16) if representable.all() else None
