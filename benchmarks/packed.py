"""Size and speed of the packed file, beside what else the same weights can be written to.

    python benchmarks/packed.py                            # ResNet-18, pruned as training prunes it
    python benchmarks/packed.py --weights model.safetensors
    python benchmarks/packed.py --levels                   # the packed file at each level of zstd

All ways write the same tensors whole, with an fsync, and read them back into memory; on one
thread; they take turns, and seconds are medians over the turns. MB/s is of the dense bytes.
"""

from __future__ import annotations

import argparse
import functools
import io
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import zstandard
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor
from torchvision.models import resnet18

from pruneflow.deploy import coding
from pruneflow.deploy.packed import load_packed, save_packed
from pruneflow.files import write_whole

State = dict[str, Tensor]
Way = tuple[Callable[[State, Path], object], Callable[[Path], object]]

# Density by the name's beginning, of a ResNet-18 of which 98 % were pruned globally on CIFAR-10.
DENSITIES = {
    "conv1": 0.7,
    "layer1": 0.39,
    "layer2": 0.2,
    "layer3.0": 0.05,
    "layer3.1": 0.006,
    "layer4": 0.0002,
    "fc": 0.3,
}


def pruned_resnet18() -> State:
    """The largest of normally distributed weights, at the densities that training leaves."""
    torch.manual_seed(0)
    state: State = resnet18(num_classes=10).state_dict()
    for name, tensor in state.items():
        density = next((d for start, d in DENSITIES.items() if name.startswith(start)), 1.0)
        if tensor.dim() > 1:
            threshold = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - density / 2))
            tensor.normal_(std=0.02)
            tensor[tensor.abs() < 0.02 * threshold] = 0
        elif tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    return state


def torch_save(state: State, path: Path) -> None:
    with write_whole(path) as temporary:
        torch.save(state, temporary)


def safetensors_save(state: State, path: Path) -> None:
    with write_whole(path) as temporary:
        save_file(state, temporary)


def dense_zstd(level: int) -> Way:
    def write(state: State, path: Path) -> None:
        with write_whole(path) as temporary:
            temporary.write_bytes(zstandard.ZstdCompressor(level).compress(save(state)))

    return write, lambda path: load(zstandard.decompress(path.read_bytes()))


def gaps_and_values(level: int) -> Way:
    """Gaps as bytes and whole values through zstd, in the file of `torch.save`."""

    def write(state: State, path: Path) -> None:
        parts = {}
        for name, tensor in state.items():
            flat = tensor.reshape(-1)
            kept = flat.nonzero()[:, 0]
            gaps = torch.from_numpy(coding._gaps(kept.numpy()))
            parts[name] = (tensor.shape, gaps, flat[kept]) if len(kept) < len(flat) else tensor
        buffer = io.BytesIO()
        torch.save(parts, buffer)
        with write_whole(path) as temporary:
            temporary.write_bytes(zstandard.ZstdCompressor(level).compress(buffer.getvalue()))

    def read(path: Path) -> State:
        buffer = io.BytesIO(zstandard.decompress(path.read_bytes()))
        state = {}
        for name, part in torch.load(buffer).items():
            if isinstance(part, Tensor):
                state[name] = part
            else:
                shape, gaps, values = part
                state[name] = torch.zeros(shape, dtype=values.dtype)
                state[name].view(-1)[torch.from_numpy(coding._from_gaps(gaps.numpy()))] = values
        return state

    return write, read


def packed_at(level: int) -> Way:
    def write(state: State, path: Path) -> None:
        usual = coding._PARAMETERS
        coding._PARAMETERS = zstandard.ZstdCompressionParameters.from_level(level)
        save_packed(state, path)
        coding._PARAMETERS = usual

    return write, load_packed


WAYS: dict[str, Way] = {
    "torch.save": (torch_save, torch.load),
    "safetensors": (safetensors_save, load_file),
    "safetensors, zstd 3": dense_zstd(3),
    "safetensors, zstd 19": dense_zstd(19),
    "byte gaps, values, zstd 3": gaps_and_values(3),
    "byte gaps, values, zstd 19": gaps_and_values(19),
    "packed": (save_packed, load_packed),
    "packed, float16": (functools.partial(save_packed, values="float16"), load_packed),
}


def entropy_floor(state: State) -> float:
    """Bytes of the positions at each tensor's density, and of whole values."""
    floor = 0.0
    for tensor in state.values():
        kept, count = int(tensor.count_nonzero()), tensor.numel()
        floor += kept * tensor.itemsize
        for part in (kept, count - kept):
            if part:
                floor -= part * math.log2(part / count) / 8
    return floor


def measured(state: State, ways: dict[str, Way], repeats: int) -> None:
    dense = sum(tensor.nbytes for tensor in state.values())
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    sizes = {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        for _ in range(repeats):
            for name, (write, read) in ways.items():
                start = time.perf_counter()
                write(state, path)
                written = time.perf_counter()
                back = read(path)
                for tensor in back.values():
                    tensor.reshape(-1)[::512].sum()  # mapped pages are read when they are used
                seconds[name].append((written - start, time.perf_counter() - written))
                sizes[name] = path.stat().st_size
                exact = all(torch.equal(back[key], tensor) for key, tensor in state.items())
                if not exact and "float16" not in name:
                    raise RuntimeError(f"{name} did not give the tensors back")
    print(f"dense {dense:,} bytes, floor of positions and whole values {entropy_floor(state):,.0f}")
    print(f"{'':28}{'bytes':>12}{'dense /':>9}{'write s':>9}{'MB/s':>7}{'read s':>9}{'MB/s':>7}")
    for name, times in seconds.items():
        write_s, read_s = (statistics.median(column) for column in zip(*times, strict=True))
        speeds = (
            f"{write_s:9.3f}{dense / write_s / 1e6:7.0f}{read_s:9.3f}{dense / read_s / 1e6:7.0f}"
        )
        print(f"{name:28}{sizes[name]:12,}{dense / sizes[name]:9.1f}{speeds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", help="a .safetensors file; else a ResNet-18 made for this")
    parser.add_argument("--repeats", type=int, default=5, help="of each way, in turn; default 5")
    parser.add_argument("--levels", action="store_true", help="the packed file at levels of zstd")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    state = load_file(arguments.weights) if arguments.weights else pruned_resnet18()
    levels = {f"packed, zstd {level}": packed_at(level) for level in (-1, 1, 3, 9, 19)}
    ways = {"packed": WAYS["packed"]} | levels if arguments.levels else WAYS
    measured(state, ways, arguments.repeats)


if __name__ == "__main__":
    main()
