"""Provenance of a result: versions, commit, machine, and digests of its settings."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of pruneflow and of the packages that affect its results."""
    return {name: version(name) for name in ("pruneflow", "torch", "torchvision", "lightning")}


def commit() -> str | None:
    """The commit of the checkout that pruneflow runs from, or None if it is installed.

    A plus sign marks a working tree with changes.
    """
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+" if changed else head


def machine() -> str:
    """Describe the machine.

    Example:
        >>> "CPU core" in machine()
        True
    """
    cores = os.cpu_count() or 1
    words = [f"{cores} CPU core{'s' if cores > 1 else ''} ({_processor()})"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        words.append(f"{memory / 2**30:.0f} GiB memory")
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)


# Keys, with all keys below them, that do not affect the result.
_IRRELEVANT = (
    "task",
    "checkpoint",
    "resume",
    "callbacks.lr_monitor",
    "callbacks.sparsity_checkpoint",
    "logger",
    "deploy",
    "dense.cache",
    "trainer.devices",
    "data.memory_limit",
    "data.num_workers",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.profiler",
)


def relevant_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that affect the result of training, flat.

    Args:
        settings: Nested mappings of builtins.
        prefix: Prefix of the keys, with a trailing dot.

    Example:
        >>> relevant_settings({"seed": 1, "deploy": {"threads": 2}, "dense": {"epochs": 3}})
        {'seed': 1, 'dense.epochs': 3}
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in _IRRELEVANT:
            continue
        if isinstance(value, Mapping):
            flat |= relevant_settings(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def digest(*facts: Any) -> str:
    """A short hash of builtins, independent of the order of keys.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})
        True
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
