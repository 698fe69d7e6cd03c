"""One round: parameters -> importance -> masks -> masking. No Lightning here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruneflow.distributed import check_placements, decide, local, place, reshard, whole
from pruneflow.pruning.distribution import Scope, resolve_scope
from pruneflow.pruning.granularity import Granularity
from pruneflow.pruning.granularity.blocks import Block
from pruneflow.pruning.granularity.channels import Channels, CoupledChannels
from pruneflow.pruning.granularity.nm import NM
from pruneflow.pruning.importance import Importance, magnitude
from pruneflow.pruning.masking import InPlace, Masking, held_elsewhere
from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.optimizers import (
    OptimizerState,
    check_held,
    check_optimizer_state,
    plain_optimizers,
    settle_optimizer_state,
)
from pruneflow.pruning.selection import check_costs, check_units, compute_masks
from pruneflow.pruning.torch_methods import (
    TorchMethod,
    check_alone,
    check_scope,
    is_torch_method,
    keeps_own_amount,
    torch_masks,
)
from pruneflow.structure.computed import check_computed, check_zeros_stay
from pruneflow.structure.parameters import (
    Pattern,
    Slot,
    check_kept,
    check_storage,
    locate,
    select,
    ties,
    unwrap,
)


class Pruner:
    """Prune a model in any training loop, and hold the zeros through `optimizer.step()`.

    Where several processes train the model, each of them makes a Pruner and calls it alike; all
    get the same masks.

    Args:
        model: The model; also in `DistributedDataParallel`, or sharded by `fully_shard`.
        importance: Scores, higher = keep: `magnitude`, `taylor` (after `loss.backward()`),
            `Random(seed)`, `Given(scores)` or any function `(name, tensor, context) -> scores`; or
            a `BasePruningMethod` of `torch.nn.utils.prune`, as class (driven by `prune_to`) or
            instance (keeps its own amount: `prune`).
        granularity: What is removed together: `NM(2, 4)`, `Block(1, 16)` or whole
            `Channels(example_input)`; None for each weight by itself.
        costs: Qualified name -> cost of each weight of that tensor, such as
            `multiply_adds(model, example_input)`; then targets are fractions of all costs.
        scope: What competes together: `"global"`, `"layer"`, or group name -> globs.
        include: What to prune; None for what is prunable by default. See `parameters.select`.
        exclude: What to leave out.
        optimizers: The optimizers of the training. `[]` says that there is none; None warns,
            since the zeros do not hold through a training whose optimizers are not known.
        masking: How masks are held; `InPlace()` unless given.
        optimizer_state: What happens to momentum and the like after each prune: `"zero_pruned"`
            zeroes it where weights are pruned, `"reset"` forgets all of it, `"keep"` leaves it.

    Raises:
        ValueError: If a pattern or the scope does not fit the model, a tensor to prune is in none
            of the optimizers, shares memory with another, is computed anew by `forward` or under
            `torch.nn.utils.prune`, or `optimizer_state` is unknown.
        TypeError: If an argument is no such thing at all, such as a class for an object.

    Warns:
        UserWarning: If `optimizers` is None; if more than a tenth of all parameters stays dense
            that neither `include` nor `exclude` speaks of; and when nothing is left of a tensor.

    Example:
        >>> import torch
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = Pruner(model, optimizers=[optimizer])
        >>> pruner.prune_to(0.5)
        MaskSet(1 tensors, 50 of 100 weights pruned)
        >>> model(torch.randn(4, 10)).square().sum().backward(); optimizer.step()
        >>> int((model.weight == 0).sum())
        50
        >>> pruner.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        importance: Importance | TorchMethod = magnitude,
        granularity: Granularity | None = None,
        costs: Mapping[str, float] | None = None,
        scope: Scope = "global",
        include: Sequence[Pattern] | None = None,
        exclude: Sequence[Pattern] = (),
        optimizers: Sequence[Optimizer] | None = None,
        masking: Masking | None = None,
        optimizer_state: OptimizerState = "zero_pruned",
    ) -> None:
        check_optimizer_state(optimizer_state)
        check_kinds(model, importance, granularity, costs, masking)
        plain = plain_optimizers(optimizers or ())
        self.model = unwrap(model)
        reshard(self.model)
        self.importance = importance
        self.scope = scope
        self.masking: Masking = InPlace() if masking is None else masking
        self.optimizer_state = optimizer_state
        if include is None:
            check_computed(self.model, exclude)
        selection = select(self.model, include, exclude)
        self.frozen = tuple(selection.frozen)
        if not selection.slots:
            raise ValueError(
                "`model` is expected to have trainable weights to prune, but all are frozen "
                f"({', '.join(self.frozen)}); set `requires_grad=True` on what is to be pruned"
            )
        held = [name for name, slot in selection.slots.items() if slot.reparametrized]
        if held:
            raise ValueError(
                f"`model` is expected to be plain, but torch.nn.utils.prune holds {', '.join(held)}"
                "; call `fold_model(model)` first, and go on with its zeros (`from_zeros=True`, or "
                "`Pruner.hold_zeros()`)"
            )
        check_zeros_stay(selection.slots)
        selection.warn_overlooked()
        self.selection = selection
        self._names = tuple(selection.slots)
        resolve_scope(scope, self._names)
        self.granularity, self.costs = granularity, costs
        self._couple()
        self.masking.check(self.model, self._parameters)
        check_placements(self._parameters)
        check_units(self._parameters, self._units, scope)
        self.check(0.0)
        if is_torch_method(importance):
            check_scope(importance, scope)
            check_alone(importance, self._parameters, granularity, costs)
        if optimizers is None:
            warnings.warn(
                "`optimizers` was not given to Pruner, so pruned weights will not stay zero "
                "through training; give the list of your optimizers, or [] if there is no training",
                stacklevel=2,
            )
        elif plain:
            self._check_held(self._parameters, plain)
        self._optimizers = plain
        self._attached = False

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_attached": False}  # a copy holds nothing, as its masking

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of the tensors to prune, and of those that lose entries with them."""
        return tuple(self._parameters)

    @property
    def scored(self) -> tuple[str, ...]:
        """Qualified names of the tensors to prune alone: what targets count."""
        return self._names

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(self._parameters[name].numel() for name in self._names)

    @property
    def removed(self) -> float:
        """Fraction of the prunable weights, or of their costs, that is pruned now."""
        price = check_costs(self.costs, self._names)
        gone = {name: MaskSet({name: mask}).pruned for name, mask in self.weight_masks.items()}
        total = sum(price[name] * self._parameters[name].numel() for name in self._names)
        return sum(price[name] * count for name, count in gone.items()) / total if total else 0.0

    @property
    def unfrozen(self) -> tuple[str, ...]:
        """Names of the frozen tensors that are trained by now, and that the next round takes in."""
        slots = locate(self.model)
        return tuple(name for name in self.frozen if slots[name].parameter.requires_grad)

    @property
    def masks(self) -> MaskSet:
        """The masks that are held now; empty before the first prune and after `remove`."""
        return self.masking.masks

    @property
    def weight_masks(self) -> MaskSet:
        """The masks of the tensors to prune alone."""
        return MaskSet({name: mask for name, mask in self.masks.items() if name in self._names})

    def check(self, sparsity: float | None) -> None:
        """Refuse a target that the granularity cannot reach, before anything is trained.

        Args:
            sparsity: The target; None where it is not known ahead.

        Raises:
            ValueError: If it is more than can be.
        """
        price = check_costs(self.costs, self._names)
        if isinstance(self._units, NM):
            self._units.check({n: self._parameters[n].shape for n in self._names}, sparsity or 0.0)
        elif isinstance(self._units, CoupledChannels):
            self._units.check(price, sparsity or 0.0)

    def writers(self, name: str) -> tuple[str, ...]:
        """Names of the tensors to prune whose channels take entries of this tensor with them."""
        return self._units.writers(name) if isinstance(self._units, CoupledChannels) else ()

    def admit(self, pruned: Collection[str] = ()) -> None:
        """Take in, of the tensors that were frozen, those that are trained by now.

        Args:
            pruned: Names of those to take in though still frozen, as they have been pruned before.

        Raises:
            ValueError: If one is in none of the optimizers, or in no group of the scope.
        """
        slots = locate(self.model)
        new = {n for n in self.frozen if n in pruned or slots[n].parameter.requires_grad}
        if not new:
            return
        masks, before = dict(self.masks), set(self._parameters)
        if masks:
            self.remove()
        self.frozen = tuple(name for name in self.frozen if name not in new)
        self._names = tuple(name for name in slots if name in new or name in self._names)
        resolve_scope(self.scope, self._names)
        self._couple()
        new = set(self._parameters) - before
        self.masking.check(self.model, new)
        if self._optimizers:
            self._check_held(new, self._optimizers)
        if masks:
            dense = {n: torch.ones_like(self._parameters[n], dtype=torch.bool) for n in new}
            self.hold(MaskSet(masks | dense))

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Hold the zeros through these optimizers from now on, if the training has made new ones.

        Parameters that have been replaced in the model since are held instead of the old ones.

        Raises:
            ValueError: If a tensor to prune is in none of them, or has another shape now.
        """
        plain = plain_optimizers(optimizers)
        if list(map(id, plain)) == list(map(id, self._optimizers)):
            self.masking.refresh()
            return
        self._optimizers = plain
        self._refresh()
        masks = self.masks
        if masks:
            self.remove()
            self.hold(masks)

    def prune_to(
        self,
        sparsity: float,
        *,
        round: int = 1,
        gradients: Mapping[str, Tensor | None] | None = None,
    ) -> MaskSet:
        """Prune to a cumulative sparsity. Doing it again changes nothing.

        Args:
            sparsity: Cumulative fraction of the prunable weights to prune, or of their `costs`, in
                [0, 1).
            round: The round, for importances that depend on it (random ones).
            gradients: Qualified name -> gradient of the loss, for importances that need them; None
                for those that the last `backward()` has left in `.grad`.

        Returns:
            The masks that are now held.

        Raises:
            ValueError: If `sparsity` is out of range or below the present one, or weights are not
                finite, or gradients are needed that are not there; then nothing is changed.
        """
        self._refresh()
        if gradients is None:
            gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
        if not is_torch_method(self.importance):
            compute = partial(
                compute_masks,
                {name: self._parameters[name] for name in self._names},
                sparsity,
                importance=self.importance,
                granularity=self._units,
                costs=self.costs,
                scope=self.scope,
                masks=self._before(),
                round=round,
                gradients=gradients,
            )
            return self._prune(compute)
        if keeps_own_amount(self.importance):
            raise ValueError(
                f"`sparsity` cannot be asked of {self.importance!r}, which keeps its own amount; "
                "call `prune()`, or give the class instead of an instance"
            )
        return self._run_torch_method(self.importance, sparsity)

    def prune(self) -> MaskSet:
        """Run one round of a torch pruning method that keeps its own amount.

        Raises:
            ValueError: If the importance does not keep its own amount.
        """
        if not is_torch_method(self.importance) or not keeps_own_amount(self.importance):
            raise ValueError(
                "`importance` is expected to keep its own amount, such as L1Unstructured(0.2), "
                f"but {self.importance!r} came; call `prune_to(sparsity)`"
            )
        self._refresh()
        return self._run_torch_method(self.importance, None)

    def hold_zeros(self, *, empty: bool = False) -> MaskSet:
        """Hold the exact zeros that the weights have now, to fine-tune an already sparse model.

        Args:
            empty: Also those of tensors that are zero throughout. Unless asked for, these are taken
                for new ones that training is still to fill, such as the second factor of LoRA, and
                a warning names them.

        Example:
            >>> layer = nn.Linear(2, 2)
            >>> _ = layer.weight.data.fill_diagonal_(0)
            >>> Pruner(layer, optimizers=[]).hold_zeros()
            MaskSet(1 tensors, 2 of 4 weights pruned)
        """
        self._refresh()
        weights = {name: self._parameters[name].detach() for name in self._names}
        dense = [n for n, w in weights.items() if not (empty or whole((w != 0).any()))]
        if dense:
            warnings.warn(
                f"{', '.join(dense)} are zero throughout, hence taken for tensors that are not yet "
                "trained, and left dense; call `hold_zeros(empty=True)` (`from_zeros='all'` in a "
                "PruningCallback) if they have been pruned",
                stacklevel=2,
            )

        def kept(name: str, parameter: Tensor) -> Tensor:
            # Biases that go with channels may well be 0 by chance, as batch norm's are at first.
            return (parameter.detach() != 0) | (name not in self._names or name in dense)

        return self._prune(lambda: MaskSet({n: kept(n, p) for n, p in self._parameters.items()}))

    def hold(self, masks: MaskSet) -> MaskSet:
        """Hold given masks, such as those of a checkpoint; the optimizers' state is left alone.

        Raises:
            ValueError: If the masks are not exactly those of the tensors to prune.
        """
        self._refresh()
        masks.check(self._parameters)
        for name, mask in masks.items():
            for other in held_elsewhere(self._parameters[name], self.masking):
                if whole((place(mask, other) & (other == 0)).any()):
                    raise ValueError(
                        "`masks` must keep no weight that another Pruner holds at zero, got a mask "
                        f"of {name} that does; call `remove()` on that Pruner first"
                    )
        return self._hold(masks)

    def _hold(self, masks: MaskSet) -> MaskSet:
        masks.check(self._parameters)
        missing = [name for name in self._parameters if name not in masks]
        if missing:
            raise ValueError(
                f"masks are expected for every tensor to prune, but {', '.join(missing)} has none; "
                "`include` and `exclude` have to select the same tensors as when they were made"
            )
        reshard(self.model)
        masks = MaskSet({name: place(mask, self._parameters[name]) for name, mask in masks.items()})
        if self._attached:
            self.masking.update(masks)
        elif self.masking.held:
            raise ValueError(
                f"`masking` is expected to hold the masks of one Pruner, but this "
                f"{type(self.masking).__name__} holds those of another; make one for each"
            )
        else:
            self.masking.attach(self.model, masks, self._optimizers)
            self._attached = True
        return masks

    @torch.no_grad()
    def apply_to(self, copy: nn.Module) -> None:
        """Zero in a copy of the model, such as an average of its weights, what is pruned here.

        Zeros averaged with zeros stay zero, so once after each prune is enough.

        Args:
            copy: A model with the same parameters, plain.
        """
        slots = locate(copy)
        for name, mask in self.masks.items():
            parameter = slots[name].parameter
            parameter.masked_fill_(~mask.to(parameter.device), 0)

    def remove(self) -> None:
        """Let go: plain parameters with exact zeros stay, without hooks, buffers or masks.

        Raises:
            ValueError: If the model has not the tensors any more whose masks were held.
        """
        try:
            self.masking.refresh()
        finally:
            self.masking.remove()
            self._attached = False

    def _couple(self) -> None:
        slots = locate(self.model)
        names = set(self._names)
        if isinstance(self.granularity, Channels):
            channels = self.granularity.couple(self.model, self._names)
            names.update(channels.names)
            self._units: NM | Block | CoupledChannels | None = channels
        else:
            self._units = self.granularity
            if isinstance(self._units, NM):
                self._units = self._units.bind({name: slots[name] for name in self._names})
        self._parameters = {n: slot.parameter for n, slot in slots.items() if n in names}
        self._ties = ties({name: slots[name] for name in self._parameters})
        self._check_storage(slots)

    def _check_storage(self, slots: Mapping[str, Slot]) -> None:
        tensors = {name: local(slot.parameter.detach()) for name, slot in slots.items()}
        pruned = {name: tensors.pop(name) for name in self._parameters}
        check_storage(pruned, tensors)

    def _refresh(self) -> None:
        """Take in the parameters that the model has now, and check that they are trained."""
        reshard(self.model)
        self.masking.refresh()
        slots = locate(self.model)
        check_kept(self._ties, slots)
        self._check_storage(slots)
        if any(slots[name].parameter is not held for name, held in self._parameters.items()):
            self._couple()
        if self._optimizers:
            self._check_held(self._parameters, self._optimizers)

    def _before(self) -> dict[str, Tensor]:
        """The masks so far, zero = pruned, with those that other Pruners hold on these tensors."""
        before = dict(self.masking.held)
        for name, parameter in self._parameters.items():
            for mask in held_elsewhere(parameter, self.masking):
                before[name] = (mask != 0) & (before[name] != 0 if name in before else True)
        return before

    def _check_held(self, names: Collection[str], optimizers: Sequence[Optimizer]) -> None:
        parameters = {name: self._parameters[name] for name in self._parameters if name in names}
        check_held(parameters, optimizers, self._leaving_out)

    def _leaving_out(self, names: Sequence[str]) -> list[str]:
        # What goes along with channels cannot be excluded by itself.
        writers = {writer for name in names for writer in self.writers(name)}
        return [name for name in self._names if name in names or name in writers]

    def _run_torch_method(self, method: TorchMethod, sparsity: float | None) -> MaskSet:
        compute = partial(
            torch_masks,
            self._parameters,
            sparsity,
            method=method,
            scope=self.scope,
            masks={name: mask != 0 for name, mask in self._before().items()},
        )
        return self._prune(compute)

    def _prune(self, compute: Callable[[], MaskSet]) -> MaskSet:
        masks = decide(compute, self._parameters.values())
        sizes = {name: mask.numel() for name, mask in masks.items()}
        before, left = sizes | _kept(self.masking.held), _kept(masks)
        empty = [name for name in self._names if before[name] and not left[name]]
        if empty:
            warnings.warn(
                f"nothing is left of {', '.join(empty)}: what passes through them alone no longer "
                "depends on the input; ask for less, use scope='layer', or `exclude` them; if they "
                "started at zero, train them before they are pruned",
                stacklevel=3,
            )
        masks = self._hold(masks)
        if sum(left.values()) != sum(before.values()):
            pairs = [(self._parameters[name], mask) for name, mask in masks.items()]
            settle_optimizer_state(self.optimizer_state, self._optimizers, pairs)
        return masks


def _kept(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Per tensor how many weights stay; one at a time, as a round holds two masks of each."""
    bools = ((name, m if m.dtype == torch.bool else m != 0) for name, m in masks.items())
    return {name: int(whole(mask.sum())) for name, mask in bools}


def check_kinds(
    model: object, importance: object, granularity: object, costs: object, masking: object
) -> None:
    """Refuse what they cannot be at all, such as a class for an object; see `Pruner`.

    Raises:
        TypeError: Naming the argument, what was expected and what came.
    """
    _expect(isinstance(model, nn.Module), "model", "an nn.Module", model)
    function = callable(importance) and not isinstance(importance, type)
    _expect(
        is_torch_method(importance) or function,
        "importance",
        "a function such as magnitude, or a pruning method of torch",
        importance,
    )
    _expect(
        masking is None or (hasattr(masking, "attach") and not isinstance(masking, type)),
        "masking",
        "an object such as InPlace()",
        masking,
    )
    _expect(
        granularity is None or isinstance(granularity, NM | Block | Channels),
        "granularity",
        "NM(2, 4), Block(1, 16), Channels(example_input) or None",
        granularity,
    )
    _expect(
        costs is None or isinstance(costs, Mapping),
        "costs",
        "a mapping such as multiply_adds(model, example_input)",
        costs,
    )


def _expect(good: bool, argument: str, expected: str, came: object) -> None:
    if not good:
        raise TypeError(f"`{argument}` is expected to be {expected}, but {came!r} came")
