"""Names that settings had before, and keys of the Trainer that belong to the experiment."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

_log = logging.getLogger(__name__)

# Group -> the old name of an option, and the new one. conf/ has files of both names.
_OPTIONS = {"granularity": ("weights", "unstructured"), "costs": ("weights", "none")}
_KEYS = {"classifier.label_smoothing": "loss.label_smoothing"}

# What a Trainer takes, and what serves instead.
_EPOCHS = (
    "stages last `dense.epochs` and `pruning.epochs` and validate after each epoch, so set those"
)
_OF_THE_EXPERIMENT = {
    "max_epochs": _EPOCHS,
    "max_steps": _EPOCHS,
    "fast_dev_run": _EPOCHS,
    "check_val_every_n_epoch": _EPOCHS,
    "callbacks": "choose them by `callbacks=[ema,early_stopping]`, or add `+callbacks.NAME`",
    "logger": "choose it by `logger=csv`",
}

# Keys that are understood, but that `--cfg job` does not show.
HIDDEN = (*_KEYS, "trainer.devices", *(f"trainer.{name}" for name in _OF_THE_EXPERIMENT))
_SETS_HIDDEN = re.compile(rf"\+?({'|'.join(map(re.escape, HIDDEN))})=")


def let_hidden_through(arguments: Iterable[str]) -> list[str]:
    """The arguments of a command, with those of hidden keys such that Hydra does not refuse them.

    Example:
        >>> let_hidden_through(["-m", "trainer.max_epochs=3", "seed=1"])
        ['-m', '++trainer.max_epochs=3', 'seed=1']
    """
    return [f"++{a.lstrip('+')}" if _SETS_HIDDEN.match(a) else a for a in arguments]


def rename_keys(config: DictConfig) -> dict[str, str]:
    """Move what old keys of a configuration set to the new ones.

    Returns:
        Old key -> new key of those that were there.
    """
    found: dict[str, str] = {}
    for old, new in _KEYS.items():
        group, _, name = old.partition(".")
        if name in (config.get(group) or ()):
            with open_dict(config):
                OmegaConf.update(config, new, config[group].pop(name))
            found[old] = new
    return found


def note_old_names(choices: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    """Name in the log what options and keys are called by now."""
    chosen = {
        f"{group}={old}": f"{group}={new}"
        for group, (old, new) in _OPTIONS.items()
        if choices.get(group) == old
    }
    for old, new in {**chosen, **keys}.items():
        _log.info("`%s` is now called `%s`; the old name still works", old, new)


def check_trainer_keys(trainer: DictConfig) -> None:
    """Refuse settings of the Trainer that the experiment makes itself.

    Raises:
        ValueError: Naming the first, and what serves instead.
    """
    for key, remedy in _OF_THE_EXPERIMENT.items():
        if trainer.get(key) is not None:
            raise ValueError(f"`trainer.{key}` must be left out, got {trainer[key]!r}; {remedy}")
    if trainer.get("devices", 1) not in (1, "1"):
        raise ValueError(
            f"`trainer.devices` must be 1, got {trainer.devices!r}; for many processes put the "
            "PruningCallback in a Trainer of your own"
        )
