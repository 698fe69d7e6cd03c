"""2:4 sparsity on NVIDIA GPUs: two of every four weights zero, run by sparse tensor cores."""

from __future__ import annotations

import copy
import logging
import warnings

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

_log = logging.getLogger(__name__)

# Both backends of PyTorch, CUTLASS and cuSPARSELt, take multiples of these.
_ROWS, _COLUMNS = 32, 64
_TYPES = (torch.float16, torch.bfloat16)


def to_semi_structured(model: nn.Module) -> nn.Module:
    """Give the eligible `nn.Linear` layers weights in PyTorch's compressed 2:4 form.

    For inference on an NVIDIA GPU, after a run that pruned with `granularity=NM(2, 4)` to a
    sparsity of 0.5. Each layer is compared with the dense one on random numbers before it is taken.
    What is not eligible stays dense, and a log line names it with the reason, as `eligibility`
    gives it.

    Args:
        model: On a CUDA device of compute capability 8.0 or more, in float16 or bfloat16.

    Returns:
        A copy with the compressed layers; `model` is left as it is.

    Raises:
        ValueError: If no layer is eligible, with the reason of each; or if the backend computes
            something else than the dense layer.

    Example:
        `fast = to_semi_structured(model.half().cuda())`

    References:
        Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks",
        https://arxiv.org/abs/2104.08378.
    """
    reasons = eligibility(model)
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    told = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    if len(refused) == len(reasons):
        raise ValueError(
            "`model` is expected to have an nn.Linear layer that 2:4 kernels run, but "
            + (f"none is: {told}" if told else "it has no nn.Linear")
            + "; prune to a sparsity of 0.5 with granularity=NM(2, 4), and move the model to a "
            "CUDA GPU in float16 or bfloat16"
        )
    if told:
        _log.warning("Left dense: %s", told)
    sparse = copy.deepcopy(model)
    for name, layer in sparse.named_modules():
        if name in reasons and name not in refused:
            assert isinstance(layer, nn.Linear)
            _convert(name, layer)
    return sparse


def eligibility(model: nn.Module) -> dict[str, str | None]:
    """Say of each `nn.Linear` why 2:4 kernels cannot run it; None where they can.

    Args:
        model: The model.

    Returns:
        Qualified name of the layer -> reason or None.

    Example:
        >>> eligibility(nn.Sequential(nn.Linear(64, 32)))
        {'0': 'is float32, not float16 or bfloat16'}
    """
    # Their fast path hands the weights of these two to a kernel that takes dense ones alone.
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
    """Say why a weight is not 2:4, or not of a type and shape that the kernels take.

    Args:
        weight: Of shape (outputs, inputs).

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
    """Say why no 2:4 kernels run on a device."""
    if device.type != "cuda":
        return f"lies on {device.type}, not on a CUDA GPU"
    if torch.version.hip is not None:
        return "lies on an AMD GPU (ROCm), which PyTorch has no 2:4 kernels for"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"lies on a GPU of compute capability {major}.{minor}, below 8.0"
    return None


def _convert(name: str, layer: nn.Linear) -> None:
    # Drawn on the CPU with a generator of its own, so that converting leaves the seeds alone.
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
                f"`model` is expected to have layers that PyTorch's 2:4 backend runs, but with "
                f"{name} it fails: {error}; leave the model dense on this GPU"
            ) from error
    off, norm = float((found - expected).norm()), float(expected.norm())
    if not off <= 1e-2 * norm:  # half precision, summed in another order
        raise ValueError(
            f"`model` is expected to compute the same with 2:4 kernels, but the outputs of {name} "
            f"differ by {off:.1e}, their norm being {norm:.1e}; leave the model dense on this GPU"
        )
