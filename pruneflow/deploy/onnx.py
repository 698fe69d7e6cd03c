"""ONNX files: exported, checked against PyTorch before they are kept, and run in ONNX Runtime."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pruneflow.deploy.extras import require
from pruneflow.files import write_whole
from pruneflow.structure.running import Example, arguments, call, evaluating, tensors_in

_TOLERANCE = 1e-4  # of the norm of the outputs
# Beyond it weights go into a second file, and the first alone would be neither whole nor movable.
_MOST_BYTES = 1536 * 2**20
_CHATTER = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def export_onnx(
    model: nn.Module,
    example_input: Example,
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
) -> None:
    """Write a model as one ONNX file, once ONNX Runtime gives the same outputs as PyTorch.

    The outputs are compared on the example and, with `dynamic_batch`, on a batch of another size.
    Zeros are stored and computed like other weights: to gain by them, `shrink` the model first.

    Args:
        model: Returns one tensor; it is exported in evaluation mode and left as it was.
        example_input: A batch, of any size, on the device of the model: a tensor, a tuple of
            positional arguments or a dict of keyword arguments. What is no tensor is fixed.
        path: The file, written whole or not at all.
        opset: Version of ONNX's operators; None takes the one PyTorch recommends.
        dynamic_batch: Whether the file takes batches of any size, or of the example's alone.

    Raises:
        ImportError: If `onnxscript` or `onnxruntime` is not installed.
        TypeError: If the model returns something else than a tensor.
        ValueError: If the example holds no sample or is not what the model takes, if the model has
            more weights than one file holds, cannot be exported (to this opset), or if its outputs
            in ONNX Runtime differ by more than 1e-4 of their norm.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "model.onnx")
        >>> layer = nn.Linear(4, 2)
        >>> export_onnx(layer, torch.ones(1, 4), path)
        >>> OnnxModel(path)(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """
    require("onnxscript")
    require("onnxruntime")
    sizes = {len(batch) if batch.dim() else 0 for batch in tensors_in(example_input)}
    if 0 in sizes or not sizes or (dynamic_batch and len(sizes) > 1):
        shapes = [tuple(batch.shape) for batch in tensors_in(example_input)]
        raise ValueError(
            "`example_input` must be a batch of one sample or more, in all of its tensors as many, "
            f"got tensors of shape {', '.join(map(str, shapes)) or 'none'}; give a batch, or "
            "dynamic_batch=False where the tensors differ"
        )
    named = [*model.named_parameters(), *model.named_buffers()]
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in named)
    if size > _MOST_BYTES:
        raise ValueError(
            f"`model` is expected to have at most {_MOST_BYTES:,} bytes of weights, which one ONNX "
            f"file holds, but it has {size:,}; shrink it or convert it to half precision"
        )
    # Older versions of PyTorch trace an axis of length 1 as a constant.
    single = sizes == {1}
    traced, examples = example_input, [example_input]
    if dynamic_batch and single:
        traced = _resized(example_input, lambda x: torch.cat([x] * 2))
        examples.append(_resized(example_input, lambda x: torch.cat([x] * 3)))
    elif dynamic_batch:
        examples.append(_resized(example_input, lambda x: x[:1]))
    with evaluating(model, example_input):
        places = {name: tensor.data_ptr() for name, tensor in named}
        expected = [call(model, example_input)]
        if not isinstance(expected[0], Tensor):
            raise TypeError(
                f"`model` is expected to return one tensor, but {type(expected[0]).__name__} came; "
                "wrap it in a module that returns the one you need"
            )
        try:
            expected += [call(model, example) for example in examples[1:]]
        except ValueError as error:
            raise ValueError(
                "`model` is expected to take batches of any size, but of "
                f"{len(tensors_in(examples[1])[0])} it does not: {error.__cause__}; give "
                "dynamic_batch=False"
            ) from error
        # The exporter would end the process.
        if moved := [name for name, tensor in named if tensor.data_ptr() != places[name]]:
            raise ValueError(
                "`model` must leave its tensors where they are, but `forward` assigns to `.data` "
                f"of {', '.join(moved)}; use `copy_(...)`"
            )
        program = _export(model, traced, opset, dynamic_batch)
    with write_whole(Path(path)) as temporary:
        program.save(temporary, external_data=False)
        try:
            found = [OnnxModel(temporary)(*tensors_in(example)) for example in examples]
        except ValueError as error:
            raise ValueError(
                f"`model` is expected to run in ONNX Runtime once exported, but: {error.__cause__}"
                "; try another `opset`"
            ) from error
        for one, other in zip(expected, found, strict=True):
            if wrong := mismatch(one, other):
                raise ValueError(
                    "`model` is expected to give the same outputs in ONNX Runtime, but for a batch "
                    f"of {len(one)} they are {wrong}; try another `opset`, dynamic_batch=False, or "
                    "float32"
                )


class OnnxModel:
    """An ONNX file, run by ONNX Runtime on the CPU.

    Args:
        path: A file with one output.
        threads: Number of threads; None leaves it to ONNX Runtime, one for each core.

    Raises:
        ImportError: If `onnxruntime` is not installed.
        ValueError: If the file cannot be run, has several outputs, or is called with tensors of
            another shape or type than it takes, or more or fewer of them.

    Example:
        `logits = OnnxModel("model.onnx", threads=2)(images)`
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        runtime: Any = require("onnxruntime")
        if threads is not None and threads < 1:
            raise ValueError(f"`threads` is expected to be 1 or more, but {threads} came")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors alone
        try:
            session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no class in common
            raise ValueError(
                f"`path`={str(path)!r} is expected to be an ONNX file that ONNX Runtime "
                f"{runtime.__version__} runs, but: {error}; export it with export_onnx"
            ) from error
        outputs = session.get_outputs()
        if len(outputs) != 1:
            raise ValueError(
                f"`path`={str(path)!r} is expected to hold a model with one output, but it has "
                f"{len(outputs)}; run it with onnxruntime itself"
            )
        self._session, self._inputs = session, session.get_inputs()

    def __call__(self, *batch: Tensor) -> Tensor:
        """Run a batch, a tensor for each input; the outputs lie on the same device."""
        arrays = [tensor.detach().cpu().numpy() for tensor in batch]
        try:
            names = [taken.name for taken in self._inputs]
            (output,) = self._session.run(None, dict(zip(names, arrays, strict=True)))
        except Exception as error:
            taken = [f"{taken.type} of shape {taken.shape}" for taken in self._inputs]
            came = [f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in batch]
            raise ValueError(
                f"`batch` is expected to be {' and '.join(taken)}, but "
                f"{' and '.join(came) or 'nothing'} came: {error}"
            ) from error
        return torch.from_numpy(output).to(batch[0].device)


def _resized(example_input: Example, resize: Callable[[Tensor], Tensor]) -> Any:
    return tree_map(lambda x: resize(x) if isinstance(x, Tensor) else x, example_input)


def _export(model: nn.Module, example: Example, opset: int | None, dynamic_batch: bool) -> Any:
    args, kwargs = arguments(example)
    shapes: Any = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        shapes = tree_map(lambda x: {0: batch} if isinstance(x, Tensor) else None, given)
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                input_names=["input"] if isinstance(example, Tensor) else None,
                output_names=["output"],
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=shapes,
                verbose=False,
            )
        except Exception as error:  # the exporter raises whatever its steps raise
            remedy = "; try dynamic_batch=False" if dynamic_batch else ""
            raise ValueError(
                f"`model` is expected to be one that torch.onnx exports, but: {_cause(error)}"
                f"{remedy}"
            ) from error
    reached = program.model.opset_imports[""]
    if opset not in (None, reached):
        raise ValueError(
            f"`opset` is expected to be a version that this model can be written in, but {opset} "
            f"came and the exporter stayed at {reached}; give that, or none"
        )
    return program


def mismatch(expected: Tensor, found: Tensor) -> str | None:
    """Say how outputs differ from those expected; None where they agree within 1e-4 of their norm.

    Example:
        >>> print(mismatch(torch.ones(2, 2), torch.ones(2, 2)))
        None
        >>> mismatch(torch.ones(2, 2), torch.ones(2, 3))
        'of shape (2, 3), not (2, 2)'
        >>> mismatch(torch.ones(2, 2), torch.full((2, 2), 1.1))
        '1.0e-01 of their norm off'
    """
    if expected.shape != found.shape:
        return f"of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    expected, found = expected.double(), found.double()
    norm, off = float(expected.norm()), float((expected - found).norm())
    if off <= _TOLERANCE * norm:  # not so with NaN either
        return None
    return f"{off / norm if norm else off:.1e} of their norm off"


def _cause(error: BaseException) -> str:
    """The first line of what was raised first, without the exporter's advice around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _CHATTER]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
