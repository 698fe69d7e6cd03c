"""Write files atomically."""

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
    """Yield a temporary path that replaces `path` once the block has succeeded.

    The temporary file is in the same folder, so the last step is one atomic rename: a reader sees
    the old file or the new one, even if the process is killed. If the block raises, the temporary
    file is deleted and `path` is unchanged. The next write overwrites what a killed process left.
    One writer at a time.

    Args:
        path: The file to write; its folder is created if needed.

    Raises:
        OSError: ENOSPC, if the block fails on a full disk; torch and safetensors do not say so.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> with write_whole(folder / "plan.txt") as temporary:
        ...     _ = temporary.write_text("round 1")
        >>> [file.name for file in folder.iterdir()]
        ['plan.txt']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keep the suffix last: matplotlib and others choose the format by it. File names are limited to
    # 255 bytes.
    room = 255 - len(f"..partial{path.suffix}".encode())
    stem = path.stem.encode()[:room].decode(errors="ignore")
    temporary = path.with_name(f".{stem}.partial{path.suffix}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # the default; safetensors makes files private
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
    """Delete temporary files that killed writers left in a folder.

    Needed for names that are never written again, such as those of checkpoints.

    Args:
        folder: The folder; it may not exist.
        suffix: Suffix of the files that were being written.
        age: Seconds since the last write; younger files may belong to a running process.
    """
    for temporary in folder.glob(f".*.partial{suffix}"):
        with suppress(FileNotFoundError):  # another process deleted it
            if time.time() - temporary.stat().st_mtime > age:
                temporary.unlink()
