"""Measurements of models: sizes, multiply-adds, latencies, and the interval of an accuracy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightkit._util.device_sync import wait_for
from lightkit.compress.tracing import trace
from lightkit.flops import FlopCounter

# The number of timed calls of each model, of which the median counts.
_REPEATS = 31

# The quantile of the normal distribution for an interval of 95 %.
_Z = 1.959964


def multiply_adds(model: nn.Module, arguments: Sequence[Any]) -> int:
    """Returns the multiply-adds of a model's forward pass for one sample.

    Args:
        model: the model in evaluation mode.
        arguments: the inputs of a batch.
    """
    inputs = first_samples(arguments, 1)
    with FlopCounter() as counter, torch.inference_mode():
        model(*inputs)
    # The counter cannot count in a process that has compiled code; the layers themselves then say their operations.
    return counter.total // 2 if counter.total else round(trace(model, inputs).macs())


def latencies(models: dict[str, nn.Module], arguments: Sequence[Any], batch_size: int) -> dict[str, float]:
    """Returns the median milliseconds of a forward pass of each model, which the function calls in turn.

    Args:
        models: the models in evaluation mode by name.
        arguments: the inputs of a batch, with at least ``batch_size`` samples.
        batch_size: the number of samples.
    """
    inputs = first_samples(arguments, batch_size)
    device = next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for repeat in range(_REPEATS + 3):
            for name, model in models.items():
                wait_for(device)
                started = time.perf_counter()
                model(*inputs)
                wait_for(device)
                # The first calls choose kernels and allocate memory.
                if repeat >= 3:
                    seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


def first_samples(arguments: Sequence[Any], count: int) -> Any:
    """Returns the first samples of a batch's inputs."""
    return tree_map(lambda x: x[:count] if isinstance(x, Tensor) and x.dim() > 0 else x, tuple(arguments))


def accuracy_interval(share: float, count: int) -> tuple[float, float]:
    """Returns the interval of 95 % of a share of right samples, by Wilson's formula [1]_.

    Args:
        share: the share of right samples.
        count: the number of samples.

    References:
        .. [1] Wilson, Probable inference, the law of succession, and statistical inference, Journal of the American
           Statistical Association 1927.
    """
    scale = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return centre - half, centre + half
