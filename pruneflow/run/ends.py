"""How a command ends: exit codes, signals, a full disk.

| code | meaning |
|---|---|
| 0 | the target was reached |
| 1 | invalid input, or an error |
| 3 | finished, but the target was not reached |
| 130 | interrupted by Ctrl-C |
| 143 | terminated by SIGTERM |
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

_GRACE = 10.0  # seconds for loggers to close


@contextmanager
def signals(message: Callable[[], str]) -> Iterator[None]:
    """Exit with 130 after Ctrl-C and with 143 after SIGTERM, whatever is running.

    Both raise `SystemExit`, so that loggers are closed and temporary files deleted. As callbacks of
    native code may swallow it, the process is killed after some seconds, or at a second signal.

    Args:
        message: Returns a message to print at once, such as how to resume.
    """
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + received[0])
        received.append(signum)
        text = f"\npruneflow: stopped by {signal.Signals(signum).name}. {message()}\n"
        os.write(2, text.encode())  # the signal may have interrupted `print`
        killer = threading.Timer(_GRACE, os._exit, [128 + signum])
        killer.daemon = True
        killer.start()
        sys.exit(128 + signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if received:  # even if another exception has replaced SystemExit
            sys.exit(128 + received[0])
        for number, handler in before.items():
            signal.signal(number, handler)


def no_space(error: BaseException | None) -> bool:
    """Whether an error was caused by a full disk or an exceeded quota.

    Example:
        >>> no_space(OSError(errno.ENOSPC, "No space left on device")), no_space(OSError("else"))
        (True, False)
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # safetensors has its own error type
            return True
        error = error.__cause__ or error.__context__
    return False
