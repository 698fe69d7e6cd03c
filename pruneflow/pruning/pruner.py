"""The Pruner: parameters -> importance -> masks -> masking, in plain PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruneflow.distributed import (
    check_placements,
    decide,
    distribute_like,
    gather_full,
    reshard,
    to_local,
)
from pruneflow.errors import expect
from pruneflow.pruning.distribution import Scope
from pruneflow.pruning.evidence import default_evidence
from pruneflow.pruning.granularity import Granularity
from pruneflow.pruning.importance import Context, Importance, check_evidence, magnitude
from pruneflow.pruning.masking import InPlace, Masking, masks_of_others
from pruneflow.pruning.masks import MaskSet
from pruneflow.pruning.optimizers import (
    OptimizerState,
    check_optimized,
    check_optimizer_state,
    mask_optimizer_state,
    plain_optimizers,
)
from pruneflow.pruning.selection import MaskRule, Prune
from pruneflow.pruning.torch_methods import TorchMethod, rule_for
from pruneflow.structure.computed import check_computed, check_zeros_stay
from pruneflow.structure.costs import CostFunction, Costs
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
from pruneflow.structure.running import Example


class Pruner:
    """Prune a model in any training loop, and keep pruned weights at zero during training.

    In distributed training, create a Pruner and call it in each process; all get the same masks.

    Args:
        model: The model; may be wrapped in `DistributedDataParallel`, or sharded by `fully_shard`.
        importance: Scores of the weights, of which the highest are kept: `magnitude`, `taylor`
            (after `loss.backward()`), `Random(seed)`, another importance of this package, or any
            function `(name, tensor, context) -> scores`; or a `BasePruningMethod` of
            `torch.nn.utils.prune`: a class for `prune_to`, or an instance, which keeps its own
            amount, for `prune`.
        granularity: What is removed together: `Weights()` (the default), `NM(2, 4)`,
            `Block(1, 16)` or `Channels(example_input)`.
        costs: Qualified name -> cost of each weight of that tensor, such as
            `multiply_adds(model, example_input)`; targets are then fractions of the total cost.
        scope: Which tensors compete with each other: `"global"`, `"layer"`, another distribution of
            this package, by its name or itself, or group name -> globs.
        include: Patterns of the tensors to prune; None for the default ones. See
            `parameters.select`.
        exclude: Patterns of tensors not to prune.
        optimizers: The optimizers used in training; `[]` for none. None warns, as pruned weights
            do not stay zero with an optimizer that the Pruner does not know.
        masking: How masks are held; `InPlace()` by default.
        optimizer_state: What to do with optimizer state, such as momentum, after each round:
            `"zero_pruned"` sets that of pruned weights to zero, `"reset"` clears all of it, and
            `"keep"` does not change it.
        rule: The mask rule, instead of `importance`, `granularity`, `costs` and `scope`.
        example_input: An input batch, for `Channels()` and if `costs` is a function.

    Raises:
        ValueError: If a pattern or the scope does not match the model, `optimizer_state` is
            unknown, or a tensor to prune is in none of the optimizers, shares memory with another,
            is recomputed in `forward`, or is masked by `torch.nn.utils.prune`.
        TypeError: If an argument has the wrong type, such as a class instead of an instance.

    Warns:
        UserWarning: If `optimizers` is None; if more than a tenth of all parameters stays dense
            without being mentioned in `include` or `exclude`; and if all weights of a tensor are
            pruned.

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
        costs: CostFunction | Mapping[str, float] | None = None,
        scope: Scope = "global",
        include: Sequence[Pattern] | None = None,
        exclude: Sequence[Pattern] = (),
        optimizers: Sequence[Optimizer] | None = None,
        masking: Masking | None = None,
        optimizer_state: OptimizerState = "zero_pruned",
        rule: MaskRule | None = None,
        example_input: Example | None = None,
    ) -> None:
        is_module, remedy = isinstance(model, nn.Module), "give the model itself"
        expect(is_module, "model", "be an nn.Module", model, remedy, error=TypeError)
        expect(
            masking is None or (hasattr(masking, "attach") and not isinstance(masking, type)),
            "masking",
            "be an instance of a masking",
            repr(masking),
            "try InPlace()",
            error=TypeError,
        )
        check_optimizer_state(optimizer_state)
        given = rule_for(importance, scope, granularity, costs)
        expect(
            rule is None or given == Prune(),
            "rule",
            "be given without `importance`, `granularity`, `costs` and `scope`",
            f"{rule} and {given}",
            "put them into the rule, such as Prune(importance=taylor)",
        )
        expect(
            rule is None or (hasattr(rule, "masks") and not isinstance(rule, type)),
            "rule",
            "be an instance of a mask rule",
            rule,
            "try Prune()",
            error=TypeError,
        )
        self.rule = given if rule is None else rule
        plain = plain_optimizers(optimizers or ())
        self.model = unwrap(model)
        reshard(self.model)
        self.masking: Masking = InPlace() if masking is None else masking
        self.optimizer_state = optimizer_state
        self._example = example_input
        if include is None:
            check_computed(self.model, exclude)
        selection = select(self.model, include, exclude)
        self.frozen = tuple(selection.frozen)
        expect(
            bool(selection.slots),
            "model",
            "have trainable weights to prune",
            f"frozen ones only ({', '.join(self.frozen)})",
            "set `requires_grad=True` for the weights to prune",
        )
        masked = [name for name, slot in selection.slots.items() if slot.reparametrized]
        expect(
            not masked,
            "model",
            "have plain parameters",
            f"masks of torch.nn.utils.prune on {', '.join(masked)}",
            "call `fold_model(model)` first, then hold its zeros with `from_zeros=True` or "
            "`Pruner.hold_zeros()`",
        )
        check_zeros_stay(selection.slots)
        selection.warn_overlooked()
        self.selection = selection
        self._names = tuple(selection.slots)
        self._bind()
        self.masking.check(self.model, self._parameters)
        check_placements(self._parameters)
        self.check(None)
        if optimizers is None:
            warnings.warn(
                "`optimizers` was not given to Pruner, so pruned weights will not stay zero during "
                "training; give a list of your optimizers, or [] if you do not train",
                stacklevel=2,
            )
        elif plain:
            self._check_optimized(self._parameters, plain)
        self._optimizers = plain
        self._attached = False

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_attached": False}  # as the masking of a copy

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of the tensors to prune, and of others that lose entries with them."""
        return tuple(self._parameters)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Qualified names of the tensors to prune only, which targets count."""
        return self._names

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(self._parameters[name].numel() for name in self._names)

    @property
    def importance(self) -> Importance | TorchMethod:
        """The importance of the rule; may be set between rounds."""
        importance: Importance | TorchMethod = self.rule.importance
        return importance

    @importance.setter
    def importance(self, importance: Importance | TorchMethod) -> None:
        self.rule = replace(self.rule, importance=importance)  # type: ignore[type-var]

    @property
    def costs(self) -> Costs | None:
        """Qualified name -> cost of each weight; None if targets count weights."""
        return None if callable(self.rule.costs) else self.rule.costs

    @property
    def removed(self) -> float:
        """Pruned fraction of the weights or costs that targets count."""
        return self.rule.pruned_fraction(self.weight_masks, self._weights)

    @property
    def unfrozen(self) -> tuple[str, ...]:
        """Names of formerly frozen tensors that are trainable now; the next round includes them."""
        slots = locate(self.model)
        return tuple(name for name in self.frozen if slots[name].parameter.requires_grad)

    @property
    def masks(self) -> MaskSet:
        """The present masks; empty before the first round and after `remove`."""
        return self.masking.masks

    @property
    def weight_masks(self) -> MaskSet:
        """The present masks of the tensors to prune only."""
        return MaskSet({name: mask for name, mask in self.masks.items() if name in self._names})

    def check(self, target: float | None) -> None:
        """Check, before training, that the rule can prune the tensors to a target.

        Args:
            target: The final sparsity; None if it is not known in advance.

        Raises:
            ValueError: If the target cannot be reached, or the rule cannot prune the tensors.
        """
        self.rule.check(self._weights, target)

    def check_evidence(self, evidence: Mapping[str, Tensor]) -> None:
        """Check that all tensors to prune have evidence.

        Raises:
            ValueError: Names the tensors without evidence.
        """
        check_evidence(evidence, {name: p.shape for name, p in self._weights.items()})

    def writers(self, name: str) -> tuple[str, ...]:
        """Names of the tensors to prune with which the tensor `name` loses entries."""
        return self.rule.writers(name)

    def include_unfrozen(self, pruned: Collection[str] = ()) -> None:
        """Include formerly frozen tensors that are trainable now.

        Args:
            pruned: Names of tensors to include even if they are frozen, as they were pruned before.

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
        self._bind()
        self.check(None)
        new = set(self._parameters) - before
        self.masking.check(self.model, new)
        if self._optimizers:
            self._check_optimized(new, self._optimizers)
        if masks:
            dense = {n: torch.ones_like(self._parameters[n], dtype=torch.bool) for n in new}
            self.hold(MaskSet(masks | dense))

    def set_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Use other optimizers from now on, and the parameters that the model has now.

        Raises:
            ValueError: If a tensor to prune is in none of them, or its shape has changed.
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
        evidence: Mapping[str, Tensor] | None = None,
        gradients: Mapping[str, Tensor | None] | None = None,
    ) -> MaskSet:
        """Prune to a cumulative sparsity. Repeating a call changes nothing.

        Args:
            sparsity: Cumulative fraction of the prunable weights, or of their `costs`, to prune, in
                [0, 1).
            round: The round, for importances that depend on it, such as `Random`.
            evidence: Qualified name -> evidence for the importance, such as
                `input_norms(model, batches, loss)`; None for the gradients in `.grad`, left by the
                last `backward()`.
            gradients: The former name of `evidence`.

        Returns:
            The new masks.

        Raises:
            ValueError: If `sparsity` is out of range or below the present one, weights are not
                finite, or evidence is missing; the model is not changed then.
        """
        expect(
            self.rule.takes_target,
            "importance",
            "not keep its own amount for `prune_to`",
            self.rule.importance,
            "call `prune()`, or give the class instead of the instance",
        )
        if evidence is None and gradients is not None:
            evidence = {name: each for name, each in gradients.items() if each is not None}
        return self._run(sparsity, round, evidence)

    def prune(self) -> MaskSet:
        """Run one round of a method of `torch.nn.utils.prune` that keeps its own amount.

        Raises:
            ValueError: If the importance has no amount of its own.
        """
        expect(
            not self.rule.takes_target,
            "importance",
            "keep its own amount, such as L1Unstructured(0.2), for `prune`",
            self.rule.importance,
            "call `prune_to(sparsity)`",
        )
        return self._run(None, 1, None)

    def hold_zeros(self, *, empty: bool = False) -> MaskSet:
        """Hold the present zeros of the weights, to fine-tune a sparse model.

        Args:
            empty: Whether to include tensors that are all zero. By default they are left dense,
                with a warning, as they may not be trained yet, such as the second factor of LoRA.

        Example:
            >>> layer = nn.Linear(2, 2)
            >>> _ = layer.weight.data.fill_diagonal_(0)
            >>> Pruner(layer, optimizers=[]).hold_zeros()
            MaskSet(1 tensors, 2 of 4 weights pruned)
        """
        self._refresh()
        held = self.masking.raw_masks
        weights = {n: self._parameters[n].detach() for n in self._names if n not in held}
        dense = [n for n, w in weights.items() if not (empty or gather_full((w != 0).any()))]
        if dense:
            warnings.warn(
                f"{', '.join(dense)} are zero throughout and may not be trained yet, so they are "
                "left dense; if they are pruned, call `hold_zeros(empty=True)` (`from_zeros='all'` "
                "in a PruningCallback)",
                stacklevel=2,
            )

        def kept(name: str, parameter: Tensor) -> Tensor:
            # Biases that are pruned with channels may be zero without being pruned, as those of
            # batch norm are at initialization.
            return (parameter.detach() != 0) | (name not in self._names or name in dense)

        return self._prune(lambda: MaskSet({n: kept(n, p) for n, p in self._parameters.items()}))

    def hold(self, masks: MaskSet) -> MaskSet:
        """Hold the given masks, such as those of a checkpoint. Optimizer state is not changed.

        Raises:
            ValueError: If the masks do not match the tensors to prune.
        """
        self._refresh()
        masks.check(self._parameters)
        for name, mask in masks.items():
            for other in masks_of_others(self._parameters[name], self.masking):
                if gather_full((distribute_like(mask, other) & (other == 0)).any()):
                    raise ValueError(
                        "`masks` must not keep weights that another Pruner holds at zero, got a "
                        f"mask of {name} that does; call `remove()` on that Pruner first"
                    )
        return self._hold(masks)

    def _hold(self, masks: MaskSet) -> MaskSet:
        masks.check(self._parameters)
        missing = ", ".join(name for name in self._parameters if name not in masks)
        expect(
            not missing,
            "masks",
            "have an entry for each tensor to prune",
            f"none for {missing}",
            "use the same `include` and `exclude` as when they were created",
        )
        reshard(self.model)
        masks = MaskSet(
            {name: distribute_like(mask, self._parameters[name]) for name, mask in masks.items()}
        )
        if self._attached:
            self.masking.update(masks)
        elif self.masking.raw_masks:
            raise ValueError(
                "`masking` must be used by one Pruner only, got an instance of "
                f"{type(self.masking).__name__} that holds the masks of another; create one for "
                "each"
            )
        else:
            self.masking.attach(self.model, masks, self._optimizers)
            self._attached = True
        return masks

    @torch.no_grad()
    def apply_to(self, copy: nn.Module) -> None:
        """Apply the masks to a copy of the model, such as an average of its weights.

        Once after each round is enough, as an average of zeros stays zero.

        Args:
            copy: A model with the same parameters, without masks of its own.
        """
        slots = locate(copy)
        for name, mask in self.masks.items():
            parameter = slots[name].parameter
            parameter.masked_fill_(~mask.to(parameter.device), 0)

    def remove(self) -> None:
        """Remove masks, hooks and buffers; plain parameters with exact zeros remain.

        Raises:
            ValueError: If the model no longer has the tensors to prune.
        """
        try:
            self.masking.refresh()
        finally:
            self.masking.remove()
            self._attached = False

    @property
    def _weights(self) -> dict[str, nn.Parameter]:
        """The tensors to prune only, without others that lose entries with them."""
        return {name: self._parameters[name] for name in self._names}

    def _bind(self) -> None:
        slots = locate(self.model)
        self.rule = self.rule.bind(self.model, self._names, self._example)
        names = {*self._names, *self.rule.coupled}
        self._parameters = {n: slot.parameter for n, slot in slots.items() if n in names}
        self._ties = ties({name: slots[name] for name in self._parameters})
        self._check_storage(slots)

    def _check_storage(self, slots: Mapping[str, Slot]) -> None:
        tensors = {name: to_local(slot.parameter.detach()) for name, slot in slots.items()}
        pruned = {name: tensors.pop(name) for name in self._parameters}
        check_storage(pruned, tensors)

    def _refresh(self) -> None:
        """Use the parameters that the model has now, and check that they are in the optimizers."""
        reshard(self.model)
        self.masking.refresh()
        slots = locate(self.model)
        check_kept(self._ties, slots)
        self._check_storage(slots)
        if any(slots[name].parameter is not held for name, held in self._parameters.items()):
            self._bind()
        if self._optimizers:
            self._check_optimized(self._parameters, self._optimizers)

    def _present_masks(self) -> dict[str, Tensor]:
        """The present masks, zero = pruned, including those of other Pruners on these tensors."""
        before = dict(self.masking.raw_masks)
        for name, parameter in self._parameters.items():
            for mask in masks_of_others(parameter, self.masking):
                before[name] = (mask != 0) & (before[name] != 0 if name in before else True)
        return before

    def _check_optimized(self, names: Collection[str], optimizers: Sequence[Optimizer]) -> None:
        parameters = {name: self._parameters[name] for name in self._parameters if name in names}
        check_optimized(parameters, optimizers, self._to_exclude)

    def _to_exclude(self, names: Sequence[str]) -> list[str]:
        # Tensors that lose entries with channels cannot be excluded themselves.
        writers = {writer for name in names for writer in self.writers(name)}
        return [name for name in self._names if name in names or name in writers]

    def _run(
        self, target: float | None, round: int, evidence: Mapping[str, Tensor] | None
    ) -> MaskSet:
        self._refresh()
        context = Context(round)
        if self.rule.needs is not None:
            if evidence is None:
                evidence = default_evidence(self.rule.needs, self._parameters)
            context = Context(round, evidence)
        return self._prune(
            lambda: self.rule.masks(self._weights, self._present_masks(), target, context)
        )

    def _prune(self, compute: Callable[[], MaskSet]) -> MaskSet:
        masks = decide(compute, self._parameters.values())
        sizes = {name: mask.numel() for name, mask in masks.items()}
        before, after = sizes | _kept_counts(self.masking.raw_masks), _kept_counts(masks)
        empty = [name for name in self._names if before[name] and not after[name]]
        if empty:
            warnings.warn(
                f"nothing is left of {', '.join(empty)}, so the outputs of these layers no longer "
                "depend on their inputs; lower the sparsity, use scope='layer', or `exclude` them; "
                "if they were initialized to zero, train them first",
                stacklevel=3,
            )
        changed, regrown = _changes(self.masking.raw_masks, masks)
        expect(
            self.rule.grows or not regrown,
            "rule",
            "keep pruned weights pruned unless it `grows`",
            f"masks that keep pruned weights of {', '.join(regrown)}",
            "set `grows = True` on the rule",
        )
        masks = self._hold(masks)
        if changed:
            pairs = [(self._parameters[name], mask) for name, mask in masks.items()]
            mask_optimizer_state(self.optimizer_state, self._optimizers, pairs)
        return masks


def _kept_counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of weights kept in each tensor; converts masks one at a time to save memory."""
    bools = ((name, m if m.dtype == torch.bool else m != 0) for name, m in masks.items())
    return {name: int(gather_full(mask.sum())) for name, mask in bools}


def _changes(held: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[bool, list[str]]:
    """Whether masks differ from the held ones, and the tensors in which pruned weights are kept."""
    changed, regrown = False, []
    for name, mask in masks.items():
        if name not in held:  # dense
            changed = changed or bool(gather_full((~mask).any()))
            continue
        before = distribute_like(held[name] != 0, mask)
        changed = changed or bool(gather_full((before != mask).any()))
        if gather_full((mask & ~before).any()):
            regrown.append(name)
    return changed, regrown
