"""Distribution: which tensors compete with each other, and the sparsity of each group of them.

A distribution is a function `(shapes, sparsity) -> [(names, sparsity of the group), ...]`, which
puts the qualified name of each tensor to prune in one group. It is passed as `scope=`, or by name.
A new distribution is a function in this module and an entry of `_BY_NAME` or, with settings, a
frozen dataclass. If it does not fit every final sparsity of a schedule, it has a method
`check_target(shapes, target)` that raises a ValueError, as `PerLayer` has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from pruneflow.errors import expect
from pruneflow.pruning.schedules import check_fraction, pruned_count

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


def uniform_plus(shapes: Shapes, sparsity: float) -> Groups:
    """Uniform+: the first convolution stays dense, and a final `Linear` keeps at least 20 %.

    The other tensors share the rest uniformly, so that the total is exact. First and last refer to
    the order of the model's parameters; without convolutions, the first tensor stays dense.

    Raises:
        ValueError: If the sparsity cannot be reached.

    Example:
        >>> shapes = {"conv1": torch.Size([2, 1, 2, 2]), "conv2": torch.Size([4, 2, 1, 1]),
        ...           "fc": torch.Size([4, 5])}
        >>> uniform_plus(shapes, 0.5)  # of 36
        [(['conv1'], 0.0), (['conv2'], 0.625), (['fc'], 0.65)]

    References:
        Gale et al. 2019, https://arxiv.org/abs/1902.09574.
    """
    sizes = _sizes(shapes)
    first = next((name for name, shape in shapes.items() if len(shape) > 2), next(iter(shapes)))
    *_, last = shapes
    limits = {name: 0.0 if name == first else 1.0 for name in shapes}
    if last != first and len(shapes[last]) == 2:
        limits[last] = 0.8
    maximum = sum(limits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    expect(
        sparsity <= maximum,
        "sparsity",
        f"be at most {maximum:.4g} with scope 'uniform_plus', which keeps {first} dense and at "
        "least 20 % of a final Linear",
        repr(sparsity),
        "lower it, or use scope='erk'",
    )
    open_, to_prune, found = dict(sizes), sparsity * sum(sizes.values()), dict[str, float]()
    while open_:  # tensors above their limit get the limit; the others share the rest
        uniform = to_prune / sum(open_.values())
        limited = [name for name in open_ if uniform > limits[name]]
        for name in limited or list(open_):
            found[name] = min(uniform, limits[name])
            to_prune -= found[name] * open_.pop(name)
    return _round({name: found[name] * size for name, size in sizes.items()}, sizes, sparsity)


def erk(shapes: Shapes, sparsity: float) -> Groups:
    """Erdős–Rényi-Kernel: density proportional to (sum of the dimensions) / (their product).

    density = min(1, ε · (outputs + inputs + kernel sizes) / (outputs · inputs · kernel sizes)),

    where ε makes the total exact. Small tensors stay dense, and large ones are pruned more.

    Example:
        >>> erk({"a": torch.Size([10, 10]), "b": torch.Size([30, 10])}, 0.5)
        [(['a'], 0.33), (['b'], 0.5566666666666666)]

    References:
        Mocanu et al. 2018, https://arxiv.org/abs/1707.04780; Evci et al. 2020 (RigL),
        https://arxiv.org/abs/1911.11134.
    """
    sizes = _sizes(shapes)
    raw = {name: sum(shape) / max(1, math.prod(shape)) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:  # until no density is above 1
        kept = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
        others = sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        epsilon = kept / others if others else 0.0
        more = {name for name in shapes if name not in dense and epsilon * raw[name] > 1}
        if not more:
            break
        dense |= more
    ideal = {
        name: 0.0 if name in dense else (1 - epsilon * raw[name]) * size
        for name, size in sizes.items()
    }
    return _round(ideal, sizes, sparsity)


@dataclass(frozen=True)
class PerLayer:
    """An explicit sparsity for each tensor.

    They imply a total sparsity, which must be the target of the schedule, to within 0.005. Rounds
    below it scale the sparsities of all tensors by the same factor.

    Args:
        sparsities: Glob over qualified names -> sparsity of each matching tensor, in [0, 1). Each
            tensor to prune must match exactly one glob.

    Raises:
        ValueError: If a sparsity is out of range; when called, if a glob matches no tensor, a
            tensor does not match exactly one glob, or the sparsity is above the total.

    Example:
        >>> scope = PerLayer({"conv*": 0.5, "fc.weight": 0.9})
        >>> shapes = {"conv1.weight": torch.Size([10, 10]), "fc.weight": torch.Size([30, 10])}
        >>> scope(shapes, 0.8)
        [(['conv1.weight'], 0.5), (['fc.weight'], 0.9)]
        >>> scope(shapes, 0.4)
        [(['conv1.weight'], 0.25), (['fc.weight'], 0.45)]
    """

    sparsities: Mapping[str, float]

    def __post_init__(self) -> None:
        expect(
            isinstance(self.sparsities, Mapping) and self.sparsities,
            "sparsities",
            "map globs to sparsities",
            repr(self.sparsities),
            "try {'conv*': 0.5}",
        )
        plain = {glob: check_fraction("sparsities", s) for glob, s in self.sparsities.items()}
        object.__setattr__(self, "sparsities", plain)

    def __call__(self, shapes: Shapes, sparsity: float) -> Groups:
        """The sparsity of each tensor at a total sparsity."""
        total, ideal, sizes = self._total(shapes), self._ideal(shapes), _sizes(shapes)
        _check_total(sparsity <= total + _TOLERANCE, total, sparsity)
        factor = sparsity / total if total else 0.0
        return _round({name: factor * count for name, count in ideal.items()}, sizes, sparsity)

    def check_target(self, shapes: Shapes, target: float) -> None:
        """Check that the target of a schedule is the total of the sparsities.

        Raises:
            ValueError: Names the total.
        """
        total = self._total(shapes)
        _check_total(abs(target - total) <= _TOLERANCE, total, target)

    def _ideal(self, shapes: Shapes) -> dict[str, float]:
        matched = split_by_globs({glob: [glob] for glob in self.sparsities}, list(shapes))
        sizes = _sizes(shapes)
        each = {n: self.sparsities[glob] for glob, names in matched.items() for n in names}
        return {name: each[name] * size for name, size in sizes.items()}

    def _total(self, shapes: Shapes) -> float:
        return sum(self._ideal(shapes).values()) / max(1, sum(_sizes(shapes).values()))


@dataclass(frozen=True)
class _NamedGroups:
    """Named groups: the tensors of a group compete with each other."""

    globs: Mapping[str, Sequence[str]]

    def __call__(self, shapes: Shapes, sparsity: float) -> Groups:
        groups = split_by_globs(self.globs, list(shapes))
        return [(names, sparsity) for names in groups.values()]


_TOLERANCE = 0.005  # for targets with two digits
_BY_NAME: dict[str, Distribution] = {
    "global": together,
    "layer": uniform,
    "uniform_plus": uniform_plus,
    "erk": erk,
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


def _check_total(good: bool, total: float, sparsity: float) -> None:
    expect(
        good,
        "schedule",
        f"end at the total of the sparsities of PerLayer, {total:.6g}",
        f"{sparsity:.6g}",
        "set its target to that, or change the sparsities",
    )


def _round(ideal: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> Groups:
    """Each tensor by itself, with whole counts and an exact total: largest remainders."""
    counts = {name: min(math.floor(count), sizes[name]) for name, count in ideal.items()}
    missing = pruned_count(sparsity, sum(sizes.values())) - sum(counts.values())
    open_ = [name for name in ideal if counts[name] < sizes[name]]
    open_.sort(key=lambda name: counts[name] - ideal[name])
    for name in open_[:missing]:
        counts[name] += 1
    return [([name], count / max(1, sizes[name])) for name, count in counts.items()]


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _are_globs(globs: object) -> bool:
    return (
        isinstance(globs, Sequence)
        and not isinstance(globs, str)
        and all(isinstance(glob, str) for glob in globs)
    )
