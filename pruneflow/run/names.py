"""Former names of settings, and settings of the Trainer that the experiment makes itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from pruneflow.errors import expect

_log = logging.getLogger(__name__)

# Group -> old and new name of an option. conf/ has files with both names.
_OPTIONS = {"granularity": ("weights", "unstructured"), "costs": ("weights", "none")}
_KEYS = {"classifier.label_smoothing": "loss.label_smoothing"}

# Argument of the Trainer -> what to set instead.
_EPOCHS = "set `dense.epochs` and `pruning.epochs`; there is a validation after each epoch"
_RESERVED = {
    "max_epochs": _EPOCHS,
    "max_steps": _EPOCHS,
    "fast_dev_run": _EPOCHS,
    "check_val_every_n_epoch": _EPOCHS,
    "callbacks": "choose them with `callbacks=[ema,early_stopping]`, or add `+callbacks.NAME`",
    "logger": "choose it with `logger=csv`",
}

# Keys that are recognised, but not shown by `--cfg job`.
HIDDEN = (*_KEYS, "trainer.devices", *(f"trainer.{name}" for name in _RESERVED))
_SETS_HIDDEN = re.compile(rf"\+?({'|'.join(map(re.escape, HIDDEN))})=")


def allow_hidden(arguments: Iterable[str]) -> list[str]:
    """Arguments of a command, changed such that Hydra accepts hidden keys.

    Example:
        >>> allow_hidden(["-m", "trainer.max_epochs=3", "seed=1"])
        ['-m', '++trainer.max_epochs=3', 'seed=1']
    """
    return [f"++{a.lstrip('+')}" if _SETS_HIDDEN.match(a) else a for a in arguments]


def rename_keys(config: DictConfig) -> dict[str, str]:
    """Rename old keys of a configuration.

    Returns:
        Old key -> new key, for those found.
    """
    found: dict[str, str] = {}
    for old, new in _KEYS.items():
        group, _, name = old.partition(".")
        if name in (config.get(group) or ()):
            with open_dict(config):
                OmegaConf.update(config, new, config[group].pop(name))
            found[old] = new
    return found


def log_old_names(choices: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    """Log the new names of options and keys."""
    chosen = {
        f"{group}={old}": f"{group}={new}"
        for group, (old, new) in _OPTIONS.items()
        if choices.get(group) == old
    }
    for old, new in {**chosen, **keys}.items():
        _log.info("`%s` is now called `%s`; the old name still works", old, new)


def check_trainer_keys(trainer: DictConfig) -> None:
    """Check that settings which the experiment makes itself are left out.

    Raises:
        ValueError: If one is set.
    """
    for key, remedy in _RESERVED.items():
        value = trainer.get(key)
        expect(value is None, f"trainer.{key}", "be left out", repr(value), remedy)
    devices = trainer.get("devices", 1)
    remedy = "for several processes, use PruningCallback in your own Trainer"
    expect(devices in (1, "1"), "trainer.devices", "be 1", repr(devices), remedy)
