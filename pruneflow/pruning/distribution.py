"""What competes together: all tensors, each by itself, or named groups of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

Scope = str | Mapping[str, Sequence[str]]


def resolve_scope(scope: Scope, names: Sequence[str]) -> list[list[str]]:
    """Split the names of the prunable tensors into the groups that compete together.

    Args:
        scope: `"global"` (all together), `"layer"` (each tensor by itself), or group name ->
            globs over qualified names, which have to cover every tensor exactly once.
        names: Qualified names of the prunable tensors.

    Raises:
        ValueError: If `scope` is unknown, or its groups do not cover each tensor exactly once.

    Example:
        >>> resolve_scope({"early": ["conv*"], "late": ["fc.*"]}, ["conv1.weight", "fc.weight"])
        [['conv1.weight'], ['fc.weight']]
    """
    if scope == "global":
        return [list(names)]
    if scope == "layer":
        return [[name] for name in names]
    if not isinstance(scope, Mapping) or not all(map(_are_globs, scope.values())):
        raise ValueError(
            "`scope` is expected to be 'global', 'layer' or a mapping of group name to a list of "
            f"globs, but {scope!r} came"
        )
    groups = {
        group: [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
        for group, globs in scope.items()
    }
    empty = [group for group, members in groups.items() if not members]
    times = {name: sum(name in members for members in groups.values()) for name in names}
    wrong = [name for name, count in times.items() if count != 1]
    if empty or wrong:
        raise ValueError(
            "`scope` groups are expected to match every prunable tensor exactly once, but "
            + "; ".join(
                [f"group {group!r} matches none" for group in empty]
                + [f"{name!r} is in {times[name]} groups" for name in wrong[:5]]
            )
            + f"; the tensors are: {', '.join(names)}"
        )
    return list(groups.values())


def _are_globs(globs: object) -> bool:
    return (
        isinstance(globs, Sequence)
        and not isinstance(globs, str)
        and all(isinstance(glob, str) for glob in globs)
    )
