"""Parameters and gradients that are the same for every optimizer."""

from __future__ import annotations

import torch
from torch import nn


def make_parameters(sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def set_gradients(parameters, step, scale=1.0):
    """Sets the gradients of one step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
