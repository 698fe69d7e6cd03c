"""The spellings of operations that the sparse runtime knows, as functions, methods and modules."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pruneflow.deploy.runtime.layers import INFINITY

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
CLAMPS = {  # those without further arguments: the lowest and the highest value
    **dict.fromkeys((torch.relu, torch.relu_, functional.relu, "relu", "relu_"), (0.0, INFINITY)),
    functional.relu6: (0.0, 6.0),
}
FUNCTIONS = {
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, functional.sigmoid, "sigmoid"), "sigmoid"),
    **dict.fromkeys((nn.Hardsigmoid, functional.hardsigmoid), "hardsigmoid"),
    **dict.fromkeys((nn.SiLU, functional.silu), "silu"),
    **dict.fromkeys((nn.Hardswish, functional.hardswish), "hardswish"),
}
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
DIFFERENCES = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
IN_PLACE = (operator.iadd, operator.imul, operator.isub, operator.itruediv)
POOLS: dict[Any, tuple[Any, str]] = {
    functional.max_pool2d: (nn.MaxPool2d, "stride padding dilation ceil_mode return_indices"),
    functional.avg_pool2d: (
        nn.AvgPool2d,
        "stride padding ceil_mode count_include_pad divisor_override",
    ),
}
