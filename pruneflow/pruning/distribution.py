"""Distribution: which tensors compete with each other, and the sparsity of each group of them.

A distribution is a function `(shapes, sparsity) -> [(names, sparsity of the group), ...]`, which
puts the qualified name of each tensor to prune in one group. It is passed as `scope=`, or by name.
A new distribution is a function in this module and an entry of `_BY_NAME` or, with settings, a
frozen dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from pruneflow.errors import expect
from pruneflow.pruning.schedules import pruned_count

Shapes = Mapping[str, torch.Size]
Groups = list[tuple[list[str], float]]
Distribution = Callable[[Shapes, float], Groups]
Scope = str | Mapping[str, Sequence[str]] | Distribution


def together(shapes: Shapes, sparsity: float) -> Groups:
    """All tensors compete with each other (`"global"`).

    Example:
        >>> together({"a": torch.Size([4, 2]), "b": torch.Size([2, 2])}, 0.5)
        [(['a', 'b'], 0.5)]
    """
    return [(list(shapes), sparsity)]


def uniform(shapes: Shapes, sparsity: float) -> Groups:
    """Each tensor by itself, all with the same sparsity (`"layer"`).

    Example:
        >>> uniform({"a": torch.Size([4, 2]), "b": torch.Size([2, 2])}, 0.5)
        [(['a'], 0.5), (['b'], 0.5)]
    """
    return [([name], sparsity) for name in shapes]


@dataclass(frozen=True)
class _NamedGroups:
    """Named groups: the tensors of a group compete with each other."""

    globs: Mapping[str, Sequence[str]]

    def __call__(self, shapes: Shapes, sparsity: float) -> Groups:
        groups = split_by_globs(self.globs, list(shapes))
        return [(names, sparsity) for names in groups.values()]


_BY_NAME: dict[str, Distribution] = {
    "global": together,
    "layer": uniform,
}


def resolve_scope(scope: Scope) -> Distribution:
    """The distribution for a scope.

    Args:
        scope: `"global"` (all tensors compete), `"layer"` (each tensor by itself), `"erk"` or
            `"uniform_plus"`; group name -> globs over qualified names, which must match each tensor
            exactly once; or a distribution, such as `PerLayer(...)`.

    Raises:
        ValueError: If `scope` is none of these.

    Example:
        >>> shapes = {"conv1.weight": torch.Size([8, 1, 3, 3]), "fc.weight": torch.Size([2, 8])}
        >>> resolve_scope({"early": ["conv*"], "late": ["fc.*"]})(shapes, 0.5)
        [(['conv1.weight'], 0.5), (['fc.weight'], 0.5)]
    """
    if isinstance(scope, str) and scope in _BY_NAME:
        return _BY_NAME[scope]
    if isinstance(scope, Mapping) and all(map(_are_globs, scope.values())):
        return _NamedGroups(scope)
    if callable(scope) and not isinstance(scope, type):
        return scope
    raise ValueError(
        f"`scope` must be {', '.join(map(repr, _BY_NAME))}, a mapping of group name to a list of "
        f"globs or a distribution such as PerLayer(...), got {scope!r}; try 'global'"
    )


def groups_of(scope: Scope, shapes: Shapes, sparsity: float) -> Groups:
    """The groups of a scope, each with its sparsity, checked.

    Raises:
        ValueError: If a distribution does not put each tensor in one group, or its sparsities are
            out of range or do not add up to `sparsity`.
    """
    groups = resolve_scope(scope)(shapes, sparsity)
    names = sorted(name for members, _ in groups for name in members)
    remedy = "correct the distribution"
    got = f"{scope!r} with groups of {', '.join(names) or 'nothing'}"
    expected = f"put each of {', '.join(shapes)} in one group"
    expect(names == sorted(shapes), "scope", expected, got, remedy)
    sizes = _sizes(shapes)
    total, pruned = sum(sizes.values()), 0
    for members, share in groups:
        numel = sum(sizes[name] for name in members)
        pruned += pruned_count(share, numel) if share != 1 else numel
    exact = abs(pruned - sparsity * total) <= max(1, len(groups))
    got = f"{scope!r} with a total of {pruned / max(1, total):.6g}"
    expect(exact, "scope", f"distribute the sparsity {sparsity!r}", got, remedy)
    return groups


def split_by_globs(
    globs: Mapping[str, Sequence[str]], names: Sequence[str]
) -> dict[str, list[str]]:
    """The names that match the globs of each group.

    Raises:
        ValueError: If a group has no match, or a name is not in exactly one group.
    """
    groups = {
        group: [name for name in names if any(fnmatchcase(name, glob) for glob in patterns)]
        for group, patterns in globs.items()
    }
    wrong = [f"no match for group {group!r}" for group, members in groups.items() if not members]
    times = {name: sum(name in members for members in groups.values()) for name in names}
    several = [f"{name!r} in {count} groups" for name, count in times.items() if count != 1]
    wrong += several[:5]
    expect(
        not wrong,
        "scope",
        "match each tensor to prune exactly once",
        "; ".join(wrong),
        f"correct its globs; the tensors are {', '.join(names)}",
    )
    return groups


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _are_globs(globs: object) -> bool:
    return (
        isinstance(globs, Sequence)
        and not isinstance(globs, str)
        and all(isinstance(glob, str) for glob in globs)
    )
