"""What a run hands over beside its weights: the packed file, and what each form of it is worth."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from pruneflow.deploy import save_packed
from pruneflow.deploy.building import Run, drop_shrunk
from pruneflow.deploy.forms import Form, measure_forms
from pruneflow.files import write_whole


def deliver(
    dense: nn.Module,
    pruned: nn.Module,
    test: Iterable[tuple[Tensor, Tensor]],
    folder: Path,
    *,
    batches: Sequence[int],
    threads: int | None,
    metadata: Mapping[str, str] | None = None,
) -> list[Form]:
    """Write `model.packed` and the other forms of a classifier; measure each on the CPU.

    Args:
        dense: The network before pruning.
        pruned: The network with exact zeros.
        test: Batches of images (B, C, H, W) and labels (B,), on any device.
        folder: Where the files go; an earlier run's shrunk forms in it are deleted.
        batches: Batch sizes to time; with none of them, only `model.packed` is written.
        threads: Threads of every form; None takes PyTorch's.
        metadata: Texts to keep in the metadata of `model.packed` and `shrunk.onnx`.

    Returns:
        The forms, as `measure_forms` has them.
    """
    if not batches:
        drop_shrunk(folder)
        save_packed(pruned.state_dict(), folder / "model.packed", metadata=metadata)
        return []
    tested = [(images.cpu().float(), labels.cpu()) for images, labels in test]

    def accuracy(run: Run) -> float:
        right = sum(int((run(images).argmax(1) == labels).sum()) for images, labels in tested)
        return right / sum(len(labels) for _, labels in tested)

    # Of a network in halves, which few CPUs are made for, float32 is what is measured.
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
        import onnx  # noqa: PLC0415  what wrote the file needs it, and nobody else

        model = onnx.load(exported)
        onnx.helper.set_model_props(model, dict(metadata))
        with write_whole(exported) as path:
            onnx.save(model, path)
    for form in forms:
        if form["file"] in ("model.packed", "shrunk.onnx"):
            form["bytes"] = (folder / form["file"]).stat().st_size
