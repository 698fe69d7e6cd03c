"""Hold masks during training: in place, or by `torch.nn.utils.prune`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize, prune
from torch.optim import Optimizer

from pruneflow.distributed import is_sharded, local, place, reshard
from pruneflow.pruning.masks import MaskSet
from pruneflow.structure.parameters import NORMS, Places, Slot, check_kept, locate, ties


class Masking(Protocol):
    """How masks are held to during training."""

    @property
    def masks(self) -> MaskSet:
        """The masks that are held now; empty before `attach` and after `remove`."""

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The same without a copy, of whatever dtype they are held in, zero = pruned."""

    def check(self, model: nn.Module, names: Iterable[str]) -> None:
        """Refuse tensors that cannot be held, before anything is trained."""

    def attach(self, model: nn.Module, masks: MaskSet, optimizers: Sequence[Optimizer]) -> None:
        """Begin to hold `masks`, once the optimizers exist."""

    def update(self, masks: MaskSet) -> None:
        """Hold `masks`, of the same names, instead."""

    def refresh(self) -> None:
        """Hold the parameters that the model has now, where others have taken their places."""

    def remove(self) -> None:
        """Let go: plain parameters with exact zeros stay, without hooks or buffers."""


class InPlace:
    """Zero pruned weights where they are; the parameters and the `state_dict` stay the dense ones'.

    Gradients are masked as soon as autograd has accumulated them, so that clipping, momentum and
    the optimizer see surviving weights only. Weights are masked after each step of an optimizer
    that holds them, after `load_state_dict` and before `state_dict`, so that they are exactly +0.0
    whatever was done to them. Masks take one byte a weight. A copy holds nothing.

    Example:
        >>> layer = nn.Linear(3, 1)
        >>> masking = InPlace()
        >>> masking.attach(layer, MaskSet({"weight": torch.tensor([[True, False, True]])}), [])
        >>> layer.weight[0, 1].item(), list(layer.state_dict())
        (0.0, ['weight', 'bias'])
        >>> layer(torch.ones(3)).sum().backward(); layer.weight.grad
        tensor([[1., 0., 1.]])
        >>> masking.remove()
    """

    def __init__(self) -> None:
        # name -> (parameter, keep bits); int8, -1 where kept and 0 where pruned: see `_clear`.
        self._held: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._names: dict[int, str] = {}  # by the id of the parameter
        self._ties: dict[str, list[str]] = {}
        self._gradient_hooks: dict[str, Any] = {}  # by name
        self._state_hooks: dict[nn.Module, list[Any]] = {}  # by the module that has a held one
        self._step_hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(InPlace())  # neither hooks nor ids are those of a copy

    @property
    def masks(self) -> MaskSet:
        """The masks that are held now."""
        return MaskSet({name: bits.bool() for name, bits in self.held.items()})

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The same without a copy: int8, zero = pruned."""
        return {name: bits for name, (_, bits) in self._held.items()}

    def check(self, model: nn.Module, names: Iterable[str]) -> None:
        """Refuse nothing: any tensor can be held."""

    def attach(self, model: nn.Module, masks: MaskSet, optimizers: Sequence[Optimizer]) -> None:
        """Begin to hold `masks`, once the optimizers exist.

        Raises:
            ValueError: If the masks do not fit the model.
        """
        slots = locate(model)
        masks.check({name: slot.parameter for name, slot in slots.items()})
        self._model = model
        self._step_hooks = [o.register_step_post_hook(self._after_step) for o in optimizers]
        for name in masks:
            self._hold(name, slots[name].parameter)
        self._watch(slots)
        _HOLDERS.add(self)
        self.update(masks)

    @torch.no_grad()
    def update(self, masks: MaskSet) -> None:
        """Hold `masks` instead."""
        for name, (parameter, bits) in self._held.items():
            bits.copy_(masks[name]).neg_()
            _clear(parameter.detach(), bits)
            _clear_gradient(bits, parameter)

    def refresh(self) -> None:
        """Hold the parameters that the model has now, where others have taken their places.

        Raises:
            ValueError: If the model has no such tensor any more, one of another shape, or one that
                is tied to others.
        """
        if self._held and self._places.changed():
            reshard(self._model)
            slots = locate(self._model)
            check_kept(self._ties, slots)
            self.masks.check({name: slot.parameter for name, slot in slots.items()})
            for name, (parameter, bits) in list(self._held.items()):
                if slots[name].parameter is not parameter:
                    self._hold(name, slots[name].parameter).copy_(bits)
            self._watch(slots)
            self.clear()

    @torch.no_grad()
    def clear(self) -> None:
        """Zero the pruned weights again, where something has moved them."""
        for parameter, bits in self._held.values():
            _clear(parameter.detach(), bits)

    def remove(self) -> None:
        """Let go: plain parameters with exact zeros stay, without hooks."""
        self.clear()
        of_modules = (handle for handles in self._state_hooks.values() for handle in handles)
        for handle in (*self._gradient_hooks.values(), *of_modules, *self._step_hooks):
            handle.remove()
        self._held, self._names, self._ties = {}, {}, {}
        self._gradient_hooks, self._state_hooks, self._step_hooks = {}, {}, []
        _let_go(self)

    def _hold(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Hold a parameter under a name; returns its bits, which are still to be filled in."""
        if name in self._held:
            replaced, _ = self._held[name]
            self._gradient_hooks[name].remove()
            del self._names[id(replaced)]
        # The same memory layout as the weight, so that each pass runs straight through both.
        bits = torch.empty_like(parameter, dtype=torch.int8, requires_grad=False)
        self._held[name], self._names[id(parameter)] = (parameter, bits), name
        trained = parameter.requires_grad  # a frozen tensor takes no hook, and may thaw
        parameter.requires_grad_()
        # Without `self`, which holds the parameter: such a circle would never be freed.
        hook = partial(_clear_gradient, bits)
        self._gradient_hooks[name] = parameter.register_post_accumulate_grad_hook(hook)
        parameter.requires_grad_(trained)
        return bits

    def _watch(self, slots: Mapping[str, Slot]) -> None:
        """Notice what is loaded into the held parameters or read, and what takes their places."""
        held = {name: slots[name] for name in self._held}
        self._ties = ties(held)
        owners = {module for slot in held.values() for module in slot.modules}
        for module in self._state_hooks.keys() - owners:
            for handle in self._state_hooks.pop(module):
                handle.remove()
        for module in owners - self._state_hooks.keys():
            self._state_hooks[module] = [
                module.register_load_state_dict_post_hook(_Clearing(self, refresh=True)),
                module.register_state_dict_pre_hook(_Clearing(self)),
            ]
        self._places = Places(self._model)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.refresh()
        for group in optimizer.param_groups:
            self._clear_those_of(group["params"])

    def _clear_those_of(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            name = self._names.get(id(parameter))
            if name is not None:
                # `data` has a version of its own, so that autograd does not take this for a change:
                # the optimizer has told it of its own, and of others there are none.
                _clear(parameter.data, self._held[name][1])


class _Clearing:
    """Masks what a module has, as its state is loaded or read; of no effect in a copy of it."""

    def __init__(self, masking: InPlace | None = None, *, refresh: bool = False) -> None:
        self._masking, self._refresh = masking, refresh

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if self._masking is not None:
            if self._refresh:
                self._masking.refresh()
            self._masking._clear_those_of(p for p in module._parameters.values() if p is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Clearing:
        return _Clearing()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Clearing, ()


class Reparametrize:
    """Hold masks the way `torch.nn.utils.prune` does: `<name>_orig`, `<name>_mask` and a hook.

    For code that expects it. One mask and one hook are alive however many rounds there are, and
    `state_dict()` and `load_state_dict()` keep the plain keys of the dense model.

    Example:
        >>> layer = nn.Linear(3, 1)
        >>> masking = Reparametrize()
        >>> masking.attach(layer, MaskSet({"weight": torch.tensor([[True, False, True]])}), [])
        >>> prune.is_pruned(layer), [name for name, _ in layer.named_parameters()]
        (True, ['bias', 'weight_orig'])
        >>> masking.remove(); [name for name, _ in layer.named_parameters()]
        ['weight', 'bias']
    """

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}
        self._names: dict[int, str] = {}  # by the id of the parameter
        self._order: dict[nn.Module, list[str]] = {}
        self._handles: list[Any] = []

    @property
    def masks(self) -> MaskSet:
        """The masks that are held now."""
        return MaskSet({name: mask.bool() for name, mask in self.held.items()})

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The same without a copy: `torch.nn.utils.prune`'s own buffers."""
        return {name: _mask(slot) for name, slot in self._slots.items()}

    def check(self, model: nn.Module, names: Iterable[str]) -> None:
        """Refuse tensors that cannot be reparametrized.

        Raises:
            ValueError: Naming them: tied weights, MultiheadAttention's `out_proj`, parametrized
                and sharded tensors, and what `torch.nn.utils.prune` already holds.
        """
        slots = locate(model)
        refused = [f"{name} ({why})" for name in names if (why := _refusal(slots[name]))]
        if refused:
            raise ValueError(
                "`masking` Reparametrize is expected to get tensors that torch.nn.utils.prune can "
                f"hold, but cannot hold {', '.join(refused)}; use masking=InPlace(), or `exclude` "
                "them"
            )

    def attach(self, model: nn.Module, masks: MaskSet, optimizers: Sequence[Optimizer]) -> None:
        """Begin to hold `masks`, once the optimizers exist.

        Raises:
            ValueError: If the masks do not fit the model, or a tensor cannot be reparametrized.
        """
        slots = locate(model)
        masks.check({name: slot.parameter for name, slot in slots.items()})
        self.check(model, masks)
        self._model = model
        for name in masks:
            slot = self._slots[name] = slots[name]
            self._order.setdefault(slot.module, list(slot.module._parameters))
            prune.identity(slot.module, slot.attribute)
            slot.module.__dict__["__deepcopy__"] = _refuse_to_copy
            self._handles += [
                slot.module.register_state_dict_post_hook(partial(_fold_keys, slot.attribute)),
                slot.module.register_load_state_dict_pre_hook(
                    partial(_unfold_keys, slot.attribute)
                ),
            ]
        self._names = {id(slot.parameter): name for name, slot in self._slots.items()}
        self._places = Places(model)
        _HOLDERS.add(self)
        self.update(masks)

    @torch.no_grad()
    def update(self, masks: MaskSet) -> None:
        """Hold `masks` instead."""
        for name, slot in self._slots.items():
            _mask(slot).copy_(masks[name])
            # Zero, not only hidden: what is hidden drifts under weight decay (and `keep` says so).
            slot.parameter.masked_fill_(~masks[name], 0)
            if slot.parameter.grad is not None:
                slot.parameter.grad.masked_fill_(~masks[name], 0)
            setattr(slot.module, slot.attribute, slot.weight)

    def refresh(self) -> None:
        """Hold the parameters that the model has now, where other modules have taken their places.

        Raises:
            ValueError: If the model has no such tensor any more, one of another shape, or one that
                is tied to others.
        """
        if self._slots and self._places.changed():
            masks, model = self.masks, self._model
            slots = locate(model)
            check_kept(ties(self._slots), slots)
            masks.check({name: slot.parameter for name, slot in slots.items()})
            self.remove()
            self.attach(model, masks, [])

    def remove(self) -> None:
        """Let go: plain parameters with exact zeros, in the order they had before."""
        self.update(self.masks)  # what torch has only hidden may be -0.0
        for handle in self._handles:
            handle.remove()
        for slot in self._slots.values():
            prune.remove(slot.module, slot.attribute)
        for module, order in self._order.items():
            del module.__dict__["__deepcopy__"]
            for attribute in order:
                module._parameters[attribute] = module._parameters.pop(attribute)
        self._slots, self._names, self._order, self._handles = {}, {}, {}, []
        _let_go(self)


def _let_go(masking: InPlace | Reparametrize) -> None:
    """Keep no model alive that is held no longer."""
    _HOLDERS.discard(masking)
    vars(masking).pop("_model", None)
    vars(masking).pop("_places", None)


@torch.no_grad()
def clear(model: nn.Module, masks: MaskSet) -> bool:
    """Zero what is pruned in a model that is no longer held; returns whether any was not zero.

    Tensors that the model has not, or with other shapes, are passed over.
    """
    slots, moved = locate(model), False
    for name, mask in masks.items():
        if name in slots and slots[name].parameter.shape == mask.shape:
            weight = local(slots[name].parameter.detach())
            pruned = ~local(place(mask, slots[name].parameter))
            moved |= bool((weight[pruned] != 0).any())
            weight.masked_fill_(pruned, 0)
    return moved


# Those that hold something; weak, or models would never be freed. Parameters have no part in it, as
# torch cannot convert (`swap_tensors`) what has weak references.
_HOLDERS: WeakSet[InPlace | Reparametrize] = WeakSet()


def held_elsewhere(parameter: Tensor, masking: Masking) -> list[Tensor]:
    """The masks that others than `masking` hold on a parameter, zero = pruned."""
    others = [(each, each._names.get(id(parameter))) for each in _HOLDERS if each is not masking]
    return [each.held[name] for each, name in others if name is not None]


_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _clear(tensor: Tensor, bits: Tensor) -> None:
    """Zero a dense tensor where the bits are 0."""
    tensor, bits = local(tensor), local(bits)
    if bits.device != tensor.device:  # `model.to(device)` leaves the parameter the same
        bits.data = bits.to(tensor.device)
    if tensor.is_complex():
        tensor.masked_fill_(bits == 0, 0)
        return
    # A float AND -1 (all bits set) is itself and a float AND 0 is +0.0, also where it was NaN,
    # infinite or negative. On CPU this is several times faster than `mul_` or `masked_fill_` with a
    # bool mask of the same size.
    tensor.view(_INTEGER_OF_SIZE[tensor.element_size()]).bitwise_and_(bits)


@torch.no_grad()
def _clear_gradient(bits: Tensor, parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is None:  # a hook before this one may have stepped, and dropped it
        return
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        pruned = bits[gradient.indices().unbind()] == 0
        values = gradient.values().masked_fill(pruned, 0)
        parameter.grad = torch.sparse_coo_tensor(
            gradient.indices(),
            values,
            gradient.shape,
            is_coalesced=True,
            check_invariants=False,
        )
    else:
        _clear(gradient.detach(), bits)


def _mask(slot: Slot) -> Tensor:
    return slot.module.get_buffer(f"{slot.attribute}_mask")


def _refusal(slot: Slot) -> str | None:
    if is_sharded(slot.parameter):
        return "it is sharded"
    if slot.others:
        return f"tied to {slot.others[0][0]}"
    if isinstance(slot.module, NonDynamicallyQuantizableLinear):
        return "MultiheadAttention reads its out_proj without calling it"
    if (
        parametrize.is_parametrized(slot.module)
        or isinstance(slot.module, parametrize.ParametrizationList)
        or any(isinstance(hook, NORMS) for hook in slot.module._forward_pre_hooks.values())
    ):
        return "its module is parametrized"
    if slot.reparametrized:
        return "torch.nn.utils.prune already holds it"
    return None


def _refuse_to_copy(memo: dict[int, Any]) -> None:
    raise RuntimeError(
        "a module whose masks Reparametrize holds cannot be copied (torch.nn.utils.prune keeps its "
        "weight as an intermediate result); use masking=InPlace(), or copy after `remove()`"
    )


def _fold_keys(
    attribute: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    original = state_dict.pop(f"{prefix}{attribute}_orig")
    weight = original * state_dict.pop(f"{prefix}{attribute}_mask")
    state_dict[f"{prefix}{attribute}"] = weight + 0  # not -0.0, where kept momentum moved it


def _unfold_keys(
    attribute: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    if f"{prefix}{attribute}" in state_dict:
        state_dict[f"{prefix}{attribute}_orig"] = state_dict.pop(f"{prefix}{attribute}")
        state_dict[f"{prefix}{attribute}_mask"] = module.get_buffer(f"{attribute}_mask")
