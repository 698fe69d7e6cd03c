"""Layers and networks of kinds that several tests need."""

import torch
from torch import nn


class Conv1D(nn.Module):
    """As in GPT-2: a Linear layer that keeps its weight transposed."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Lora(nn.Module):
    """A frozen layer and two trained factors beside it, the second of which starts at zero."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(32, 32).requires_grad_(False)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))
