"""Hold masks during training: in place, or by `torch.nn.utils.prune`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize, prune
from torch.optim import Optimizer

from pruneflow.masks import MaskSet
from pruneflow.parameters import NORMS, Slot, locate
from pruneflow.processes import is_sharded, local


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

    def remove(self) -> None:
        """Let go: plain parameters with exact zeros stay, without hooks or buffers."""


class InPlace:
    """Zero pruned weights where they are; the parameters and the `state_dict` stay the dense ones'.

    Gradients are masked as soon as autograd has accumulated them, so that clipping, momentum and
    the optimizer see surviving weights only, and weights once more after each optimizer step, so
    that they are exactly +0.0 whatever the optimizer did. Masks take one byte a weight.

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
        self._handles: list[Any] = []

    @property
    def masks(self) -> MaskSet:
        """The masks that are held now."""
        return MaskSet({name: bits.bool() for name, bits in self.held.items()})

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The same without a copy: int8, zero = pruned."""
        return {name: bits for name, (_, bits) in self._held.items()}

    def check(self, model: nn.Module, names: Iterable[str]) -> None:
        """Refuse tensors with sparse gradients.

        Raises:
            ValueError: Naming them.
        """
        slots = locate(model)
        sparse = [name for name in names if getattr(slots[name].module, "sparse", False)]
        if sparse:
            raise ValueError(
                "`masking` InPlace is expected to get tensors with dense gradients, but those of "
                f"{', '.join(sparse)} are sparse; set `sparse=False` there, or `exclude` them"
            )

    def attach(self, model: nn.Module, masks: MaskSet, optimizers: Sequence[Optimizer]) -> None:
        """Begin to hold `masks`, once the optimizers exist.

        Raises:
            ValueError: If the masks do not fit the model, or gradients are sparse.
        """
        slots = locate(model)
        masks.check({name: slot.parameter for name, slot in slots.items()})
        self.check(model, masks)
        for name in masks:
            parameter = slots[name].parameter
            # The same memory layout as the weight, so that each pass runs straight through both.
            bits = torch.empty_like(parameter, dtype=torch.int8, requires_grad=False)
            self._held[name] = (parameter, bits)
            trained = parameter.requires_grad  # a frozen tensor takes no hook, and may thaw
            parameter.requires_grad_()
            hook = partial(_clear_gradient, bits)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
            parameter.requires_grad_(trained)
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self.update(masks)

    @torch.no_grad()
    def update(self, masks: MaskSet) -> None:
        """Hold `masks` instead."""
        for name, (parameter, bits) in self._held.items():
            bits.copy_(masks[name]).neg_()
            _clear(parameter, bits)
            if parameter.grad is not None:
                _clear(parameter.grad, bits)

    def remove(self) -> None:
        """Let go: plain parameters with exact zeros stay, without hooks."""
        self._after_step()  # something other than an optimizer may have moved weights since
        for handle in self._handles:
            handle.remove()
        self._held, self._handles = {}, []

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for parameter, bits in self._held.values():
            _clear(parameter, bits)


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
        self._slots, self._order, self._handles = {}, {}, []


_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _clear(tensor: Tensor, bits: Tensor) -> None:
    # A float AND -1 (all bits set) is itself and a float AND 0 is +0.0, also where it was NaN,
    # infinite or negative. On CPU this is several times faster than `mul_` or `masked_fill_` with a
    # bool mask of the same size.
    integers = local(tensor.detach()).view(_INTEGER_OF_SIZE[tensor.element_size()])
    integers.bitwise_and_(local(bits))


def _clear_gradient(bits: Tensor, parameter: Tensor) -> None:
    assert parameter.grad is not None  # autograd has just accumulated it
    _clear(parameter.grad, bits)


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
