"""2:4 sparsity on NVIDIA GPUs: two of every four weights are zero, for sparse tensor cores."""

from __future__ import annotations

import copy
import logging
import warnings

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from pruneflow.errors import expect

_log = logging.getLogger(__name__)

# PyTorch's backends, CUTLASS and cuSPARSELt, need multiples of these.
_ROWS, _COLUMNS = 32, 64
_TYPES = (torch.float16, torch.bfloat16)


def to_semi_structured(model: nn.Module) -> nn.Module:
    """Convert the weights of eligible `nn.Linear` layers to PyTorch's compressed 2:4 format.

    For inference on an NVIDIA GPU, after pruning with `granularity=NM(2, 4)` to a sparsity of 0.5.
    The outputs of each converted layer are compared with those of the dense layer on random inputs.
    Layers that are not eligible stay dense; a warning is logged with the reasons from
    `eligibility`.

    Args:
        model: A model on a CUDA device of compute capability 8.0 or higher, in float16 or bfloat16.

    Returns:
        A copy with the compressed layers; `model` is not modified.

    Raises:
        ValueError: If no layer is eligible, with the reason for each; or if a converted layer fails
            or its outputs differ.

    Example:
        `fast = to_semi_structured(model.half().cuda())`

    References:
        Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks",
        https://arxiv.org/abs/2104.08378.
    """
    reasons = eligibility(model)
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    listed = "; ".join(f"{name} ({reason})" for name, reason in refused.items())
    expect(
        len(refused) < len(reasons),
        "model",
        "have an nn.Linear layer that is eligible for 2:4 kernels",
        listed or "no nn.Linear",
        "prune to a sparsity of 0.5 with granularity=NM(2, 4), and move the model to a CUDA GPU in "
        "float16 or bfloat16",
    )
    if listed:
        _log.warning("Left dense: %s", listed)
    sparse = copy.deepcopy(model)
    for name, layer in sparse.named_modules():
        if name in reasons and name not in refused:
            assert isinstance(layer, nn.Linear)
            _convert(name, layer)
    return sparse


def eligibility(model: nn.Module) -> dict[str, str | None]:
    """For each `nn.Linear`, why 2:4 kernels cannot run it.

    Args:
        model: The model.

    Returns:
        Qualified name of the layer -> the reason, or None if it is eligible.

    Example:
        >>> eligibility(nn.Sequential(nn.Linear(64, 32)))
        {'0': 'is float32, not float16 or bfloat16'}
    """
    # The fast path of nn.TransformerEncoderLayer passes these weights to a kernel for dense ones.
    fused = {
        id(layer)
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        for layer in (module.linear1, module.linear2)
    }
    reasons = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            if type(layer) is not nn.Linear:
                reason: str | None = f"is a {type(layer).__name__}, not an nn.Linear"
            elif id(layer) in fused:
                reason = "is run by the fused kernel of nn.TransformerEncoderLayer"
            else:
                reason = weight_reason(layer.weight) or device_reason(layer.weight.device)
            reasons[name] = reason
    return reasons


def weight_reason(weight: Tensor) -> str | None:
    """Why a weight is not 2:4, or its dtype or shape is not supported by the kernels.

    Args:
        weight: Shape (outputs, inputs).

    Example:
        >>> weight = torch.tensor([0.0, 0.0, 1.0, 2.0]).repeat(32, 16).half()
        >>> print(weight_reason(weight))
        None
        >>> weight_reason(weight.roll(1, 0)[:30])
        'is 30 by 64, not a multiple of 32 by 64'
        >>> weight[0, 0] = 1
        >>> weight_reason(weight)
        'is not 2:4: 1 of 512 groups of four inputs keep more than two weights'
    """
    if weight.dtype not in _TYPES:
        return f"is {str(weight.dtype).removeprefix('torch.')}, not float16 or bfloat16"
    rows, columns = weight.shape
    if rows == 0 or columns == 0 or rows % _ROWS or columns % _COLUMNS:
        return f"is {rows} by {columns}, not a multiple of {_ROWS} by {_COLUMNS}"
    kept = (weight.detach() != 0).reshape(-1, 4).sum(1)
    full = int((kept > 2).sum())
    if full:
        return f"is not 2:4: {full} of {len(kept)} groups of four inputs keep more than two weights"
    return None


def device_reason(device: torch.device) -> str | None:
    """Why 2:4 kernels cannot run on a device."""
    if device.type != "cuda":
        return f"is on {device.type}, not on a CUDA GPU"
    if torch.version.hip is not None:
        return "is on an AMD GPU (ROCm), for which PyTorch has no 2:4 kernels"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"is on a GPU of compute capability {major}.{minor}, below 8.0"
    return None


def _convert(name: str, layer: nn.Linear) -> None:
    # A separate generator, so that the global random state does not change.
    numbers = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
    probe = numbers.to(layer.weight)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")
        expected = layer(probe).float()
        weight = layer.weight.detach().contiguous()
        try:
            layer.weight = nn.Parameter(to_sparse_semi_structured(weight), requires_grad=False)
            found = layer(probe).float()
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"`model` must run with PyTorch's 2:4 kernels, got an error from {name}: {error}; "
                "keep the model dense on this GPU"
            ) from error
    off, norm = float((found - expected).norm()), float(expected.norm())
    expect(
        off <= 1e-2 * norm,  # half precision, summed in another order
        "model",
        "give the same outputs with 2:4 kernels",
        f"a difference of {off:.1e} in the outputs of {name}, with a norm of {norm:.1e}",
        "keep the model dense on this GPU",
    )
