"""Many processes: one decision for all of them, whether they hold copies of the weights or shards.

Processes with copies of the weights (`DistributedDataParallel`) take the masks that rank 0 makes.
Sharded weights (`fully_shard`: `DTensor`s) stay where they are. Each process answers for its own
part of every tensor: read in the order of ranks, the parts are the whole tensor, row-major, each
entry once. What the parts have to agree on goes through `gather`.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:  # importing it takes most of a second; who has shards has done so already
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


def reshard(model: nn.Module) -> None:
    """Let go of what `fully_shard` has gathered for a forward pass that no backward pass followed.

    The next forward pass would use it, weights from before the prune.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()


def check_placements(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are spread over processes in a way that cannot be pruned.

    Raises:
        ValueError: Naming each such tensor, and why.
    """
    sharded = any(is_sharded(tensor) for tensor in tensors.values())
    refused = [
        f"{name} ({why})" for name, tensor in tensors.items() if (why := _refusal(tensor, sharded))
    ]
    if refused:
        raise ValueError(
            "`model` is expected to have copies of its weights in every process, or all of them "
            "as DTensors, Shard(0) or Replicate, on a mesh of all processes, but it has "
            f"{', '.join(refused)}; shard it with fully_shard, or `exclude` them"
        )


def decide(compute: Callable[[], T], tensors: Iterable[Tensor]) -> T:
    """Compute something so that every process gets the same, or raises the same error.

    Every process has to call it. Copies of the weights may differ in their last bits, and random
    numbers do: hence rank 0 computes for all. Of sharded weights, every process computes its part.

    Args:
        compute: Computes it; for sharded weights a collective, by `gather` alone.
        tensors: The weights it computes with.

    Returns:
        What `compute` returned, of rank 0 if the weights are copies.

    Example:
        >>> decide(lambda: 1 + 1, [])  # one process
        2
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return compute()
    if any(is_sharded(tensor) for tensor in tensors):
        return _together(compute)
    return _from_rank_zero(compute)


def gather(tensor: Tensor) -> Tensor:
    """Join the tensors of all processes along the first dimension, in the order of ranks."""
    return torch.cat(_exchange(tensor.cpu())).to(tensor.device)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Put the mean over processes in place of every `.grad`; of sharded weights it is one already.

    Every process has to call it. Where some of them have no gradient, it counts as zero there.
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


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether processes hold shards (or replicas) of the tensor that know of each other."""
    sharding = sys.modules.get("torch.distributed.tensor")
    return sharding is not None and isinstance(tensor, sharding.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from its shards if it has any."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor: its shard, or all of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def place(values: Tensor, like: Tensor) -> Tensor:
    """Lay `values`, which every process has, out as `like` is: on its device, sharded if it is."""
    if not is_sharded(like):
        return values.to(like.device)
    if is_sharded(values):
        return values.redistribute(like.device_mesh, like.placements)
    for dim, placement in enumerate(like.placements):
        if placement.is_shard():
            shards = [*values.chunk(like.device_mesh.size(dim)), values[:0]]
            values = shards[min(like.device_mesh.get_local_rank(dim), len(shards) - 1)]
    return _sharded(values.to(like.device), like)


def own(values: Tensor, like: Tensor) -> Tensor:
    """The part of `values` that this process answers for, given that they are laid out as `like`.

    Of a plain tensor that is all of it. Replicas are answered for by the first of them.
    """
    if not is_sharded(like):
        return values
    part = local(place(values, like))
    return part if _is_first_replica(like) else part[:0]


def assemble(part: Tensor, like: Tensor) -> Tensor:
    """Make one tensor, laid out as `like`, of the parts that the processes answer for."""
    if not is_sharded(like):
        return part
    if not _is_first_replica(like):
        part = part.new_empty(like.to_local().shape)
    for dim, placement in enumerate(like.placements):
        if placement.is_replicate():
            dist.broadcast(part, group=like.device_mesh.get_group(dim), group_src=0)
    return _sharded(part, like)


class _SharedError(Exception):
    """Carries an error that all processes have been told of."""


def _together(compute: Callable[[], T]) -> T:
    try:
        try:
            result = compute()
        except _SharedError:
            raise
        except Exception as error:
            # The others get it where they wait for what this process would have told them.
            _exchange(_portable(error))
        else:
            _exchange(None)
    except _SharedError as shared:
        raise shared.args[0] from shared.__context__
    return result


def _exchange(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    errors = [value for value in values if isinstance(value, Exception)]
    if errors:
        raise _SharedError(errors[0])
    return values


def _from_rank_zero(compute: Callable[[], T]) -> T:
    outcome: list[Any] = [None, None]  # what is computed, and what goes wrong
    if dist.get_rank() == 0:
        try:
            outcome[0] = compute()
        except Exception as error:
            outcome[1] = _portable(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _refusal(tensor: Tensor, sharded: bool) -> str | None:
    if hasattr(tensor, "_fsdp_flattened"):
        return "FullyShardedDataParallel has flattened it"
    if not is_sharded(tensor):
        return "it is not sharded, but others are" if sharded else None
    from torch.distributed.tensor import Shard  # noqa: PLC0415, see above

    placements = tensor.placements
    if tensor.device_mesh.mesh.flatten().tolist() != list(range(dist.get_world_size())):
        return "its mesh does not span all processes in their order"
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


def _sharded(part: Tensor, like: DTensor) -> DTensor:
    return like.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
