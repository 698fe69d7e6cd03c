"""Select the tensors to prune, by globs over their names or by module type."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pruneflow.errors import expect
from pruneflow.structure.layer_types import is_weight

Pattern = str | type[nn.Module]

NORMS = (WeightNorm, SpectralNorm)  # hooks, from before parametrizations
_MOST_DENSE = 0.1  # share of all parameters that may stay dense without a warning
_MOST_NAMES = 8  # more tensors of repeated blocks are listed as one
# Class of a wrapper -> the attribute with the wrapped module. By name, as these classes are slow to
# import, and not every installation has them.
_WRAPPERS = {
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "AveragedModel": "module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_forward_module",
}


@dataclass(frozen=True)
class Slot:
    """Where a model holds a parameter: `module.<attribute>`.

    Args:
        module: The module that owns the parameter.
        attribute: Its name in the module, such as `weight`.
        others: Where else the same (tied) parameter is used: (name, module, attribute).
    """

    module: nn.Module
    attribute: str
    others: tuple[tuple[str, nn.Module, str], ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The leaf that is trained; under `torch.nn.utils.prune`, the `_orig` parameter."""
        name = f"{self.attribute}_orig" if self.reparametrized else self.attribute
        return self.module.get_parameter(name)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that own the parameter; several if it is tied."""
        return (self.module, *(module for _, module, _ in self.others))

    @property
    def weight(self) -> Tensor:
        """The weight as the forward pass uses it, detached."""
        weight = self.parameter.detach()
        if self.reparametrized:
            return weight * self.module.get_buffer(f"{self.attribute}_mask")
        return weight

    @property
    def reparametrized(self) -> bool:
        """Whether it has a mask of `torch.nn.utils.prune`."""
        return _reparametrized(self.module, self.attribute)


@dataclass(frozen=True)
class Selection:
    """The result of `select`.

    Args:
        slots: Qualified name -> slot, in the order of `named_parameters()`.
        frozen: Tensors that match but are frozen (`requires_grad=False`); not in `slots`.
        dense: All other trained tensors of two or more dimensions.
        overlooked: Those of `dense` that no pattern mentions: none if there is an `include`,
            otherwise all that `exclude` does not match.
        parameters: Number of parameters of the model.
    """

    slots: Mapping[str, Slot]
    frozen: Mapping[str, Slot]
    dense: Mapping[str, Slot]
    overlooked: Mapping[str, Slot]
    parameters: int

    def describe_dense(self) -> str:
        """One line with the tensors that stay dense and their share of all parameters, or ""."""
        shares = self._shares(self.dense)
        what = "Trained tensors that stay dense (share of all parameters)"
        return f"{what}: {shares}" if shares else ""

    def warn_overlooked(self, stacklevel: int = 3) -> None:
        """Warn if much of the model stays dense by default."""
        share = self._share(self.overlooked, self.overlooked)
        if share > _MOST_DENSE:
            warnings.warn(
                f"{share:.1%} of all parameters are neither pruned nor counted, as they are not "
                "weights of layers that are pruned by default: "
                f"{self._shares(self.overlooked)}; name them in `include`, call `register_layer` "
                "with the type of their layer, or `exclude` them to keep them dense",
                stacklevel=stacklevel,
            )

    def _shares(self, slots: Mapping[str, Slot]) -> str:
        alike: dict[str, list[str]] = {}  # blocks.*.weight -> names
        for name in slots:
            alike.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
        shares = []
        for pattern, names in alike.items():
            if len(names) <= _MOST_NAMES:
                shares += [f"{name} ({self._share([name], slots):.1%})" for name in names]
            else:
                shares.append(f"{pattern} ({len(names)}, {self._share(names, slots):.1%})")
        return ", ".join(shares)

    def _share(self, names: Iterable[str], slots: Mapping[str, Slot]) -> float:
        return sum(slots[name].parameter.numel() for name in names) / self.parameters


class Places:
    """The modules and parameters of a model, to detect when any of them is replaced.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> places = Places(model)
        >>> model[0] = nn.Linear(2, 2)
        >>> places.changed()
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._entries = [
            (table, name, value)
            for module in model.modules()
            for table in (module._modules, module._parameters)
            for name, value in table.items()
        ]

    def changed(self) -> bool:
        """Whether any has been replaced or removed."""
        return any(table.get(name) is not value for table, name, value in self._entries)


def wrapped(module: nn.Module) -> str | None:
    """The attribute of a wrapper that holds the wrapped module; None if it is not a wrapper.

    Wrappers are `torch.compile`, `DataParallel` and `DistributedDataParallel`, activation
    checkpointing and offloading, `AveragedModel`, modules set up by Lightning Fabric, and every
    module whose class names such an attribute in `wraps`.

    Example:
        >>> class Task(nn.Module):
        ...     wraps = "network"
        ...
        ...     def __init__(self, network):
        ...         super().__init__()
        ...         self.network = network
        >>> list(locate(Task(nn.Linear(2, 2))))
        ['weight', 'bias']
    """
    for kind in type(module).__mro__:
        attribute = _WRAPPERS.get(kind.__name__)
        if attribute in module._modules:
            return attribute
    attribute = getattr(type(module), "wraps", None)
    return attribute if isinstance(attribute, str) and attribute in module._modules else None


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, with the names in the unwrapped model.

    Example:
        >>> dict(named_modules(nn.DataParallel(nn.Sequential(nn.Flatten()))))["0"]
        Flatten(start_dim=1, end_dim=-1)
    """
    names = {"": ""}
    for path, module in model.named_modules():
        inner = wrapped(module)
        for child in module._modules:
            plain = "" if child == inner else f".{child}"
            names[f"{path}.{child}".lstrip(".")] = f"{names[path]}{plain}".lstrip(".")
        yield names[path], module


def locate(model: nn.Module) -> dict[str, Slot]:
    """Every parameter of `model` once, by its canonical name.

    Canonical names are those of the plain model, without prefixes of wrappers such as
    `torch.compile` (`_orig_mod.`) or a LightningModule that declares what it `wraps`, and without
    the `_orig` of `torch.nn.utils.prune`. A tied parameter is listed under its first name.

    Example:
        >>> list(locate(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
        ['0.weight', '0.bias']
    """
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in named_modules(model):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                plain = attribute.removesuffix("_orig")
                if plain != attribute and _reparametrized(module, plain):
                    attribute = plain
                name = f"{prefix}.{attribute}".lstrip(".")
                places.setdefault(id(parameter), []).append((name, module, attribute))
    return {first[0]: Slot(first[1], first[2], tuple(others)) for first, *others in places.values()}


def check_not_lazy(model: nn.Module) -> None:
    """Check that a model has no uninitialized lazy layers.

    Raises:
        ValueError: Names them.
    """
    lazy = [n for n, m in model.named_modules() if any(map(is_lazy, m._parameters.values()))]
    got = f"uninitialized lazy layers: {', '.join(lazy)}"
    expect(not lazy, "model", "have initialized parameters", got, "run the model once first")


def select(
    model: nn.Module,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
) -> Selection:
    """Select the parameters to prune.

    By default, these are the weights of convolutions, `Linear`, `Bilinear` and recurrent layers,
    the projections of `MultiheadAttention`, and the weights of layer types added by
    `register_layer`. A tied parameter counts once, and by default only if it is such a weight
    everywhere it is used. Frozen parameters are left out.

    Args:
        model: The model.
        include: Globs over qualified names, and module types; None selects the default. A glob that
            names tensors, such as `"*.weight"` or `"fc.bias"`, selects all tensors it matches. A
            glob that only names modules, such as `"layer1.*"`, selects their weights: tensors of
            two or more dimensions except biases, or all tensors if there are none. A type, such as
            `nn.Conv2d`, selects the weights of modules of that type.
        exclude: Globs and module types to leave out, including biases.

    Raises:
        TypeError: If `include` or `exclude` is not a list of globs and module types.
        ValueError: If a pattern matches nothing, nothing is left to prune, or tensors to prune are
            lazy or on the meta device.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
        >>> list(select(model).slots)
        ['0.weight', '2.weight']
        >>> list(select(model, include=("*.weight", "*.bias"), exclude=(nn.BatchNorm2d,)).slots)
        ['0.weight', '0.bias', '2.weight', '2.bias']
        >>> list(select(model, include=("0.*",)).slots)
        ['0.weight']
    """
    for argument, patterns in (("include", include or ()), ("exclude", exclude)):
        # A string is a sequence too, and the first character of "*.weight" matches everything.
        single = isinstance(patterns, str | type)
        expect(
            not single and all(isinstance(pattern, str | type) for pattern in patterns),
            argument,
            "be a list of globs and module types",
            repr(patterns),
            "put it in brackets, or give the type of the module",
            error=TypeError,
        )
    slots = locate(model)
    check_not_lazy(model)
    chosen = {name for name, slot in slots.items() if _prunable_by_default(slot)}
    unmatched = []
    if include is not None:
        chosen = set()
        for pattern in include:
            matched = _included(pattern, slots)
            chosen.update(matched)
            if not matched:
                unmatched.append(("include", pattern))
    excluded = set()
    for pattern in exclude:
        matched = matching(pattern, slots)
        excluded.update(matched)
        if not matched:
            unmatched.append(("exclude", pattern))
    chosen -= excluded
    if unmatched:
        raise ValueError(
            "\n".join(_no_match(argument, pattern, slots) for argument, pattern in unmatched)
        )
    selected = {name: slot for name, slot in slots.items() if name in chosen}
    if not selected:
        raise ValueError(
            "`include` and `exclude` must leave at least one tensor to prune, got none of "
            f"{len(slots)} parameters; widen `include`, or call `register_layer` with the type of "
            "the layers"
        )
    empty = [name for name, slot in selected.items() if slot.parameter.is_meta]
    expect(
        not empty,
        "model",
        "have its weights in memory",
        f"tensors on the meta device: {', '.join(empty)}",
        "call `model.to_empty(device=...)` and initialize them first",
    )
    frozen = {name: slot for name, slot in selected.items() if not slot.parameter.requires_grad}
    dense = {
        name: slot
        for name, slot in slots.items()
        if name not in selected and slot.parameter.requires_grad and slot.parameter.dim() > 1
    }
    return Selection(
        {name: slot for name, slot in selected.items() if name not in frozen},
        frozen,
        dense,
        {n: slot for n, slot in dense.items() if include is None and n not in excluded},
        sum(slot.parameter.numel() for slot in slots.values()),
    )


def ties(slots: Mapping[str, Slot]) -> dict[str, list[str]]:
    """Qualified name of each tensor -> the other names under which it is tied."""
    return {name: [other for other, _, _ in slot.others] for name, slot in slots.items()}


def check_kept(before: Mapping[str, list[str]], slots: Mapping[str, Slot]) -> None:
    """Check that the tensors to prune still exist and are tied as before.

    Args:
        before: The `ties` of these tensors when they were selected.
        slots: The slots of the model now.

    Raises:
        ValueError: Names the tensors that are gone or tied differently.
    """
    now = ties(slots)
    lost = [name for name, others in before.items() if now.get(name) != others]
    expect(
        not lost,
        "model",
        "keep its pruned tensors and how they are tied",
        f"changes to {', '.join(lost)}",
        "create a new Pruner after replacing layers",
    )


def check_storage(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Check that tensors to prune do not share memory with each other or with other tensors.

    Args:
        tensors: Qualified name -> tensor to prune; the local shard of a sharded tensor.
        others: Tensors that are not pruned.

    Raises:
        ValueError: Names the tensors that share memory.
    """
    shared = []
    places: dict[tuple[torch.device, int], list[tuple[str, Tensor]]] = {}
    for name, tensor in (*tensors.items(), *others.items()):
        if not tensor.numel() or tensor.is_meta or not _has_memory(tensor):
            continue
        sizes = zip(tensor.stride(), tensor.shape, strict=True)
        if name in tensors and any(stride == 0 and size > 1 for stride, size in sizes):
            shared.append(f"{name} (its own entries, as after `expand`)")
        else:
            storage = tensor.untyped_storage().data_ptr()
            places.setdefault((tensor.device, storage), []).append((name, tensor))
    for members in places.values():
        for (one, a), (other, b) in combinations(members, 2):
            if (one in tensors or other in tensors) and _overlap(a, b):
                shared.append(f"{one} and {other}")
    expect(
        not shared,
        "include",
        "select tensors that do not share memory",
        ", ".join(shared),
        "tie them as one parameter, `exclude` them, or copy one with `.clone()`",
    )


def _has_memory(tensor: Tensor) -> bool:
    """Whether it has a single storage, unlike sparse tensors and wrapper subclasses."""
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two views of one storage have an entry in common."""
    (first, last), (start, end) = _extent(a), _extent(b)
    if last < start or end < first:  # the usual case: parameters in one flat buffer
        return False
    taken = torch.zeros(max(last, end) + 1, dtype=torch.bool)
    taken.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def _extent(view: Tensor) -> tuple[int, int]:
    start = view.storage_offset()
    pairs = zip(view.stride(), view.shape, strict=True)
    return int(start), int(start + sum(stride * (size - 1) for stride, size in pairs))


def _reparametrized(module: nn.Module, attribute: str) -> bool:
    return f"{attribute}_orig" in module._parameters and f"{attribute}_mask" in module._buffers


def _prunable_by_default(slot: Slot) -> bool:
    places = [(slot.module, slot.attribute), *((m, attribute) for _, m, attribute in slot.others)]
    trains = slot.parameter.is_floating_point() or slot.parameter.is_complex()
    return trains and all(is_weight(*place) for place in places)


def _included(pattern: Pattern, slots: Mapping[str, Slot]) -> list[str]:
    """The tensors a pattern includes: those it names, or the weights of the modules it names."""
    matched = matching(pattern, slots)
    named = [name for name in matched if not _names_modules(pattern, name)]
    inside = [name for name in matched if _names_modules(pattern, name)]
    no_bias = [name for name in inside if "bias" not in slots[name].attribute]
    weights = [name for name in no_bias if slots[name].parameter.dim() > 1]
    return named + (weights or (inside if isinstance(pattern, str) else no_bias))


def _names_modules(pattern: Pattern, name: str) -> bool:
    """Whether a pattern matches the module, whatever the tensor in it is called."""
    if isinstance(pattern, type):
        return True
    module, dot, _ = name.rpartition(".")
    return fnmatchcase(f"{module}{dot}\0", pattern)


def matching(pattern: Pattern, slots: Mapping[str, Slot]) -> list[str]:
    """Names of the parameters that a glob or module type matches, under any of their names."""

    def matches(name: str, module: nn.Module) -> bool:
        if isinstance(pattern, str):
            return fnmatchcase(name, pattern)
        return isinstance(module, pattern)

    return [
        name
        for name, slot in slots.items()
        if matches(name, slot.module) or any(matches(other, m) for other, m, _ in slot.others)
    ]


def _no_match(argument: str, pattern: Pattern, slots: Mapping[str, Slot]) -> str:
    if isinstance(pattern, str):
        modules = {f"{name.rpartition('.')[0]}.*": None for name in slots if "." in name}
        near = difflib.get_close_matches(pattern, [*slots, *modules], n=3, cutoff=0.4)
        hint = near or list(slots)[:3]
        return (
            f"`{argument}` must match parameters of the model, got {pattern!r}, which matches "
            f"none; near names: {', '.join(hint)}"
        )
    kinds = sorted({type(slot.module).__name__ for slot in slots.values()})
    return (
        f"`{argument}` must match parameters of the model, got type {pattern.__name__}, which has "
        f"none; its modules with parameters: {', '.join(kinds)}"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, `torch.compile` and other wrappers.

    A wrapper that `fully_shard` was applied to is kept: only it can reshard the gathered weights.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(layer)) is unwrap(layer) is layer
        True
    """
    while (attribute := wrapped(model)) is not None and not hasattr(model, "reshard"):
        model = model.get_submodule(attribute)
    return model
