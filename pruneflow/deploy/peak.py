"""Peak memory of running a model, measured in a process of its own.

    python -P pruneflow/deploy/peak.py FILE BATCH THREADS

loads a model, runs it twice on a batch, and prints the peak of the process's resident memory while
it ran, in bytes, less what was resident before it was loaded: with everything imported, the batch
there, and the threads and kernels of PyTorch warmed up by a small convolution. So weights,
activations, outputs and the runtime's own buffers count; the libraries do not, nor does what
loading took and gave back; figures repeat within 2 MB or so. Linux alone tells.

It is run as a script so that it imports no more than the model needs, and with -P, since beside it
lies another `onnx`.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn


def peak_bytes(file: Path, batch: Path, threads: int) -> int:
    """Measure the peak memory of running a model in a fresh process.

    Args:
        file: A module that `torch.save` wrote, which is unpickled, or a program that
            `torch.export.save` wrote (.pt2), or an ONNX file (.onnx).
        batch: A tensor that `torch.save` wrote.
        threads: Number of threads to run with.

    Returns:
        The peak in bytes, as the text above has it.

    Raises:
        RuntimeError: If that process fails, with the last line it said: where the class of the
            module cannot be imported, or there is no /proc to read.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> torch.save(nn.ReLU(), folder / "model.pt")
        >>> torch.save(torch.ones(1000, 10_000), folder / "batch.pt")
        >>> 35e6 < peak_bytes(folder / "model.pt", folder / "batch.pt", threads=1) < 50e6
        True
    """
    command = [sys.executable, "-P", __file__, str(file), str(batch), str(threads)]
    # What this process imports, that one finds too.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(said[-1])
    return int(done.stdout.split()[-1])


def _measure(file: Path, batch: Tensor, threads: int) -> int:
    torch.set_num_threads(threads)
    if file.suffix == ".onnx":
        load = _onnx(file, threads)
    elif file.suffix == ".pt2":
        load = _program(file)
    else:
        load = _module(file)
    warm = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()).eval()
    with torch.inference_mode():
        warm(torch.ones(8, 3, 32, 32))
        before = _resident("VmRSS")
        run = load()
        # Where the peak cannot be reset, what loading took counts as well.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        for _ in range(2):
            run(batch)
    return _resident("VmHWM") - before


def _module(file: Path) -> Callable[[], Callable[[Tensor], Tensor]]:
    torch.load(file, map_location="meta", weights_only=False)  # imports what its classes need
    return lambda: torch.load(file, weights_only=False)


def _program(file: Path) -> Callable[[], Callable[[Tensor], Tensor]]:
    torch.export.load(file)  # imports what exporting needs
    gc.collect()
    return lambda: torch.export.load(file).module()


def _onnx(file: Path, threads: int) -> Callable[[], Callable[[Tensor], Tensor]]:
    from pruneflow.deploy.extras import require  # noqa: PLC0415  for no other form
    from pruneflow.deploy.onnx import OnnxModel  # noqa: PLC0415

    require("onnxruntime")
    return lambda: OnnxModel(file, threads)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])


if __name__ == "__main__":
    _, model_file, batch_file, number = sys.argv
    print(_measure(Path(model_file), torch.load(batch_file, weights_only=True), int(number)))
