"""Whether the arguments of a Pruner are the kind of thing they have to be."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pruneflow.granularity import NM, Block, Channels
from pruneflow.torch_methods import is_torch_method


def check_kinds(
    model: object, importance: object, granularity: object, costs: object, masking: object
) -> None:
    """Refuse what they cannot be at all, such as a class for an object; see `Pruner`.

    Raises:
        TypeError: Naming the argument, what was expected and what came.
    """
    _expect(isinstance(model, nn.Module), "model", "an nn.Module", model)
    function = callable(importance) and not isinstance(importance, type)
    _expect(
        is_torch_method(importance) or function,
        "importance",
        "a function such as magnitude, or a pruning method of torch",
        importance,
    )
    _expect(
        masking is None or (hasattr(masking, "attach") and not isinstance(masking, type)),
        "masking",
        "an object such as InPlace()",
        masking,
    )
    _expect(
        granularity is None or isinstance(granularity, NM | Block | Channels),
        "granularity",
        "NM(2, 4), Block(1, 16), Channels(example_input) or None",
        granularity,
    )
    _expect(
        costs is None or isinstance(costs, Mapping),
        "costs",
        "a mapping such as multiply_adds(model, example_input)",
        costs,
    )


def _expect(good: bool, argument: str, expected: str, came: object) -> None:
    if not good:
        raise TypeError(f"`{argument}` is expected to be {expected}, but {came!r} came")
