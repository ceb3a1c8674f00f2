"""The activation functions that the native kernels compute together with what is before and behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkit.errors import ArgumentError


class Activation(NamedTuple):
    """An activation function of torch with its arguments.

    Args:
        name: a key of `ACTIVATIONS`.
        alpha: the first argument of torch's function; has no effect for a function without arguments.
        beta: the second argument of torch's function; has no effect for a function with fewer arguments.
    """

    name: str
    alpha: float = 0.0
    beta: float = 0.0

    @property
    def code(self) -> int:
        """The number by which the native library knows the function."""
        return _CODES[self.name]

    def __call__(self, input: Tensor) -> Tensor:
        """Computes the function in torch's operations."""
        return ACTIVATIONS[self.name](input, self.alpha, self.beta)


# The order is that of `Kind` in csrc/kernels/cpu/norm_act/activation.h, where 0 is no function.
ACTIVATIONS: Mapping[str, Callable[[Tensor, float, float], Tensor]] = {
    "relu": lambda x, alpha, beta: F.relu(x),
    "leaky_relu": lambda x, alpha, beta: F.leaky_relu(x, alpha),
    "hardtanh": lambda x, alpha, beta: F.hardtanh(x, alpha, beta),
    "elu": lambda x, alpha, beta: F.elu(x, alpha),
    "silu": lambda x, alpha, beta: F.silu(x),
    "gelu": lambda x, alpha, beta: F.gelu(x),
    "gelu_tanh": lambda x, alpha, beta: F.gelu(x, approximate="tanh"),
    "hardswish": lambda x, alpha, beta: F.hardswish(x),
    "hardsigmoid": lambda x, alpha, beta: F.hardsigmoid(x),
    "tanh": lambda x, alpha, beta: torch.tanh(x),
    "sigmoid": lambda x, alpha, beta: torch.sigmoid(x),
    "softplus": lambda x, alpha, beta: F.softplus(x, alpha, beta),
}
_CODES = {name: code for code, name in enumerate(ACTIVATIONS, start=1)}

# The defaults of torch's functions that have arguments.
_DEFAULTS = {"leaky_relu": (0.01, 0.0), "hardtanh": (-1.0, 1.0), "elu": (1.0, 0.0), "softplus": (1.0, 20.0)}


def as_activation(value: str | Activation | None) -> Activation | None:
    """Returns the function of a name, with torch's default arguments.

    Raises:
        ArgumentError: ``value`` is not a name of `ACTIVATIONS`, or its arguments are not finite numbers.
    """
    if value is None:
        return None
    given = Activation(value, *_DEFAULTS.get(value, ())) if isinstance(value, str) else value
    if not isinstance(given, Activation) or given.name not in ACTIVATIONS:
        raise ArgumentError(f"activation must be None, an Activation or one of {', '.join(ACTIVATIONS)}, got {value!r}")
    if not all(isinstance(a, (int, float)) and -math.inf < a < math.inf for a in given[1:]):
        raise ArgumentError(f"activation: alpha and beta must be finite numbers, got {value!r}")
    return given
