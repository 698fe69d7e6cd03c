"""Find conf/ and recipes/ in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path


def resource_dir(name: str) -> Path:
    """The path of `conf/` or `recipes/`.

    Args:
        name: `"conf"` or `"recipes"`.

    Raises:
        FileNotFoundError: If the installation is incomplete.

    Example:
        >>> (resource_dir("conf") / "config.yaml").exists()
        True
    """
    package = Path(__file__).parents[1]
    for candidate in (package / "_bundled" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"`{name}` must be a folder in or next to {package}, got none; install pruneflow again"
    )
