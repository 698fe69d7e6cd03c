"""`task=deploy`: size, time and accuracy of a pruned checkpoint in every deployment format."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from pruneflow.deploy import load_packed, save_packed
from pruneflow.deploy.building import Run, drop_shrunk
from pruneflow.deploy.classifying import describe, metadata
from pruneflow.deploy.forms import Form, markdown, measure_forms
from pruneflow.errors import expect
from pruneflow.files import write_whole
from pruneflow.models import load_state, load_weights
from pruneflow.run.preflight import build_data, build_network, building, check_values


def write_forms(
    dense: nn.Module,
    pruned: nn.Module,
    test: Iterable[tuple[Tensor, Tensor]],
    folder: Path,
    *,
    batches: Sequence[int],
    threads: int | None,
    metadata: Mapping[str, str] | None = None,
) -> list[Form]:
    """Write `model.packed` and the other forms of a classifier, and measure each on the CPU.

    Args:
        dense: The network before pruning.
        pruned: The network with exact zeros.
        test: Batches of images (B, C, H, W) and labels (B,), on any device.
        folder: Folder of the files; shrunk forms of an earlier run in it are deleted.
        batches: Batch sizes to time; if empty, only `model.packed` is written.
        threads: Number of threads; None for PyTorch's default.
        metadata: Metadata of `model.packed` and `shrunk.onnx`.

    Returns:
        The forms, see `measure_forms`.
    """
    if not batches:
        drop_shrunk(folder)
        save_packed(pruned.state_dict(), folder / "model.packed", metadata=metadata)
        return []
    tested = [(images.cpu().float(), labels.cpu()) for images, labels in test]

    def accuracy(run: Run) -> float:
        right = sum(int((run(images).argmax(1) == labels).sum()) for images, labels in tested)
        return right / sum(len(labels) for _, labels in tested)

    # Half precision is slow on most CPUs.
    dense, pruned = (copy.deepcopy(network).float() for network in (dense, pruned))
    example = tested[0][0][:1].float()
    forms = measure_forms(
        dense, pruned, example, folder, evaluate=accuracy, batches=batches, threads=threads
    )
    if metadata:
        _add_metadata(pruned, folder, metadata, forms)
    return forms


def _add_metadata(
    pruned: nn.Module, folder: Path, metadata: Mapping[str, str], forms: list[Form]
) -> None:
    if any(form["file"] == "model.packed" for form in forms):
        save_packed(pruned.state_dict(), folder / "model.packed", metadata=metadata)
    exported = folder / "shrunk.onnx"
    if exported.exists():
        import onnx  # noqa: PLC0415  optional, but installed if the file was written

        model = onnx.load(exported)
        onnx.helper.set_model_props(model, dict(metadata))
        with write_whole(exported) as path:
            onnx.save(model, path)
    for form in forms:
        if form["file"] in ("model.packed", "shrunk.onnx"):
            form["bytes"] = (folder / form["file"]).stat().st_size


_log = logging.getLogger(__name__)


class DeployTask:
    """Build every form of the weights in `checkpoint`, and measure it on the test set.

    They are compared with a dense network with the weights of `dense.weights`; without these, only
    its times are measured.

    Args:
        config: The composed configuration, with the model and the data of the recipe that wrote the
            checkpoint.
        folder: Folder of the forms, `forms.json` and `forms.md`.

    Raises:
        ValueError: If there is no checkpoint, or it does not fit the model.
    """

    def __init__(self, config: DictConfig, folder: Path) -> None:
        expect(
            config.checkpoint is not None,
            "checkpoint",
            "be a file of pruned weights for task=deploy",
            "null",
            "set checkpoint=FILE, such as the model.safetensors of a run",
        )
        check_values(config)
        batches, remedy = config.deploy.batches, "set deploy.batches=[1,16,128]"
        expect(batches, "deploy.batches", "contain the batch sizes to time", batches, remedy)
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
        """Write the folder, and return the forms."""
        _log.info("Measuring the deployment formats of %s", self.config.checkpoint)
        forms = write_forms(
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
