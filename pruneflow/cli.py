"""Hydra entry point only."""

from __future__ import annotations

import difflib
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
import rich
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pruneflow.experiment import Experiment
from pruneflow.report import summary
from pruneflow.resources import resource_dir

_log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(resource_dir("conf")), config_name="config")
def _run(config: DictConfig) -> float:
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    recipe = settings.runtime.choices["recipe"]
    overrides = [shlex.quote(override) for override in settings.overrides.task]
    try:
        _check_recipe(recipe, dict(settings.runtime.choices))
        experiment = Experiment(
            config, folder, recipe, " ".join(["python -m pruneflow", *overrides])
        )
    except InstantiationException as error:
        # Hydra wraps what the constructor said; the wrapping adds only which key it came from.
        cause = error.__cause__ or error
        sys.exit(f"pruneflow: {cause}\n(in `{str(error).rpartition('full_key: ')[2]}`)")
    except (ValueError, TypeError, OSError, OmegaConfBaseException) as error:
        sys.exit(f"pruneflow: {error}")
    facts = experiment.run()
    rich.print(summary(facts))
    rich.print(f"Report: {folder / 'report.html'}")
    return facts["final"]["val_accuracy"]


def _check_recipe(recipe: str, choices: dict[str, Any]) -> None:
    """Refuse keys of a recipe that no option has: Hydra merges them silently."""
    loader: Any = GlobalHydra.instance().config_loader()
    node = loader.repository.load_config(f"recipe/{recipe}").config
    groups = [
        f"{group}={choice}"
        for group, choice in choices.items()
        if group != "recipe" and not group.startswith("hydra/")
    ]
    base = hydra.compose("config", overrides=[*groups, "~recipe"])
    unknown = list(_unknown_keys(node, base))
    if unknown:
        known = list(_keys(base))
        lines = [
            f"recipe {recipe!r} sets `{key}`, which is expected to be a key of the configuration; "
            f"near names: {', '.join(difflib.get_close_matches(key, known, 3, 0.4)) or 'none'}"
            for key in unknown
        ]
        raise ValueError("\n".join(lines))


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    key: Any
    for key, value in config.items_ex(resolve=False):
        keys.append(f"{prefix}{key}")
        if OmegaConf.is_dict(value):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def _unknown_keys(recipe: DictConfig, base: DictConfig, prefix: str = "") -> list[str]:
    unknown: list[str] = []
    key: Any
    for key, value in recipe.items_ex(resolve=False):
        if key == "defaults" and not prefix:
            continue
        if key not in base:
            unknown.append(f"{prefix}{key}")
        elif OmegaConf.is_dict(value) and OmegaConf.is_dict(base._get_node(key)):
            unknown += _unknown_keys(value, base[key], f"{prefix}{key}.")
    return unknown


def store_recipes() -> None:
    """Make each of `recipes/` an option of the group `recipe`.

    Hydra cannot map the group onto a folder of another name, so each is stored under its name.
    """
    store = ConfigStore.instance()
    for path in sorted(resource_dir("recipes").glob("*.yaml")):
        node = OmegaConf.load(path)
        store.store(group="recipe", name=path.stem, node=node, package="_global_")


def main() -> None:
    """Run `python -m pruneflow`."""
    store_recipes()
    _run()
