"""Hold masks during training: in place, or by `torch.nn.utils.prune`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize, prune
from torch.optim import Optimizer

from pruneflow.distributed import distribute_like, is_sharded, reshard, to_local
from pruneflow.errors import expect
from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.optimizers import keeps_zeros, state_of
from pruneflow.structure.parameters import NORMS, Places, Slot, check_kept, locate, ties


class Masking(Protocol):
    """How masks are held to during training."""

    @property
    def masks(self) -> MaskSet:
        """The masks that are held now; empty before `attach` and after `remove`."""

    @property
    def raw_masks(self) -> Mapping[str, Tensor]:
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
    the optimizer see surviving weights only. Weights are exactly +0.0 after each step of an
    optimizer that holds them, after `load_state_dict` and in `state_dict`. Masks take one byte a
    weight. A copy holds nothing.

    On the CPU, the steps of elementwise optimizers of `torch.optim` cost no pass over the weights,
    as they leave +0.0 alone. If something else changes weights, gradients or the optimizer's state,
    that is noticed, and masked. PyTorch does not count changes in place through `.data`: those are
    noticed if they change all of a tensor; others stay until all weights are masked, as in
    `state_dict`, in `clear`, by the next round and at the end.

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
        self._held: dict[str, tuple[nn.Parameter, _Mask]] = {}
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
        return MaskSet({name: bits.bool() for name, bits in self.raw_masks.items()})

    @property
    def raw_masks(self) -> Mapping[str, Tensor]:
        """The same without a copy: int8, zero = pruned."""
        return {name: mask.bits for name, (_, mask) in self._held.items()}

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
        for optimizer in optimizers:
            self._step_hooks += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
        for name in masks:
            self._hold(name, slots[name].parameter)
        self._watch(slots)
        _HOLDERS.add(self)
        self.update(masks)

    @torch.no_grad()
    def update(self, masks: MaskSet) -> None:
        """Hold `masks` instead."""
        for name, (parameter, mask) in self._held.items():
            mask.update(masks[name])
            _clear(parameter.detach(), mask.bits)
            mask.clear_gradient(parameter)

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
            for name, (parameter, mask) in list(self._held.items()):
                if slots[name].parameter is not parameter:
                    self._hold(name, slots[name].parameter).update(mask.bits.bool())
            self._watch(slots)
            self.clear()

    @torch.no_grad()
    def clear(self) -> None:
        """Zero the pruned weights again, where something has moved them."""
        for parameter, mask in self._held.values():
            _clear(parameter.detach(), mask.bits)

    def remove(self) -> None:
        """Let go: plain parameters with exact zeros stay, without hooks."""
        self.clear()
        of_modules = (handle for handles in self._state_hooks.values() for handle in handles)
        for handle in (*self._gradient_hooks.values(), *of_modules, *self._step_hooks):
            handle.remove()
        self._held, self._names, self._ties = {}, {}, {}
        self._gradient_hooks, self._state_hooks, self._step_hooks = {}, {}, []
        _let_go(self)

    def _hold(self, name: str, parameter: nn.Parameter) -> _Mask:
        """Hold a parameter under a name; returns its mask, which is still to be filled in."""
        if name in self._held:
            replaced, _ = self._held[name]
            self._gradient_hooks[name].remove()
            del self._names[id(replaced)]
        mask = _Mask(parameter)
        self._held[name], self._names[id(parameter)] = (parameter, mask), name
        trained = parameter.requires_grad  # a frozen tensor takes no hook, and may thaw
        parameter.requires_grad_()
        # Without `self`, which holds the parameter: such a circle would never be freed.
        hook = parameter.register_post_accumulate_grad_hook(mask.clear_gradient)
        self._gradient_hooks[name] = hook
        parameter.requires_grad_(trained)
        return mask

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

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        _, closure = (*args, kwargs.get("closure"))[:2]
        if closure is None or not keeps_zeros(optimizer):
            self._prepare(optimizer)
            return None

        def and_prepare() -> Any:  # gradients are those that the closure leaves
            loss = closure()
            self._prepare(optimizer)
            return loss

        return args[:1], kwargs | {"closure": and_prepare}

    @torch.no_grad()
    def _prepare(self, optimizer: Optimizer) -> None:
        keeps = keeps_zeros(optimizer)
        for parameter, mask in self._held_by(optimizer):
            if keeps and parameter.is_cpu and mask.probe is not None:
                mask.before_step(parameter, state_of(optimizer, parameter))
            else:  # elsewhere a pass costs no more than to find out whether it is needed
                mask.zeros_stay = None

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.refresh()
        for parameter, mask in self._held_by(optimizer):
            mask.after_step(parameter, state_of(optimizer, parameter))

    def _held_by(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, _Mask]]:
        for group in optimizer.param_groups:
            yield from self._among(group["params"])

    def _among(self, parameters: Iterable[Tensor | None]) -> Iterator[tuple[nn.Parameter, _Mask]]:
        for parameter in parameters:
            name = self._names.get(id(parameter))
            if name is not None:
                yield self._held[name]


class _Mask:
    """The mask of one tensor, and what is known of its zeros from one step to the next.

    Elementwise optimizers do the same to all weights that have the same value, gradient and state,
    and leave +0.0 what has neither gradient nor state. So their steps need no pass over the
    weights, if before the step the weight, its gradient and state are zero where pruned. PyTorch
    counts the changes to a tensor; those that have not changed since they were known to be zero
    are zero still. One pruned weight is looked at after each step, and tells of all.
    """

    def __init__(self, parameter: Tensor) -> None:
        # -1 where kept and 0 where pruned: see `_clear`. The same memory layout as the weight, so
        # that each pass runs straight through both.
        self.bits = torch.empty_like(parameter, dtype=torch.int8, requires_grad=False)
        self.zeros_stay: bool | None = None  # through the steps of an optimizer; None = not known
        self.probe: tuple[int, ...] | None = None  # the place of one pruned weight
        self._gradient: list[tuple[ref[Tensor], int]] = []  # as it was masked
        self._state: list[tuple[ref[Tensor], int]] = []  # as the last step left it
        self._version = 0

    def update(self, mask: Tensor) -> None:
        """Take over a bool mask, True = keep."""
        self.bits.copy_(mask).neg_()
        self.zeros_stay = self.probe = None
        if self.bits.is_cpu and not is_sharded(self.bits) and self.bits.numel():
            place = tuple(map(int, torch.unravel_index(self.bits.argmax(), self.bits.shape)))
            self.probe = place if self.bits[place] == 0 else None

    @torch.no_grad()
    def clear_gradient(self, parameter: Tensor) -> None:
        """Zero the gradient where the weight is pruned."""
        gradient = parameter.grad
        if gradient is None:  # a hook before this one may have stepped, and dropped it
            return
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            pruned = self.bits[gradient.indices().unbind()] == 0
            values = gradient.values().masked_fill(pruned, 0)
            parameter.grad = torch.sparse_coo_tensor(
                gradient.indices(),
                values,
                gradient.shape,
                is_coalesced=True,
                check_invariants=False,
            )
        else:
            _clear(gradient.detach(), self.bits)
            if self.zeros_stay:
                self._gradient = _versions([gradient])

    def before_step(self, parameter: Tensor, state: Sequence[Tensor]) -> None:
        """See to it that weight and gradient are masked, and that state leaves them so."""
        known = self.zeros_stay is not None and self._version == parameter._version
        if not (known and _unchanged(self._state, state)):
            _clear(parameter.data, self.bits)
            self.zeros_stay = not any(_has_pruned(value, self.bits) for value in state)
        if self.zeros_stay and parameter.grad is not None:
            if parameter.grad.is_sparse:  # its zeros are not all treated alike
                self.zeros_stay = False
            elif not _unchanged(self._gradient, [parameter.grad]):
                self.clear_gradient(parameter)

    def after_step(self, parameter: Tensor, state: Sequence[Tensor]) -> None:
        """Zero the pruned weights again, unless they are known to be."""
        if not self.zeros_stay or self._has_moved(parameter):
            # `data` has a version of its own, so that autograd does not take this for a change:
            # the optimizer has told it of its own, and of others there are none.
            _clear(parameter.data, self.bits)
            self.zeros_stay = None if self.zeros_stay is None else False
        self._version, self._state, self._gradient = parameter._version, _versions(state), []

    def _has_moved(self, parameter: Tensor) -> bool:
        weight = parameter.detach()[self.probe].item()
        negative = (math.copysign(1, part) < 0 for part in (weight.real, weight.imag))
        return weight != 0 or any(negative)


def _versions(tensors: Iterable[Tensor]) -> list[tuple[ref[Tensor], int]]:
    # Weak, as gradients and state are freed when others let go of them.
    return [(ref(tensor), tensor._version) for tensor in tensors]


def _unchanged(versions: Sequence[tuple[ref[Tensor], int]], tensors: Sequence[Tensor]) -> bool:
    return len(versions) == len(tensors) and all(
        known() is tensor and version == tensor._version
        for (known, version), tensor in zip(versions, tensors, strict=True)
    )


class _Clearing:
    """Masks what a module has, as its state is loaded or read; of no effect in a copy of it."""

    def __init__(self, masking: InPlace | None = None, *, refresh: bool = False) -> None:
        self._masking, self._refresh = masking, refresh

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if self._masking is not None:
            if self._refresh:
                self._masking.refresh()
            for parameter, mask in self._masking._among(module._parameters.values()):
                _clear(parameter.data, mask.bits)

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
        return MaskSet({name: mask.bool() for name, mask in self.raw_masks.items()})

    @property
    def raw_masks(self) -> Mapping[str, Tensor]:
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
        expect(
            not refused,
            "masking",
            "be able to hold every tensor to prune",
            f"Reparametrize, which cannot hold {', '.join(refused)}",
            "use masking=InPlace(), or `exclude` them",
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
            weight = to_local(slots[name].parameter.detach())
            pruned = ~to_local(distribute_like(mask, slots[name].parameter))
            moved |= bool((weight[pruned] != 0).any())
            weight.masked_fill_(pruned, 0)
    return moved


# Those that hold something; weak, or models would never be freed. Parameters have no part in it, as
# torch cannot convert (`swap_tensors`) what has weak references.
_HOLDERS: WeakSet[InPlace | Reparametrize] = WeakSet()


def masks_of_others(parameter: Tensor, masking: Masking) -> list[Tensor]:
    """The masks that others than `masking` hold on a parameter, zero = pruned."""
    others = [(each, each._names.get(id(parameter))) for each in _HOLDERS if each is not masking]
    return [each.raw_masks[name] for each, name in others if name is not None]


_PIECE = 2**18  # weights
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _clear(tensor: Tensor, bits: Tensor) -> None:
    """Zero a dense tensor where the bits are 0."""
    tensor, bits = to_local(tensor), to_local(bits)
    if bits.device != tensor.device:  # `model.to(device)` leaves the parameter the same
        bits.data = bits.to(tensor.device)
    if tensor.is_complex():
        tensor.masked_fill_(bits == 0, 0)
        return
    # A float AND -1 (all bits set) is itself and a float AND 0 is +0.0, also where it was NaN,
    # infinite or negative.
    integers = tensor.view(_INTEGER_OF_SIZE[tensor.element_size()])
    for piece, bits_of_piece in _pieces(integers, bits):
        piece.bitwise_and_(bits_of_piece)


def _has_pruned(tensor: Tensor, bits: Tensor) -> bool:
    """Whether anything that is pruned is not zero."""
    if tensor.layout != torch.strided:
        return True
    return any(bool(((t != 0) & (b == 0)).any()) for t, b in _pieces(tensor, bits))


def _pieces(tensor: Tensor, bits: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Parts that fit into the cache of a CPU, which makes copies of the bits in the other dtype."""
    if not tensor.is_cpu or tensor.numel() <= _PIECE:
        return [(tensor, bits)]
    rows = max(1, _PIECE * len(tensor) // tensor.numel())
    return zip(tensor.split(rows), bits.split(rows), strict=True)


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
