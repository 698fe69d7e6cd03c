"""Distributed training: all processes get the same masks, for replicated and sharded weights.

With replicated weights (`DistributedDataParallel`), rank 0 computes the masks for all. Sharded
weights (`fully_shard`: `DTensor`s) stay where they are, and each process handles its local part:
the local parts, in the order of ranks, are the row-major full tensor, each entry once. Processes
communicate through `gather`.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pruneflow.errors import expect

if TYPE_CHECKING:  # slow to import; with sharded weights it is imported already
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


def reshard(model: nn.Module) -> None:
    """Free weights that `fully_shard` gathered for a forward pass without a backward pass.

    Otherwise the next forward pass would use these weights, from before pruning.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()


def check_placements(tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors are distributed in a supported way.

    Raises:
        ValueError: Names each unsupported tensor, with the reason.
    """
    sharded = any(is_sharded(tensor) for tensor in tensors.values())
    unsupported = [
        f"{name} ({reason})"
        for name, tensor in tensors.items()
        if (reason := _why_unsupported(tensor, sharded))
    ]
    expect(
        not unsupported,
        "model",
        "have replicated weights, or all of them as DTensors (Shard(0) or Replicate) on a mesh of "
        "all processes",
        ", ".join(unsupported),
        "shard the model with fully_shard, or `exclude` these tensors",
    )


def decide(compute: Callable[[], T], tensors: Iterable[Tensor]) -> T:
    """Call a function so that all processes get the same result, or raise the same error.

    All processes must call it. With replicated weights rank 0 computes the result for all, since
    replicas may differ in their last bits and random numbers do. With sharded weights every process
    calls the function.

    Args:
        compute: The function; with sharded weights it may communicate, through `gather` only.
        tensors: The weights it uses.

    Returns:
        What `compute` returned, on rank 0 if the weights are replicated.

    Example:
        >>> decide(lambda: 1 + 1, [])  # one process
        2
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return compute()
    if any(is_sharded(tensor) for tensor in tensors):
        return _on_all_ranks(compute)
    return _on_rank_zero(compute)


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all processes along the first dimension, in the order of ranks."""
    return torch.cat(_all_gather(tensor.cpu())).to(tensor.device)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every `.grad` by its mean over all processes, except those of sharded weights.

    FSDP averages these itself. All processes must call it. Missing gradients count as zero.
    """
    if not dist.is_initialized():
        return
    has = torch.tensor([[parameter.grad is not None for parameter in parameters]])
    for parameter, anywhere in zip(parameters, gather(has).any(0), strict=True):
        if anywhere and not is_sharded(parameter):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def sum_over_processes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum the tensors of each name over all processes; missing ones count as zero.

    All processes must call it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(tensors)
    everywhere: dict[str, torch.Size] = {}
    for shapes in _all_gather({name: tensor.shape for name, tensor in tensors.items()}):
        everywhere |= shapes
    device = next((tensor.device for tensor in tensors.values()), None)
    sums = {}
    for name, shape in sorted(everywhere.items()):
        sums[name] = tensors[name].clone() if name in tensors else torch.zeros(shape, device=device)
        dist.all_reduce(sums[name])
    return sums


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a `DTensor`."""
    sharding = sys.modules.get("torch.distributed.tensor")
    return sharding is not None and isinstance(tensor, sharding.DTensor)


def gather_full(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from its shards if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """The local shard of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def distribute_like(values: Tensor, like: Tensor) -> Tensor:
    """Distribute `values`, equal in all processes, like another tensor: device and placements."""
    if not is_sharded(like):
        return values.to(like.device)
    if is_sharded(values):
        return values.redistribute(like.device_mesh, like.placements)
    for dim, placement in enumerate(like.placements):
        if placement.is_shard():
            shards = [*values.chunk(like.device_mesh.size(dim)), values[:0]]
            values = shards[min(like.device_mesh.get_local_rank(dim), len(shards) - 1)]
    return _from_local(values.to(like.device), like)


def local_part(values: Tensor, like: Tensor) -> Tensor:
    """The part of `values` that this process handles if they are distributed like `like`.

    All of it for a plain tensor. Of several replicas only the first is not empty.
    """
    if not is_sharded(like):
        return values
    part = to_local(distribute_like(values, like))
    return part if _is_first_replica(like) else part[:0]


def from_local_parts(part: Tensor, like: Tensor) -> Tensor:
    """Build a tensor distributed like `like` from the `local_part` of each process."""
    if not is_sharded(like):
        return part
    if not _is_first_replica(like):
        part = part.new_empty(like.to_local().shape)
    for dim, placement in enumerate(like.placements):
        if placement.is_replicate():
            dist.broadcast(part, group=like.device_mesh.get_group(dim), group_src=0)
    return _from_local(part, like)


class _SharedError(Exception):
    """Wraps an error that all processes have received."""


def _on_all_ranks(compute: Callable[[], T]) -> T:
    try:
        try:
            result = compute()
        except _SharedError:
            raise
        except Exception as error:
            # The other processes receive it in their next `_all_gather`.
            _all_gather(_picklable(error))
        else:
            _all_gather(None)
    except _SharedError as shared:
        raise shared.args[0] from shared.__context__
    return result


def _all_gather(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    errors = [value for value in values if isinstance(value, Exception)]
    if errors:
        raise _SharedError(errors[0])
    return values


def _on_rank_zero(compute: Callable[[], T]) -> T:
    outcome: list[Any] = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            outcome[0] = compute()
        except Exception as error:
            outcome[1] = _picklable(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _picklable(error: Exception) -> Exception:
    """The error, or one with the same message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _why_unsupported(tensor: Tensor, sharded: bool) -> str | None:
    if hasattr(tensor, "_fsdp_flattened"):
        return "flattened by FullyShardedDataParallel"
    if not is_sharded(tensor):
        return "not sharded, but others are" if sharded else None
    from torch.distributed.tensor import Shard  # noqa: PLC0415, see above

    placements = tensor.placements
    if tensor.device_mesh.mesh.flatten().tolist() != list(range(dist.get_world_size())):
        return "its mesh does not span all processes in the order of ranks"
    if sum(placement.is_shard() for placement in placements) > 1 or not all(
        placement.is_replicate() or (type(placement) is Shard and placement.dim == 0)
        for placement in placements
    ):
        return ", ".join(map(repr, placements))
    return None


def _is_first_replica(tensor: DTensor) -> bool:
    return not any(
        placement.is_replicate() and tensor.device_mesh.get_local_rank(dim)
        for dim, placement in enumerate(tensor.placements)
    )


def _from_local(part: Tensor, like: DTensor) -> DTensor:
    return like.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
