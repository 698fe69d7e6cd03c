"""Peak memory of models, each measured in its own process.

    python -P pruneflow/deploy/peak.py THREADS MODEL BATCH [MODEL BATCH]...

imports what the models need, once, and forks for each of them. The child loads its model, runs it
twice on its batch, and reports its peak memory while running, in bytes, minus the memory in use
before loading the model, with the batch in memory and PyTorch warmed up by a small convolution.
This counts weights, activations, outputs and buffers of the runtime, but neither pages of libraries
and other files nor memory used temporarily for loading. Results repeat within about 2 MB. Linux
only.

It is run as a script to import no more than the models need, and with -P because there is another
`onnx` in the same folder.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from pruneflow.deploy.extras import require
from pruneflow.deploy.onnx import OnnxModel


def peak_bytes(models: Sequence[tuple[Path, Path]], threads: int) -> list[int | str]:
    """Measure the peak memory of running models, each in its own process.

    Args:
        models: Two files for each: a module saved by `torch.save`, which is unpickled, a program
            saved by `torch.export.save` (.pt2), or an ONNX file (.onnx); and a batch saved by
            `torch.save`.
        threads: Number of threads.

    Returns:
        The peak of each in bytes, as defined above, or why it could not be measured, such as a
        class that cannot be imported, or no /proc.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> torch.save(nn.ReLU(), folder / "model.pt")
        >>> torch.save(torch.ones(1000, 10_000), folder / "batch.pt")
        >>> (peak,) = peak_bytes([(folder / "model.pt", folder / "batch.pt")], threads=1)
        >>> 39e6 < peak < 45e6
        True
    """
    command = [sys.executable, "-P", __file__, str(threads), *map(str, chain(*models))]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # the path of this process
        # Return freed tensors to the system: otherwise the C library keeps a varying part of them.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return [lines[-1]] * len(models)
    peaks: list[int | str] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def _measure_all(models: Sequence[tuple[Path, Path]], threads: int) -> list[int | str]:
    torch.set_num_threads(1)  # a thread pool would not survive the fork
    for file, _ in models:
        with suppress(Exception):  # the child reports it
            _import_for(file)
    return [_fork(file, batch, threads) for file, batch in models]


def _import_for(file: Path) -> None:
    """Import what loading a model needs, except ONNX Runtime, which starts a thread."""
    if file.suffix == ".pt2":
        torch.export.load(file)
    elif file.suffix != ".onnx":
        torch.load(file, map_location="meta", weights_only=False)


def _fork(file: Path, batch: Path, threads: int) -> int | str:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            found: int | str = _measure(file, batch, threads)
        except BaseException as error:  # the child must not continue as the parent
            found = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        result = pipe.read()
    _, status = os.waitpid(child, 0)
    ended = f"its process ended with exit code {os.waitstatus_to_exitcode(status)}"
    peak: int | str = json.loads(result) if result else ended
    return peak


def _measure(file: Path, batch_file: Path, threads: int) -> int:
    torch.set_num_threads(threads)
    batch = torch.load(batch_file, weights_only=True)
    if file.suffix == ".onnx":
        require("onnxruntime")
    warm = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()).eval()
    with torch.inference_mode():
        warm(torch.ones(8, 3, 32, 32))
        _give_back()
        before = _resident("VmRSS") - _resident("RssFile")
        run = _load(file, threads)
        _give_back()
        # If the peak cannot be reset, memory used for loading counts as well.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        for _ in range(2):
            run(batch)
    return _resident("VmHWM") - _resident("RssFile") - before


def _load(file: Path, threads: int) -> Callable[[Tensor], Tensor]:
    if file.suffix == ".onnx":
        return OnnxModel(file, threads)
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    module: nn.Module = torch.load(file, weights_only=False)
    return module


def _give_back() -> None:
    """Return free memory to the system: it would be reused without being counted."""
    gc.collect()
    with suppress(AttributeError):  # not in every C library
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])


if __name__ == "__main__":
    _, number, *files = map(Path, sys.argv)
    pairs = list(zip(files[::2], files[1::2], strict=True))
    print(json.dumps(_measure_all(pairs, int(str(number)))))
