"""Write files whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it once the block has succeeded.

    The temporary file lies in the same folder, hence on the same file system, so that the last step
    is one atomic rename: a reader, or a process killed at any moment, sees the old file or the new
    one. When the block raises, the temporary file is deleted and `path` is left as it was; what a
    killed process left is overwritten by the next write. One writer at a time.

    Args:
        path: The file to write; its folder is made when missing.

    Raises:
        OSError: ENOSPC, if the block fails on a disk that is full: torch and safetensors say less.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> with write_whole(folder / "plan.txt") as temporary:
        ...     _ = temporary.write_text("round 1")
        >>> [file.name for file in folder.iterdir()]
        ['plan.txt']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: savers such as matplotlib choose the format by it. File systems take
    # names of 255 bytes.
    room = 255 - len(f"..partial{path.suffix}".encode())
    stem = path.stem.encode()[:room].decode(errors="ignore")
    temporary = path.with_name(f".{stem}.partial{path.suffix}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # that of any new file; safetensors lets nobody else read
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except Exception as error:
        if shutil.disk_usage(path.parent).free < 2**16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, suffix: str = "", *, age: float = 3600) -> None:
    """Delete the temporary files that killed writers left in a folder.

    A name that is written again overwrites what was left; this is for names that are not, such as
    those of checkpoints. A living writer's file is young: each write makes it new.

    Args:
        folder: The folder; it may be missing.
        suffix: Of the files that were to be written.
        age: In seconds; what was written to since is left alone.
    """
    for temporary in folder.glob(f".*.partial{suffix}"):
        with suppress(FileNotFoundError):  # somebody else swept
            if time.time() - temporary.stat().st_mtime > age:
                temporary.unlink()
