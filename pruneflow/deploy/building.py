"""Build the forms of a pruned model that `forms` measures, each from its file."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from pruneflow.deploy.extras import INSTALL
from pruneflow.deploy.onnx import OnnxModel, export_onnx, mismatch
from pruneflow.deploy.packed import load_packed, save_packed
from pruneflow.deploy.runtime import sparse_compile
from pruneflow.deploy.shrink import shrink
from pruneflow.files import write_whole
from pruneflow.structure.sparsity import multiply_adds_by_weight

Run = Callable[[Tensor], Tensor]

_SHRUNK, _SHRUNK_ONNX = "shrunk.pt2", "shrunk.onnx"


def drop_shrunk(folder: Path) -> None:
    """Delete the shrunk forms of an earlier run, which a new run may not write."""
    for name in (_SHRUNK, _SHRUNK_ONNX):
        (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Built:
    """A form that was built.

    Args:
        run: Maps a batch to outputs.
        file: The file it was built from.
        network: The module another process unpickles to run it; None if it loads the file.
        layout: Memory format of batches.
        note: Remarks on it.
    """

    run: Run
    file: Path
    network: nn.Module | None = None
    layout: torch.memory_format = torch.contiguous_format
    note: str = ""


def in_pytorch(network: nn.Module, layout: torch.memory_format) -> Run:
    """Run a network on batches in a memory format."""
    return lambda batch: network(batch.contiguous(memory_format=layout))


@dataclass(frozen=True)
class Builder:
    """Builds the forms.

    Args:
        dense: The model before pruning.
        pruned: The model with exact zeros.
        example: A batch of one.
        folder: Folder of the files to deploy.
        scratch: Folder of files that are only measured.
        layout: Memory format of images in PyTorch.
    """

    dense: nn.Module
    pruned: nn.Module
    example: Tensor
    folder: Path
    scratch: Path
    layout: torch.memory_format

    def build(self) -> tuple[dict[str, Built], dict[str, str]]:
        """Build all forms; returns those with correct outputs, and a note on each."""
        drop_shrunk(self.folder)
        built: dict[str, Built] = {}
        notes: dict[str, str] = {}
        for name, model, build in (
            ("dense", self.dense, self._dense),
            ("dense, ONNX Runtime", self.dense, self._dense_onnx),
            ("plain zeros", self.pruned, self._zeros),
            ("packed", self.pruned, self._packed),
            ("shrunk", self.pruned, self._shrunk),
            ("shrunk, ONNX Runtime", self.pruned, self._shrunk_onnx),
            ("sparse runtime", self.pruned, self._sparse),
        ):
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("ignore")
                    warnings.filterwarnings("always", module=r"pruneflow\.deploy")
                    form = build()
                    with torch.no_grad():
                        wrong = mismatch(model(self.example), form.run(self.example))
            except ImportError as error:
                notes[name] = f"needs {INSTALL}" if INSTALL in str(error) else str(error)
            except Exception as error:  # a form that fails must not fail the run
                if name == "dense":
                    raise
                notes[name] = str(error) or type(error).__name__
            else:
                warned = dict.fromkeys(str(warning.message) for warning in caught)
                notes[name] = " ".join(filter(None, [form.note, *warned]))
                if wrong is None:
                    built[name] = form
                else:
                    notes[name] = f"Not measured: its outputs are {wrong}."
        return built, notes

    def _dense(self) -> Built:
        return self._stored(self.dense, self.scratch / "dense.safetensors")

    def _dense_onnx(self) -> Built:
        return self._onnx(self.dense, self.scratch / "dense.onnx")

    def _zeros(self) -> Built:
        return self._stored(self.pruned, self.scratch / "zeros.safetensors")

    def _packed(self) -> Built:
        network = self._laid_out(self.pruned)
        network.load_state_dict(load_packed(self._packed_file))
        return self._in_pytorch(network, self._packed_file)

    def _shrunk(self) -> Built:
        file = self.folder / _SHRUNK
        pair = torch.cat([self.example] * 2)  # older PyTorch specialises a size of 1
        program = torch.export.export(
            self._laid_out(self._shrunk_model),
            (pair,),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        with write_whole(file) as temporary:
            torch.export.save(program, temporary)
            run = in_pytorch(torch.export.load(temporary).module(), self.layout)
            for count in (1, 3):
                batch = torch.cat([self.example] * count)
                with torch.no_grad():
                    wrong = mismatch(self.pruned(batch), run(batch))
                if wrong is not None:
                    raise ValueError(
                        f"{file.name} was not written: once loaded, its outputs for a batch of "
                        f"{count} are {wrong}."
                    )
        return Built(run, file, layout=self.layout, note=self._remaining())

    def _remaining(self) -> str:
        models = self._shrunk_model, self.dense
        remaining, parameters = (sum(p.numel() for p in model.parameters()) for model in models)
        cheaper, multiply_adds = (
            multiply_adds_by_weight(model, self.example)[0] for model in models
        )
        return (
            f"{remaining:,} of {parameters:,} parameters and {cheaper:,} of {multiply_adds:,} "
            "multiply-adds are left."
        )

    def _shrunk_onnx(self) -> Built:
        return self._onnx(self._shrunk_model, self.folder / _SHRUNK_ONNX)

    def _sparse(self) -> Built:
        threads = torch.get_num_threads()
        try:
            compiled = sparse_compile(self._shrunk_model, self.example, threads=threads)
        except (ValueError, RuntimeError):  # the shrunk model may use unsupported operations
            compiled = sparse_compile(self.pruned, self.example, threads=threads)
        return Built(compiled, self._packed_file, compiled)

    def _stored(self, network: nn.Module, file: Path) -> Built:
        with write_whole(file) as temporary:
            save_model(network, str(temporary))
        return self._in_pytorch(self._laid_out(network), file)

    def _in_pytorch(self, network: nn.Module, file: Path) -> Built:
        return Built(in_pytorch(network, self.layout), file, network, self.layout)

    def _onnx(self, network: nn.Module, file: Path) -> Built:
        export_onnx(network, self.example, file)
        return Built(OnnxModel(file, torch.get_num_threads()), file)

    def _laid_out(self, network: nn.Module) -> nn.Module:
        return copy.deepcopy(network).to(memory_format=self.layout)

    @cached_property
    def _packed_file(self) -> Path:
        path = self.folder / "model.packed"
        save_packed(self.pruned.state_dict(), path)
        return path

    @cached_property
    def _shrunk_model(self) -> nn.Module:
        return shrink(self.pruned, self.example, fixed_size=True)
