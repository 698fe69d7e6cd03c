"""Export ONNX files, check them against PyTorch, and run them in ONNX Runtime."""

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
from pruneflow.errors import expect
from pruneflow.files import write_whole
from pruneflow.structure.running import Example, arguments, call, evaluating, tensors_in

_TOLERANCE = 1e-4  # of the norm of the outputs
# Larger models need a second file for the weights, which could not be written atomically.
_MOST_BYTES = 1536 * 2**20
_VERBOSE_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def export_onnx(
    model: nn.Module,
    example_input: Example,
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
) -> None:
    """Export a model to one ONNX file and check that ONNX Runtime gives the same outputs.

    The outputs are compared on the example input and, with `dynamic_batch`, on a batch of another
    size. Zeros are stored and computed like other weights; `shrink` the model first to benefit from
    them.

    Args:
        model: A model that returns one tensor; it is exported in evaluation mode and not modified.
        example_input: A batch of any size on the device of the model: a tensor, a tuple of
            positional arguments or a dict of keyword arguments. Other values than tensors become
            constants.
        path: The file, written atomically.
        opset: Version of the ONNX operators; None for the one PyTorch recommends.
        dynamic_batch: Whether the file accepts batches of any size, or only that of the example.

    Raises:
        ImportError: If `onnxscript` or `onnxruntime` is not installed.
        TypeError: If the model does not return a tensor.
        ValueError: If the example input is empty or not valid for the model, if the model is too
            large for one file or cannot be exported (to this opset), or if its outputs in ONNX
            Runtime differ by more than 1e-4 of their norm.

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
    shapes = ", ".join(str(tuple(batch.shape)) for batch in tensors_in(example_input))
    expect(
        sizes and 0 not in sizes and not (dynamic_batch and len(sizes) > 1),
        "example_input",
        "be a batch of at least one sample, with the same batch size in all tensors",
        f"tensors of shape {shapes}" if shapes else "no tensors",
        "pass a batch, or dynamic_batch=False if the batch sizes differ",
    )
    named = [*model.named_parameters(), *model.named_buffers()]
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in named)
    expect(
        size <= _MOST_BYTES,
        "model",
        f"have at most {_MOST_BYTES:,} bytes of weights, the limit for one ONNX file",
        f"{size:,}",
        "shrink it or convert it to half precision",
    )
    # Older versions of PyTorch specialise a size of 1.
    single = sizes == {1}
    traced, examples = example_input, [example_input]
    if dynamic_batch and single:
        traced = _resized(example_input, lambda x: torch.cat([x] * 2))
        examples.append(_resized(example_input, lambda x: torch.cat([x] * 3)))
    elif dynamic_batch:
        examples.append(_resized(example_input, lambda x: x[:1]))
    with evaluating(model, example_input):
        addresses = {name: tensor.data_ptr() for name, tensor in named}
        expected = [call(model, example_input)]
        is_tensor, got = isinstance(expected[0], Tensor), type(expected[0]).__name__
        remedy = "wrap it in a module that returns the tensor you need"
        expect(is_tensor, "model", "return one tensor", got, remedy, error=TypeError)
        try:
            expected += [call(model, example) for example in examples[1:]]
        except ValueError as error:
            raise ValueError(
                "`model` must accept batches of any size, got an error for a batch of "
                f"{len(tensors_in(examples[1])[0])}: {error.__cause__}; pass dynamic_batch=False"
            ) from error
        # Otherwise the exporter would crash the process.
        moved = [name for name, tensor in named if tensor.data_ptr() != addresses[name]]
        expect(
            not moved,
            "model",
            "not assign to `.data` of its tensors in `forward`",
            f"new data of {', '.join(moved)}",
            "use `copy_(...)`",
        )
        program = _export(model, traced, opset, dynamic_batch)
    with write_whole(Path(path)) as temporary:
        program.save(temporary, external_data=False)
        try:
            found = [OnnxModel(temporary)(*tensors_in(example)) for example in examples]
        except ValueError as error:
            raise ValueError(
                f"`model` must run in ONNX Runtime once exported, got an error: {error.__cause__}; "
                "try another `opset`"
            ) from error
        for one, other in zip(expected, found, strict=True):
            wrong = mismatch(one, other)
            expect(
                wrong is None,
                "model",
                "give the same outputs in ONNX Runtime",
                f"outputs {wrong} for a batch of {len(one)}",
                "try another `opset`, dynamic_batch=False, or float32",
            )


class OnnxModel:
    """An ONNX model, run by ONNX Runtime on the CPU.

    Args:
        path: An ONNX file with one output.
        threads: Number of threads; None for ONNX Runtime's default, one per core.

    Raises:
        ImportError: If `onnxruntime` is not installed.
        ValueError: If the file cannot be run, has several outputs, or is called with tensors of
            the wrong number, shape or dtype.

    Example:
        `logits = OnnxModel("model.onnx", threads=2)(images)`
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        runtime: Any = require("onnxruntime")
        valid = threads is None or threads >= 1
        expect(valid, "threads", "be at least 1", threads, "pass None for one per core")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors only
        try:
            session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no common base class
            raise ValueError(
                "`path` must be an ONNX file that ONNX Runtime "
                f"{runtime.__version__} can run, got {str(path)!r} ({error}); export it with "
                "export_onnx"
            ) from error
        outputs = len(session.get_outputs())
        got = f"{outputs} outputs in {str(path)!r}"
        expect(outputs == 1, "path", "have one output", got, "use onnxruntime directly")
        self._session, self._inputs = session, session.get_inputs()

    def __call__(self, *batch: Tensor) -> Tensor:
        """Run a batch, one tensor per input; the output is on the device of the first."""
        arrays = [tensor.detach().cpu().numpy() for tensor in batch]
        try:
            names = [taken.name for taken in self._inputs]
            (output,) = self._session.run(None, dict(zip(names, arrays, strict=True)))
        except Exception as error:
            wanted = [f"{taken.type} of shape {taken.shape}" for taken in self._inputs]
            got = [f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in batch]
            raise ValueError(
                f"`batch` must be {' and '.join(wanted)}, got {' and '.join(got) or 'nothing'} "
                f"({error}); pass one tensor for each input"
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
        except Exception as error:  # the exporter can raise anything
            remedy = "dynamic_batch=False" if dynamic_batch else "another `opset`"
            raise ValueError(
                f"`model` must be exportable by torch.onnx, got an error: {_cause(error)}; try "
                f"{remedy}"
            ) from error
    reached = program.model.opset_imports[""]
    expect(
        opset in (None, reached),
        "opset",
        "be a version that torch.onnx can export this model to",
        opset,
        f"try {reached} or None",
    )
    return program


def mismatch(expected: Tensor, found: Tensor) -> str | None:
    """How outputs differ from those expected; None if they agree within 1e-4 of their norm.

    Example:
        >>> print(mismatch(torch.ones(2, 2), torch.ones(2, 2)))
        None
        >>> mismatch(torch.ones(2, 2), torch.ones(2, 3))
        'of shape (2, 3), not (2, 2)'
        >>> mismatch(torch.ones(2, 2), torch.full((2, 2), 1.1))
        'off by 1.0e-01 of their norm'
    """
    if expected.shape != found.shape:
        return f"of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    expected, found = expected.double(), found.double()
    norm, off = float(expected.norm()), float((expected - found).norm())
    if off <= _TOLERANCE * norm:  # false for NaN
        return None
    return f"off by {off / norm if norm else off:.1e} of their norm"


def _cause(error: BaseException) -> str:
    """The first line of the original error, without the exporter's advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _VERBOSE_LOGGERS]
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
