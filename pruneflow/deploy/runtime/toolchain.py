"""Build the native code of the sparse runtime for the machine at hand, and keep what was built."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pruneflow.deploy.runtime.plans import STEP, Machine

KERNELS = Path(__file__).with_name("kernels")
# What the compiler may change of the arithmetic: only that the hardware raises no flags. Sums are
# not reordered and NaN and infinities are what they are in PyTorch.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_ALWAYS = ("-std=c++17", "-shared", "-fPIC", "-pthread", "-Wall", "-Wno-psabi")


class NoCompilerError(RuntimeError):
    """There is no C++ compiler that can build the kernels."""


def cache_folder() -> Path:
    """Where built kernels are kept: `PRUNEFLOW_CACHE`, or a folder of the user's cache."""
    if given := os.environ.get("PRUNEFLOW_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pruneflow"


def build(flags: Sequence[str] = FLAGS) -> Path:
    """The shared library of the kernels, built when the cache does not have it.

    It is kept by its source, the flags, the compiler's version and the processor.

    Args:
        flags: Of the optimizer and the machine.

    Raises:
        NoCompilerError: If there is none, or it fails; says what it said.
    """
    compiler = _compiler()
    sources = sorted(KERNELS.iterdir())
    version = _output([*compiler, "--version"])
    key = hashlib.sha256(
        "\0".join([*flags, version, _processor(), *(file.read_text() for file in sources)]).encode()
    ).hexdigest()[:20]
    library = cache_folder() / f"kernels-{key}.so"
    if not library.exists():
        inputs = [str(file) for file in sources if file.suffix == ".cpp"]
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            # Two processes may build at once, so each has a temporary file of its own.
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                built = Path(folder) / library.name
                _output([*compiler, *_ALWAYS, *flags, *inputs, "-o", str(built)])
                built.replace(library)
        except OSError as error:
            raise NoCompilerError(
                f"{library.parent} cannot be written: {error}; set PRUNEFLOW_CACHE to a folder"
            ) from error
    return library


@functools.cache
def load(flags: Sequence[str] = FLAGS) -> ctypes.CDLL:
    """The kernels, built and loaded; see kernels/runtime.h for what they are called with.

    Raises:
        NoCompilerError: See `build`.
    """
    library = ctypes.CDLL(str(build(flags)))
    library.pruneflow_run.restype = None
    library.pruneflow_run.argtypes = [ctypes.c_void_p] * 4
    library.pruneflow_step_bytes.restype = ctypes.c_int64
    assert library.pruneflow_step_bytes() == STEP.itemsize
    return library


def machine(kernels: ctypes.CDLL, threads: int) -> Machine:
    """What plans for these kernels are made for."""
    return Machine(kernels.pruneflow_lanes(), kernels.pruneflow_registers(), threads)


def _compiler() -> list[str]:
    """The one that torch.compile uses on the CPU: `CXX`, or what it finds."""
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    from torch._inductor import cpp_builder, exc  # noqa: PLC0415, it takes a second to import

    try:
        return [cpp_builder.get_cpp_compiler()]
    except exc.InvalidCxxCompiler as error:
        raise NoCompilerError("no C++ compiler was found") from error


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise NoCompilerError(f"there is no {command[0]!r}") from error
    except subprocess.CalledProcessError as error:
        raise NoCompilerError(f"{' '.join(command)} failed:\n{error.stderr[-2000:]}") from error
    return done.stdout


def _processor() -> str:
    """What `-march=native` stands for: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
