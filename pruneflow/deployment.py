"""`task=deploy`: what each form of a pruned checkpoint is worth."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pruneflow.classifying import describe, metadata
from pruneflow.delivery import deliver
from pruneflow.deploy import Form, load_packed
from pruneflow.deploy.forms import markdown
from pruneflow.files import write_whole
from pruneflow.models import load_state, load_weights
from pruneflow.preflight import build_data, build_network, building, check_values

_log = logging.getLogger(__name__)


class Deployment:
    """Build every form of the weights in `checkpoint`, and measure it on the test set.

    The dense network beside it has the weights of `dense.weights`, or untrained ones: then its
    times count and its accuracy says nothing.

    Args:
        config: The composed configuration, with the model and the data of the recipe that made the
            checkpoint.
        folder: Gets the forms, `forms.json` and `forms.md`.

    Raises:
        ValueError: If there is no checkpoint, or it does not fit the model.
    """

    def __init__(self, config: DictConfig, folder: Path) -> None:
        if config.checkpoint is None:
            raise ValueError(
                "`checkpoint` is expected to name the pruned weights for task=deploy, but null "
                "came; give checkpoint=FILE, such as the model.safetensors of a run"
            )
        check_values(config)
        if not config.deploy.batches:
            raise ValueError(
                "`deploy.batches` is expected to hold the batch sizes to time, but none came; give "
                "deploy.batches=[1,16,128]"
            )
        self.config = config
        self.folder = folder
        self.data = build_data(config.data)
        node: Any = OmegaConf.to_container(config.model, resolve=True)
        self.description = describe(node, self.data)
        self.dense, self.pruned = (build_network(config.model, self.data) for _ in range(2))
        if config.dense.weights is not None:
            with building("dense.weights"):
                load_weights(self.dense, config.dense.weights)
        with building("checkpoint"):
            if Path(config.checkpoint).suffix == ".packed":
                load_state(self.pruned, load_packed(config.checkpoint), config.checkpoint)
            else:
                load_weights(self.pruned, config.checkpoint)

    def run(self) -> list[Form]:
        """Write the folder, and return what was measured."""
        _log.info("Measuring what each form of %s is worth", self.config.checkpoint)
        forms = deliver(
            self.dense,
            self.pruned,
            self.data.test_dataloader(),
            self.folder,
            batches=self.config.deploy.batches,
            threads=self.config.deploy.threads,
            metadata=metadata(self.description),
        )
        if self.config.dense.weights is None:
            for form in forms:
                if form["name"].startswith("dense"):
                    form["accuracy"] = None
        with write_whole(self.folder / "forms.json") as path:
            path.write_text(json.dumps(forms, indent=2) + "\n", encoding="utf-8")
        with write_whole(self.folder / "forms.md") as path:
            path.write_text(markdown(forms) + "\n", encoding="utf-8")
        return forms
