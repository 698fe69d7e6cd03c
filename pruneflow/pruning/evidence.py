"""Evidence: what scores need besides the weights, collected from calibration batches.

An evidence is a function `(model, batches, loss) -> {name: tensor}` over the qualified names of the
model's weights. An importance declares the one it needs in an attribute `needs`, and reads it from
`context.evidence`. Collecting it changes neither weights, gradients, buffers nor random states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pruneflow.distributed import average_gradients, sum_over_processes
from pruneflow.errors import expect
from pruneflow.structure.parameters import Slot, locate
from pruneflow.structure.running import undisturbed

Loss = Callable[[Any, Any], Tensor]
"""`(model, batch) -> loss`: runs the model once and returns the mean loss of the batch."""

Evidence = Callable[[nn.Module, Iterable[Any], Loss], dict[str, Tensor]]


def gradients(model: nn.Module, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """Mean gradient of a loss over calibration batches.

    Each batch takes a forward and a backward pass, in the precision of the weights and the present
    mode of the model, training or evaluation. In distributed training, the mean is over all
    processes.

    Args:
        model: The model.
        batches: The calibration batches.
        loss: `(model, batch) -> loss`, the mean over the batch.

    Returns:
        Qualified name -> gradient, of the tensor's shape, for every tensor the loss depends on.

    Raises:
        ValueError: If there are no batches, or `loss` does not return a differentiable scalar.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> inputs = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])]
        >>> gradients(layer, inputs, lambda model, batch: model(batch).mean())
        {'weight': tensor([[2., 1.]])}
    """
    parameters = list(model.parameters())
    before = [parameter.grad for parameter in parameters]
    try:
        with undisturbed(model), torch.enable_grad():
            for parameter in parameters:
                parameter.grad = None
            count = 0
            for batch in batches:
                value = loss(model, batch)
                expect(
                    isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad,
                    "loss",
                    "return a scalar that depends on the weights",
                    value,
                    "return the mean over the batch",
                )
                value.backward()
                count += 1
            _check_count(count)
            average_gradients(parameters)
            return {
                name: slot.parameter.grad / count
                for name, slot in locate(model).items()
                if slot.parameter.grad is not None
            }
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def input_norms(model: nn.Module, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """L2 norm of the inputs that each weight of a `Linear` or convolution is multiplied by.

    The norm is over all samples and positions of the calibration batches: one per input feature of
    a `Linear`, and one per input channel and kernel position of a convolution. Each batch takes a
    forward pass. In distributed training, the norm is over the batches of all processes.

    Args:
        model: The model.
        batches: The calibration batches.
        loss: `(model, batch) -> loss`; only the forward pass in it matters.

    Returns:
        Qualified name -> norms, broadcastable to the weight's shape, for every layer called.

    Raises:
        ValueError: If there are no batches.

    Example:
        >>> inputs = [torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0, 1.0]])]
        >>> input_norms(nn.Linear(2, 1), inputs, lambda model, batch: model(batch).mean())
        {'weight': tensor([[5., 1.]])}
    """
    squares: dict[str, Tensor] = {}
    with undisturbed(model), torch.no_grad(), _summing_input_squares(model, squares):
        count = 0
        for batch in batches:
            loss(model, batch)
            count += 1
        _check_count(count)
    return {name: total.sqrt() for name, total in sum_over_processes(squares).items()}


_BY_NAME = {"gradients": gradients, "input_norms": input_norms}


def resolve_evidence(needs: object) -> Evidence:
    """The evidence that an importance declares in `needs`: a function or its name.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(needs, str) and needs in _BY_NAME:
        return _BY_NAME[needs]
    if not callable(needs):
        names = " or ".join(f"pruneflow.{name}" for name in _BY_NAME)
        raise ValueError(
            f"`needs` of an importance must be an evidence function, got {needs!r}; try {names}"
        )
    evidence: Evidence = needs
    return evidence


def default_evidence(needs: Evidence, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients in `.grad`, left by the last `backward()`.

    Raises:
        ValueError: If the importance needs another evidence.
    """
    name = getattr(needs, "__name__", repr(needs))
    expect(
        needs is gradients,
        "evidence",
        f"be given to an importance that needs {name}",
        None,
        f"collect it: evidence={name}(model, batches, loss)",
    )
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


@contextmanager
def _summing_input_squares(model: nn.Module, squares: dict[str, Tensor]) -> Iterator[None]:
    """Sum the squares of the inputs of each layer."""
    handles = [
        module.register_forward_pre_hook(_sum_hook(name, squares), with_kwargs=True)
        for name, slot in locate(model).items()
        for module in slot.modules
        if _has_input_norms(module, slot)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_input_norms(module: nn.Module, slot: Slot) -> bool:
    supported = isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, _ConvTransposeNd)
    return supported and slot.attribute == "weight"


def _sum_hook(name: str, squares: dict[str, Tensor]) -> Callable[..., None]:
    def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs: Tensor = (*args, *kwargs.values())[0].detach()
        square = inputs.to(torch.promote_types(inputs.dtype, torch.float32)).square()
        if isinstance(module, nn.Linear):
            total = square.reshape(-1, square.shape[-1]).sum(0, keepdim=True)
        else:
            total = _sum_per_kernel_entry(module, square)
        squares[name] = squares[name] + total if name in squares else total

    return add


@torch.enable_grad()
def _sum_per_kernel_entry(convolution: _ConvNd, square: Tensor) -> Tensor:
    """Sum of the inputs of each kernel entry: the gradient of the sum of all outputs."""
    shape = (convolution.groups, *convolution.weight.shape[1:])
    kernel = square.new_zeros(shape, requires_grad=True)
    with torch.autocast(square.device.type, enabled=False):
        convolution._conv_forward(square, kernel, None).sum().backward()
    total = kernel.grad
    assert total is not None  # it is a leaf
    if convolution.groups > 1:  # each group has its own inputs
        total = total.repeat_interleave(convolution.out_channels // convolution.groups, 0)
    return total


def _check_count(count: int) -> None:
    expect(count > 0, "batches", "hold at least one batch", "none", "give training data")
