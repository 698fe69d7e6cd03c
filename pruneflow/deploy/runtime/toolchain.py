"""Build the native code of the sparse runtime for this machine, and keep it in a cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pruneflow.deploy.runtime.plans import STRUCTS, Machine
from pruneflow.files import sweep

KERNELS = Path(__file__).with_name("kernels")
# The compiler may fuse multiply-adds and drop the flags that the hardware raises, nothing else: it
# does not reorder sums, and NaN and infinities are treated as in PyTorch.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_ALWAYS = ("-std=c++17", "-shared", "-fPIC", "-pthread", "-Wall", "-Wno-psabi")


class NoCompilerError(RuntimeError):
    """There is no C++ compiler that can build the kernels, or no folder for them."""


def cache_folder() -> Path:
    """Where kernels are kept: `PRUNEFLOW_CACHE`, or `pruneflow` in the user's cache folder.

    Raises:
        OSError: If the user has no home folder.
    """
    if given := os.environ.get("PRUNEFLOW_CACHE"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given, "pruneflow")
    try:
        return Path.home() / ".cache" / "pruneflow"
    except RuntimeError as error:
        raise OSError(str(error)) from error


@functools.cache
def load(flags: Sequence[str] = FLAGS) -> ctypes.CDLL:
    """The kernels, loaded from the cache, or built; see kernels/runtime.h for how they are called.

    The cache distinguishes them by their source, the flags, the compiler's version and the
    processor. A library is loaded only if it is whole and nobody else could have written it, as its
    code runs in this process. Where the cache cannot be used, each process builds its own, and a
    warning says so.

    Args:
        flags: Of the compiler, for optimization and the machine.

    Raises:
        NoCompilerError: If there is no compiler, or it fails, or what it built cannot be loaded.
        RuntimeError: If the structs of the kernels are not those of `plans`.
    """
    compiler = _compiler()
    key = _key(compiler, flags)
    try:
        kept = _kept(cache_folder(), key)
        return _opened(kept)
    except OSError:  # there is none yet, or none that can be used
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="pruneflow-", ignore_cleanup_errors=True) as folder:
            built = build(compiler, flags, Path(folder))
            try:
                return _opened(_keep(built, cache_folder(), key))
            except OSError as error:
                library = _opened(built)
                warnings.warn(
                    f"the kernels of the sparse runtime are built anew by each process, as they "
                    f"cannot be kept: {error}; set PRUNEFLOW_CACHE to a folder of your own",
                    stacklevel=3,
                )
                return library
    except OSError as error:
        raise NoCompilerError(
            f"the kernels cannot be built or loaded: {error}; set TMPDIR and PRUNEFLOW_CACHE to "
            "folders that can be written to and run from"
        ) from error


def build(compiler: Sequence[str], flags: Sequence[str], folder: Path) -> Path:
    """Build the shared library of the kernels.

    Args:
        compiler: Its command.
        flags: For optimization and the machine.
        folder: Where the library goes.

    Raises:
        NoCompilerError: If the compiler fails; the message ends with what it wrote.
    """
    library = folder / "kernels.so"
    sources = [str(file) for file in sorted(KERNELS.glob("*.cpp"))]
    _output([*compiler, *_ALWAYS, *flags, *sources, "-o", str(library)])
    return library


def _key(compiler: Sequence[str], flags: Sequence[str]) -> str:
    version = _output([*compiler, "--version"])
    sources = (file.read_text() for file in sorted(KERNELS.iterdir()))
    return _digest("\0".join([*flags, version, _processor(), *sources]).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _kept(folder: Path, key: str) -> Path:
    """The library in the cache; its name ends in the digest of what it holds."""
    _refuse_open_to_others(folder)
    for path in filter(Path.is_file, folder.glob(f"kernels-{key}-*.so")):  # no pipe
        with suppress(OSError):
            _refuse_open_to_others(path)
            if path.stem.endswith(_digest(path.read_bytes())):
                return path
    raise FileNotFoundError(f"{folder} has no such library")


def _keep(built: Path, folder: Path, key: str) -> Path:
    """Put a library into the cache, whole or not at all, beside others who do the same."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_open_to_others(folder)
    sweep(folder, ".so")
    content = built.read_bytes()
    path = folder / f"kernels-{key}-{_digest(content)}.so"
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".kernels-", suffix=".partial.so")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def _refuse_open_to_others(path: Path) -> None:
    """Raise a PermissionError if anybody but this user owns `path` or may write to it."""
    about = path.stat()
    mine = about.st_uid == os.geteuid()
    if not mine or about.st_mode & 0o022:
        open_to = f"may be written to by others, until you run chmod go-w {path}"
        raise PermissionError(f"{path} {open_to if mine else 'belongs to another user'}")


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.pruneflow_run.argtypes = [ctypes.c_void_p] * 4
    library.pruneflow_fields.restype = ctypes.c_char_p
    _check_structs(library.pruneflow_fields().decode())
    return library


def _check_structs(reported: str) -> None:
    """Refuse kernels whose structs differ from those of `plans`.

    Args:
        reported: What `pruneflow_fields` returns.
    """
    rows = (line.split() for line in reported.splitlines())
    native = {name: (int(offset), int(size)) for name, offset, size in rows}
    ours = {name: (0, struct.itemsize) for name, struct in STRUCTS.items()}
    for struct_name, struct in STRUCTS.items():
        for name, (kind, offset, *_) in (struct.fields or {}).items():
            ours[f"{struct_name}.{name}"] = offset, kind.itemsize
    differing = [name for name in ours | native if ours.get(name) != native.get(name)]
    if differing:
        raise RuntimeError(
            f"`{', '.join(differing)}` must lie in kernels/runtime.h as in plans.py, got other "
            "offsets or sizes; try reinstalling pruneflow, so that both are of one version"
        )


def machine(kernels: ctypes.CDLL, threads: int) -> Machine:
    """What plans for these kernels are made for: their vectors, and so many threads."""
    return Machine(kernels.pruneflow_lanes(), kernels.pruneflow_registers(), threads)


def _compiler() -> list[str]:
    """The command of the compiler that torch.compile uses on the CPU: `CXX`, or what it finds."""
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
