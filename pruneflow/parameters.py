"""Which: the tensors of a model that can be pruned, by glob over their names and by module type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Pattern = str | type[nn.Module]

_WEIGHT_MODULES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Bilinear,
)
_RECURRENT_MODULES = (nn.RNNBase, nn.RNNCellBase)
NORMS = (WeightNorm, SpectralNorm)  # hooks of the older form, from before parametrizations
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
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
    """

    slots: Mapping[str, Slot]
    frozen: Mapping[str, Slot]


def wrapped(module: nn.Module) -> str | None:
    """The attribute in which a wrapper has what it wraps; None of what is no wrapper.

    Wrappers are `torch.compile`, `DataParallel` and `DistributedDataParallel`, activation
    checkpointing and offloading, `AveragedModel`, and what Lightning Fabric sets up.
    """
    for kind in type(module).__mro__:
        attribute = _WRAPPERS.get(kind.__name__)
        if attribute in module._modules:
            return attribute
    return None


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
    `torch.compile` (`_orig_mod.`), and without the `_orig` of `torch.nn.utils.prune`. A tied
    parameter goes by its first name.

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


def select(
    model: nn.Module,
    include: Sequence[Pattern] | None = None,
    exclude: Sequence[Pattern] = (),
) -> Selection:
    """Choose the parameters to prune.

    Prunable by default are the weights of convolutions, `Linear`, `Bilinear`, recurrent layers
    (`weight_ih*`, `weight_hh*`) and the projections of `MultiheadAttention`. Tied parameters count
    once, and by default only if they are prunable in every place. Frozen ones are left out.

    Args:
        model: The model.
        include: Globs over qualified names (`"layer1.*"`) and module types (`nn.Conv2d`); None
            stands for all that is prunable by default. A pattern that matches tensors prunable by
            default picks those alone; one that matches none of them picks whatever it names, such
            as `"*.bias"` or `nn.Embedding`.
        exclude: Patterns of what to leave out.

    Raises:
        ValueError: If a pattern matches nothing, or nothing is left to prune.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))
        >>> list(select(model).slots)
        ['0.weight', '2.weight']
        >>> list(select(model, include=("*.weight", "*.bias"), exclude=(nn.Linear,)).slots)
        ['0.weight', '0.bias', '1.bias']
    """
    for argument, patterns in (("include", include or ()), ("exclude", exclude)):
        # A string is a sequence as well, and of "*.weight" the first glob matches everything.
        if isinstance(patterns, str | type) or not all(isinstance(p, str | type) for p in patterns):
            raise TypeError(
                f"`{argument}` is expected to be a list of globs and module types, but "
                f"{patterns!r} came; put it in brackets, or take the type of a module"
            )
    slots = locate(model)
    default = [name for name, slot in slots.items() if _prunable_by_default(slot)]
    chosen = set(default)
    unmatched = []
    if include is not None:
        chosen = set()
        for pattern in include:
            matched = _matching(pattern, slots, default) or _matching(pattern, slots, slots)
            chosen.update(matched)
            if not matched:
                unmatched.append(("include", pattern))
    for pattern in exclude:
        matched = _matching(pattern, slots, slots)
        chosen.difference_update(matched)
        if not matched:
            unmatched.append(("exclude", pattern))
    if unmatched:
        raise ValueError(
            "\n".join(_no_match(argument, pattern, slots) for argument, pattern in unmatched)
        )
    selected = {name: slot for name, slot in slots.items() if name in chosen}
    if not selected:
        raise ValueError(
            "`include` and `exclude` are expected to leave at least one tensor to prune, but of "
            f"{len(slots)} parameters none is left; widen `include`"
        )
    frozen = {name: slot for name, slot in selected.items() if not slot.parameter.requires_grad}
    return Selection({n: slot for n, slot in selected.items() if n not in frozen}, frozen)


def check_computed(model: nn.Module, exclude: Sequence[Pattern]) -> None:
    """Refuse weights that are computed from other parameters and would silently stay dense.

    Raises:
        ValueError: Naming each, and what it is computed from.
    """
    slots = locate(model)
    excluded = {name for pattern in exclude for name in _matching(pattern, slots, slots)}
    trained = [n for n, s in slots.items() if s.parameter.requires_grad and n not in excluded]
    computed = []
    for prefix, module in named_modules(model):
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, NORMS)]
        for attribute in (*getattr(module, "parametrizations", ()), *(h.name for h in hooks)):
            path = f"{prefix}." if prefix else ""
            own = (f"{path}parametrizations.{attribute}.", f"{path}{attribute}_")
            sources = [name for name in trained if name.startswith(own)]
            if _is_weight(module, attribute) and sources:
                computed.append(f"{path}{attribute} (from {', '.join(sources)})")
    if computed:
        raise ValueError(
            "`include` is expected to say what to prune where weights are computed from other "
            f"parameters: {'; '.join(computed)}; include those whose zeros the weight shares, as "
            "in weight_norm and spectral_norm, or `exclude` them"
        )


def _reparametrized(module: nn.Module, attribute: str) -> bool:
    return f"{attribute}_orig" in module._parameters and f"{attribute}_mask" in module._buffers


def _prunable_by_default(slot: Slot) -> bool:
    places = [(slot.module, slot.attribute), *((m, attribute) for _, m, attribute in slot.others)]
    return slot.parameter.is_floating_point() and all(_is_weight(*place) for place in places)


def _is_weight(module: nn.Module, attribute: str) -> bool:
    if isinstance(module, _WEIGHT_MODULES):
        return attribute == "weight"
    if isinstance(module, _RECURRENT_MODULES):
        return attribute.startswith(("weight_ih", "weight_hh"))
    return isinstance(module, nn.MultiheadAttention) and attribute in _ATTENTION_WEIGHTS


def _matching(pattern: Pattern, slots: Mapping[str, Slot], names: Iterable[str]) -> list[str]:
    def matches(name: str, module: nn.Module) -> bool:
        if isinstance(pattern, str):
            return fnmatchcase(name, pattern)
        return isinstance(module, pattern)

    return [
        name
        for name in names
        if matches(name, slots[name].module)
        or any(matches(other, module) for other, module, _ in slots[name].others)
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
