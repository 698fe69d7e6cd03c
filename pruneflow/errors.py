"""Error messages, all in one form."""

from __future__ import annotations


def expect(
    good: object,
    argument: str,
    expected: str,
    got: object,
    remedy: str,
    *,
    error: type[Exception] = ValueError,
) -> None:
    """Raise an error unless an argument is valid.

    Args:
        good: Whether the argument is valid.
        argument: Its name, as the user knows it.
        expected: What it must be or do; completes "must ...".
        got: The value passed, or a description of it.
        remedy: What to do instead.
        error: Type of the error.

    Raises:
        Exception: `error`, if `good` is false.

    Example:
        >>> expect(0.5 < 1, "sparsity", "be below 1", 0.5, "try 0.98")
        >>> expect(98 < 1, "sparsity", "be below 1", 98, "try 0.98")
        Traceback (most recent call last):
        ValueError: `sparsity` must be below 1, got 98; try 0.98
    """
    if not good:
        raise error(f"`{argument}` must {expected}, got {got}; {remedy}")
