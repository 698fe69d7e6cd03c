"""Callbacks beside a PruningCallback: what may end denser than the target, what may overlap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from pruneflow.masking import Masking, Reparametrize
from pruneflow.plan import Plan
from pruneflow.pruner import Pruner
from pruneflow.trainers import averaged_models

# Of these the largest is never from an earlier round than the others.
_GROWING = ("epoch", "step", "round", "sparsity")


def denser_choices(trainer: L.Trainer, plan: Plan) -> list[str]:
    """Which callbacks of a Trainer may pick, or stop at, a model from before the last round.

    Args:
        trainer: The Trainer.
        plan: The plan that is about to run.

    Returns:
        For each such callback a message that names the remedy.

    Example:
        >>> best = ModelCheckpoint(monitor="val_loss")
        >>> trainer = L.Trainer(max_epochs=2, callbacks=[best], logger=False)
        >>> [message] = denser_choices(trainer, Plan.lay([0.5, 0.8]))
        >>> message.partition(";")[2]
        " use SparsityCheckpoint(monitor='val_loss', mode='min') instead"
        >>> denser_choices(trainer, Plan.lay([0.8]))
        []
    """
    last = plan.rounds[-1].at if plan.rounds else 0
    if last == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []  # nothing is measured before the last round
    messages = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = f"{type(callback).__name__}(monitor={getattr(callback, 'monitor', None)!r})"
        if isinstance(callback, ModelCheckpoint) and _compares_rounds(callback):
            messages.append(
                f"{name} compares models of all rounds, so its best may be denser than the target; "
                f"use SparsityCheckpoint(monitor={callback.monitor!r}, mode={callback.mode!r}) "
                "instead"
            )
        if isinstance(callback, EarlyStopping) and not _waits(trainer, callback, plan, last):
            messages.append(
                f"{name} may stop the training before the last round ({plan.unit} {last}), at a "
                "model denser than the target, as a metric that pruning has lowered counts as one "
                f"that no longer improves; set Trainer(min_{plan.unit}s=...) to more than {last}"
            )
    return messages


def _compares_rounds(callback: ModelCheckpoint) -> bool:
    """Whether it keeps the best of all rounds; not if a subclass decides, as SparsityCheckpoint."""
    return (
        callback.monitor is not None
        and callback.save_top_k != 0
        and not (callback.monitor in _GROWING and callback.mode == "max")
        and not is_overridden("check_monitor_top_k", callback, ModelCheckpoint)
    )


def _waits(trainer: L.Trainer, callback: EarlyStopping, plan: Plan, last: int) -> bool:
    """Whether it cannot stop the training before the last round, but for a metric that is NaN."""
    least = trainer.min_epochs if plan.unit == "epoch" else trainer.min_steps
    if least is not None and least > last:
        return True
    # The first check is an improvement, so that the patience ends at the end of epoch `patience`.
    thresholds = (callback.stopping_threshold, callback.divergence_threshold)
    once_an_epoch = plan.unit == "epoch" and trainer.val_check_interval == 1.0
    return once_an_epoch and thresholds == (None, None) and callback.patience >= last


def check_averages(trainer: L.Trainer, masking: Masking | None) -> None:
    """Refuse averages of the weights beside a masking that they do not go with.

    Raises:
        ValueError: Naming the callback that averages.
    """
    averaging = [name for name, _ in averaged_models(trainer)]
    if averaging and isinstance(masking, Reparametrize):
        raise ValueError(
            f"`masking` Reparametrize is expected without {averaging[0]}, which averages "
            "parameters by their order; use masking=InPlace()"
        )


def check_disjoint(pruners: Sequence[Pruner]) -> None:
    """Refuse several that prune one tensor, or may once it is no longer frozen.

    What goes along with channels is pruned as well.

    Raises:
        ValueError: Naming the tensors.
    """
    for pair in combinations(pruners, 2):
        one, other = ({*pruner.names, *pruner.frozen} for pruner in pair)
        both = sorted(one & other)
        along = {name: writers for name in both if (writers := _writers(name, pair))}
        if along:
            reads = [f"{name} (those of {', '.join(found)})" for name, found in along.items()]
            raise ValueError(
                "several PruningCallbacks are expected to prune different tensors, but one removes "
                f"channels that are read or held by what another prunes, {'; '.join(reads)}; "
                "`exclude` one of the two, or prune both in one callback"
            )
        if both:
            raise ValueError(
                "`include`/`exclude` of several PruningCallbacks are expected to select different "
                f"tensors, but two select {', '.join(both)}; exclude them in one"
            )


def _writers(name: str, pruners: Sequence[Pruner]) -> list[str]:
    """What those that do not select a tensor prune so that it loses entries along with that."""
    others = [pruner for pruner in pruners if name not in (*pruner.scored, *pruner.frozen)]
    return sorted({writer for pruner in others for writer in pruner.writers(name)})
