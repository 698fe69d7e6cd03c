"""Pack a file of weights, unpack it, or list its contents."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from pruneflow.deploy.packed import inspect_packed, load_packed, save_packed
from pruneflow.errors import expect
from pruneflow.files import write_whole
from pruneflow.state_dicts import described, load_safetensors, save_safetensors, with_description


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; errors are printed as one line to stderr, with exit code 2.

    Args:
        arguments: Command-line arguments; None takes those of the process.

    Example:
        >>> from tempfile import mkdtemp
        >>> from safetensors.torch import save_file
        >>> folder = mkdtemp()
        >>> save_file({"weight": torch.eye(100)}, f"{folder}/model.safetensors")
        >>> main(["pack", f"{folder}/model.safetensors", f"{folder}/model.packed"])
    """
    parser = argparse.ArgumentParser("python -m pruneflow.deploy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="leave out the pruned weights")
    pack.add_argument("source", type=Path, help=".safetensors, .pt or .ckpt")
    pack.add_argument("target", type=Path, help="the packed file to write")
    pack.add_argument(
        "--values",
        choices=("same", "float16"),
        default="same",
        help="float16 rounds the survivors of pruned weights; default same",
    )
    unpack = commands.add_parser("unpack", help="restore the zeros")
    unpack.add_argument("source", type=Path, help="a packed file")
    unpack.add_argument("target", type=Path, help="the .safetensors to write")
    inspect = commands.add_parser("inspect", help="list the contents of a packed file")
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
    remedy = "check the path"
    expect(path.is_file(), "source", "be a file", repr(str(path)), remedy, error=FileNotFoundError)
    other = path.resolve() != target.resolve()
    remedy = "choose another path"
    expect(other, "target", "be another file than `source`", repr(str(target)), remedy)
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files can raise anything
        raise ValueError(
            f"`source` must hold a state_dict, got {str(path)!r}, which is damaged or holds other "
            f"objects, which are not unpickled ({str(error).partition(chr(10))[0]}); save "
            "model.state_dict()"
        ) from error
    got = f"a {type(loaded).__name__} in {str(path)!r}"
    remedy = "save model.state_dict()"
    expect(isinstance(loaded, Mapping), "source", "hold a state_dict", got, remedy)
    state_dict: Mapping[str, Tensor] = loaded.get("state_dict", loaded)
    return state_dict


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    suffixed = path.suffix == ".safetensors"
    remedy = "use that suffix, as only safetensors files are written"
    expect(suffixed, "target", "end in .safetensors", repr(str(path)), remedy)
    untied: dict[str, Tensor] = {}  # safetensors does not support tied tensors
    for name, tensor in tensors.items():
        tied = any(tensor is other for other in untied.values())
        untied[name] = tensor.clone() if tied else tensor
    with write_whole(path) as temporary:
        save_safetensors(with_description(untied, described(tensors)), temporary, {"format": "pt"})


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
    untied = [tensor for tensor in tensors if tensor.same_as is None]
    totals = (sum(getattr(t, key) for t in untied) for key in ("entries", "nonzeros", "bytes"))
    rows.append(("total", "", "", "", *_counts(*totals)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([*map(str.ljust, row[:4], widths), *map(str.rjust, row[4:], widths[4:])])
        for row in rows
    ]
    size = path.stat().st_size
    dense = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in untied)
    lines.append(f"{size:,} bytes, dense {dense:,}: {dense / size:.1f} times smaller")
    return lines


def _counts(entries: int, kept: int, stored: int) -> tuple[str, ...]:
    return f"{entries:,}", f"{kept:,}", f"{kept / entries:.2%}" if entries else "", f"{stored:,}"


if __name__ == "__main__":
    main()
