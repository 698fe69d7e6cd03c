"""Pack a file of weights, unpack it, or list what it holds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from pruneflow.deploy.packed import inspect_packed, load_packed, save_packed
from pruneflow.files import write_whole
from pruneflow.state_dicts import described, load_safetensors, save_safetensors, with_description


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an error is one line on stderr and exit code 2.

    Args:
        arguments: What follows `python -m pruneflow.deploy`; None takes those of the process.

    Example:
        >>> from tempfile import mkdtemp
        >>> from safetensors.torch import save_file
        >>> folder = mkdtemp()
        >>> save_file({"weight": torch.eye(100)}, f"{folder}/model.safetensors")
        >>> main(["pack", f"{folder}/model.safetensors", f"{folder}/model.packed"])
    """
    parser = argparse.ArgumentParser("python -m pruneflow.deploy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="leave the pruned weights out")
    pack.add_argument("source", type=Path, help=".safetensors, .pt or .ckpt")
    pack.add_argument("target", type=Path, help="the packed file to write")
    pack.add_argument(
        "--values",
        choices=("same", "float16"),
        default="same",
        help="float16 rounds the survivors of pruned weights; default same",
    )
    unpack = commands.add_parser("unpack", help="put the zeros back in place")
    unpack.add_argument("source", type=Path, help="a packed file")
    unpack.add_argument("target", type=Path, help="the .safetensors to write")
    inspect = commands.add_parser("inspect", help="list what a packed file holds")
    inspect.add_argument("source", type=Path, help="a packed file")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "inspect":
            print("\n".join(_lines(chosen.source)))
        elif chosen.command == "unpack":
            _write(load_packed(chosen.source), chosen.target)
        else:
            state_dict = _read(chosen.source, chosen.target)
            save_packed(state_dict, chosen.target, values=chosen.values)
            print(_lines(chosen.target)[-1])
    except (OSError, ValueError, SafetensorError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def _read(path: Path, target: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"`source`={str(path)!r} is expected to be a file; check the path")
    if path.resolve() == target.resolve():
        raise ValueError(f"`target`={str(target)!r} is expected to be another file than `source`")
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # there are as many kinds as there are ways to be damaged
        raise ValueError(
            f"`source`={str(path)!r} is expected to hold a state_dict, but it is damaged or holds "
            f"other objects, which are not unpickled ({str(error).partition(chr(10))[0]}); save "
            "model.state_dict()"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(
            f"`source`={str(path)!r} is expected to hold a state_dict, but it holds a "
            f"{type(loaded).__name__}; save model.state_dict()"
        )
    state_dict: Mapping[str, Tensor] = loaded.get("state_dict", loaded)
    return state_dict


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"`target`={str(path)!r} is expected to end in .safetensors, which is what is written; "
            "give it that suffix"
        )
    apart: dict[str, Tensor] = {}  # safetensors knows no tied tensors
    for name, tensor in tensors.items():
        tied = any(tensor is other for other in apart.values())
        apart[name] = tensor.clone() if tied else tensor
    with write_whole(path) as temporary:
        save_safetensors(with_description(apart, described(tensors)), temporary, {"format": "pt"})


def _lines(path: Path) -> list[str]:
    tensors = inspect_packed(path)
    rows: list[tuple[str, ...]] = [
        ("tensor", "shape", "dtype", "values", "entries", "kept", "density", "bytes")
    ]
    rows += [
        (
            tensor.name if tensor.same_as is None else f"{tensor.name} = {tensor.same_as}",
            "x".join(map(str, tensor.shape)),
            str(tensor.dtype).removeprefix("torch."),
            str(tensor.values).removeprefix("torch."),
            *_counts(tensor.entries, tensor.nonzeros, tensor.bytes),
        )
        for tensor in tensors
    ]
    own = [tensor for tensor in tensors if tensor.same_as is None]
    totals = (sum(t.entries for t in own), sum(t.nonzeros for t in own), sum(t.bytes for t in own))
    rows.append(("total", "", "", "", *_counts(*totals)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([*map(str.ljust, row[:4], widths), *map(str.rjust, row[4:], widths[4:])])
        for row in rows
    ]
    size = path.stat().st_size
    dense = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in own)
    lines.append(f"{size:,} bytes, dense {dense:,}: {dense / size:.1f} times smaller")
    return lines


def _counts(entries: int, kept: int, stored: int) -> tuple[str, ...]:
    return f"{entries:,}", f"{kept:,}", f"{kept / entries:.2%}" if entries else "", f"{stored:,}"


if __name__ == "__main__":
    main()
