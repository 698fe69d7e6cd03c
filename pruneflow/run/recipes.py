"""Recipes as options of a Hydra group, and checks of their keys."""

from __future__ import annotations

import difflib
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from pruneflow.run.names import HIDDEN
from pruneflow.run.resources import resource_dir


def check_recipe(recipe: str, choices: dict[str, Any]) -> None:
    """Check for unknown keys in a recipe, which Hydra would merge silently.

    Raises:
        ValueError: If there are any.
    """
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
            f"`recipe` must set keys of the configuration, got `{key}` in {recipe!r}; near names: "
            f"{', '.join(difflib.get_close_matches(key, known, 3, 0.4)) or 'none'}"
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
            callback = prefix == "callbacks." and OmegaConf.is_dict(value) and "_target_" in value
            if f"{prefix}{key}" not in HIDDEN and not callback:
                unknown.append(f"{prefix}{key}")
        elif OmegaConf.is_dict(value) and OmegaConf.is_dict(base._get_node(key)):
            unknown += _unknown_keys(value, base[key], f"{prefix}{key}.")
    return unknown


def store_recipes() -> None:
    """Make each file in `recipes/` an option of the group `recipe`.

    They are stored one by one, as Hydra cannot map a group to a folder with another name.
    """
    store = ConfigStore.instance()
    for path in sorted(resource_dir("recipes").glob("*.yaml")):
        node = OmegaConf.load(path)
        store.store(group="recipe", name=path.stem, node=node, package="_global_")
