"""Which: the tensors of a model that can be pruned, by glob over their names and by module type."""

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

from pruneflow.structure.layer_types import is_weight

Pattern = str | type[nn.Module]

NORMS = (WeightNorm, SpectralNorm)  # hooks of the older form, from before parametrizations
_MOST_DENSE = 0.1  # share of all parameters that may stay dense without a warning
_MOST_NAMES = 8  # of tensors of repeated blocks, beyond which they are listed as one
# Class of a wrapper -> where the module is that it wraps. By name: to import them all takes long,
# and not every installation has them.
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
    """A place in a model that holds a parameter: `module.<attribute>`.

    Args:
        module: The module that owns the parameter.
        attribute: Its name in the module, such as `weight`.
        others: Further places that hold the same (tied) parameter.
    """

    module: nn.Module
    attribute: str
    others: tuple[tuple[str, nn.Module, str], ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The leaf that is trained; of a weight under `torch.nn.utils.prune`, its `_orig`."""
        name = f"{self.attribute}_orig" if self.reparametrized else self.attribute
        return self.module.get_parameter(name)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that own the parameter: several if it is tied."""
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
        """Whether `torch.nn.utils.prune` holds a mask on it."""
        return _reparametrized(self.module, self.attribute)


@dataclass(frozen=True)
class Selection:
    """The outcome of `select`.

    Args:
        slots: Qualified name -> place, in the order of `named_parameters()`.
        frozen: What matched but is frozen (`requires_grad=False`), hence left out of `slots`.
        dense: Trained tensors of two or more dimensions that are in neither.
        overlooked: Those of them that no pattern speaks of: if there is no `include`, all but what
            `exclude` leaves out.
        parameters: Number of all parameters of the model.
    """

    slots: Mapping[str, Slot]
    frozen: Mapping[str, Slot]
    dense: Mapping[str, Slot]
    overlooked: Mapping[str, Slot]
    parameters: int

    def describe_dense(self) -> str:
        """Name the tensors that stay dense, in one line, with their share of all parameters.

        Empty if there are none.
        """
        shares = self._shares(self.dense)
        what = "Trained tensors that stay dense (share of all parameters)"
        return f"{what}: {shares}" if shares else ""

    def warn_overlooked(self, stacklevel: int = 3) -> None:
        """Warn if much of the model stays dense though nobody asked for that."""
        share = self._share(self.overlooked, self.overlooked)
        if share > _MOST_DENSE:
            warnings.warn(
                f"{share:.1%} of all parameters are neither pruned nor counted, as they are no "
                "weights of layers that are pruned by default: "
                f"{self._shares(self.overlooked)}; name them in `include`, call `register_layer` "
                "with the type of their layer, or `exclude` what is to stay dense",
                stacklevel=stacklevel,
            )

    def _shares(self, slots: Mapping[str, Slot]) -> str:
        alike: dict[str, list[str]] = {}  # those of repeated blocks under one name, blocks.*.weight
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
    """The modules and parameters of a model, to notice when others take their places.

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
    """The attribute in which a wrapper has what it wraps; None of what is no wrapper.

    Wrappers are `torch.compile`, `DataParallel` and `DistributedDataParallel`, activation
    checkpointing and offloading, `AveragedModel`, what Lightning Fabric sets up, and every module
    whose class names such an attribute in `wraps`.

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
    """`model.named_modules()`, by the names of the plain model.

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

    Canonical names are those of the plain model: without what wrappers put into them, such as
    `torch.compile` (`_orig_mod.`) or a LightningModule that says what it `wraps`, and without the
    `_orig` of `torch.nn.utils.prune`. A tied parameter goes by its first name.

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
    """Refuse layers that wait for the first forward pass to make their parameters.

    Raises:
        ValueError: Naming them.
    """
    lazy = [n for n, m in model.named_modules() if any(map(is_lazy, m._parameters.values()))]
    if lazy:
        raise ValueError(
            "`model` must have all its parameters, got lazy layers that make theirs in the first "
            f"forward pass: {', '.join(lazy)}; run the model once before"
        )


def select(
    model: nn.Module,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
) -> Selection:
    """Choose the parameters to prune.

    Prunable by default are the weights of convolutions, `Linear`, `Bilinear`, recurrent layers,
    the projections of `MultiheadAttention`, and what `register_layer` has added. Tied parameters
    count once, and by default only if they are prunable in every place. Frozen ones are left out.

    Args:
        model: The model.
        include: Globs over qualified names and module types; None stands for all that is prunable
            by default. A glob that says how tensors are called, such as `"*.weight"` or
            `"fc.bias"`, picks all of that name. One that says only where they are, such as
            `"layer1.*"`, picks the weights there: tensors of two or more dimensions that are no
            biases, or else everything. A type, such as `nn.Conv2d`, picks the weights of modules of
            that type.
        exclude: Patterns of what to leave out, biases among it.

    Raises:
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
        # A string is a sequence as well, and of "*.weight" the first glob matches everything.
        if isinstance(patterns, str | type) or not all(isinstance(p, str | type) for p in patterns):
            raise TypeError(
                f"`{argument}` is expected to be a list of globs and module types, but "
                f"{patterns!r} came; put it in brackets, or take the type of a module"
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
            "`include` and `exclude` are expected to leave at least one tensor to prune, but of "
            f"{len(slots)} parameters none is left; widen `include`, or "
            "call `register_layer` with the type of its layers"
        )
    empty = [name for name, slot in selected.items() if slot.parameter.is_meta]
    if empty:
        raise ValueError(
            "`model` must hold its weights, got tensors on the meta device, which have none: "
            f"{', '.join(empty)}; call `model.to_empty(device=...)` and fill them before"
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
    """Qualified name -> the further names of each tensor, under which it is tied."""
    return {name: [other for other, _, _ in slot.others] for name, slot in slots.items()}


def check_kept(before: Mapping[str, list[str]], slots: Mapping[str, Slot]) -> None:
    """Refuse a model in which tensors to prune are gone, or tied otherwise than before.

    Args:
        before: The `ties` of these tensors when they were selected.
        slots: The places that there are now.

    Raises:
        ValueError: Naming them.
    """
    now = ties(slots)
    lost = [name for name, others in before.items() if now.get(name) != others]
    if lost:
        raise ValueError(
            "`model` must keep the tensors that are pruned, and what they are tied to, but not so "
            f"{', '.join(lost)}; make a new Pruner after its layers were replaced"
        )


def check_storage(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Refuse tensors that share memory, so that pruning one of them changes another.

    Args:
        tensors: Qualified name -> what is to be pruned; of a sharded tensor the local part.
        others: What is not to be pruned.

    Raises:
        ValueError: Naming them.
    """
    shared = []
    places: dict[tuple[torch.device, int], list[tuple[str, Tensor]]] = {}
    for name, tensor in (*tensors.items(), *others.items()):
        if not tensor.numel() or tensor.is_meta or not _has_memory(tensor):
            continue
        sizes = zip(tensor.stride(), tensor.shape, strict=True)
        if name in tensors and any(stride == 0 and size > 1 for stride, size in sizes):
            shared.append(f"{name} (entries of its own, as `expand` makes them)")
        else:
            storage = tensor.untyped_storage().data_ptr()
            places.setdefault((tensor.device, storage), []).append((name, tensor))
    for members in places.values():
        for (one, a), (other, b) in combinations(members, 2):
            if (one in tensors or other in tensors) and _overlap(a, b):
                shared.append(f"{one} and {other}")
    if shared:
        raise ValueError(
            "`include` must select tensors with memory of their own, got some that share it: "
            f"{', '.join(shared)}; tie them as one parameter, `exclude` them, or copy one with "
            "`.clone()`"
        )


def _has_memory(tensor: Tensor) -> bool:
    """Whether it is laid out in one storage; not sparse, or made of others as quantised ones."""
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two views of one storage have an entry in common."""
    (first, last), (start, end) = _extent(a), _extent(b)
    if last < start or end < first:  # the usual case, as in a buffer of many parameters
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
    """What a pattern includes: all that it names, or the weights of the modules that it names."""
    matched = matching(pattern, slots)
    named = [name for name in matched if not _names_modules(pattern, name)]
    inside = [name for name in matched if _names_modules(pattern, name)]
    no_bias = [name for name in inside if "bias" not in slots[name].attribute]
    weights = [name for name in no_bias if slots[name].parameter.dim() > 1]
    return named + (weights or (inside if isinstance(pattern, str) else no_bias))


def _names_modules(pattern: Pattern, name: str) -> bool:
    """Whether a pattern would match as well if the tensor had any other name in its module."""
    if isinstance(pattern, type):
        return True
    module, dot, _ = name.rpartition(".")
    return fnmatchcase(f"{module}{dot}\0", pattern)


def matching(pattern: Pattern, slots: Mapping[str, Slot]) -> list[str]:
    """Names of the parameters that a glob or a type of module matches, by any of their names."""

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
            f"`{argument}` pattern {pattern!r} is expected to match a parameter, but matches none; "
            f"near names: {', '.join(hint)}"
        )
    kinds = sorted({type(slot.module).__name__ for slot in slots.values()})
    return (
        f"`{argument}` type {pattern.__name__} is expected to be that of a module with parameters, "
        f"but the model has none; it has: {', '.join(kinds)}"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside `DistributedDataParallel`, `torch.compile` and other wrappers.

    A wrapper to which `fully_shard` was applied stays, as it alone can let go of gathered weights.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(layer)) is unwrap(layer) is layer
        True
    """
    while (attribute := wrapped(model)) is not None and not hasattr(model, "reshard"):
        model = model.get_submodule(attribute)
    return model
