"""How a command ends: its exit codes, signals, and a disk that is full.

| code | what happened |
|---|---|
| 0 | done, and the target was reached |
| 1 | refused, or failed |
| 3 | done, but the target was not reached |
| 130 | interrupted: Ctrl-C |
| 143 | told to end: SIGTERM |
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TARGET_MISSED = 3

_GRACE = 10.0  # seconds for loggers to close, and for whoever swallows the interrupt


@contextmanager
def signals(say: Callable[[], str]) -> Iterator[None]:
    """End with 130 after Ctrl-C and with 143 after SIGTERM, whatever is running.

    Both raise `SystemExit`, so that loggers close and temporary files go. Code called from native
    code may swallow it, so a process that is still there some seconds later is ended, as it is at
    a second signal.

    Args:
        say: What is printed at once, such as how to go on.
    """
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + received[0])
        received.append(signum)
        text = f"\npruneflow: stopped by {signal.Signals(signum).name}. {say()}\n"
        os.write(2, text.encode())  # `print` may be what was interrupted
        killer = threading.Timer(_GRACE, os._exit, [128 + signum])
        killer.daemon = True
        killer.start()
        sys.exit(128 + signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if received:  # whatever came of it on the way up
            sys.exit(128 + received[0])
        for number, handler in before.items():
            signal.signal(number, handler)


def no_space(error: BaseException | None) -> bool:
    """Whether an error came from a disk, or a share of one, that is full.

    Example:
        >>> no_space(OSError(errno.ENOSPC, "No space left on device")), no_space(OSError("else"))
        (True, False)
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # safetensors raises an error of its own
            return True
        error = error.__cause__ or error.__context__
    return False
