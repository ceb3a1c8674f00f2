"""The step of `lightkit.optim.SGD` in terms of torch's operations, for what its kernel does not cover."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sgd_reference(
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    inverse_scale: float,
) -> tuple[float | None, bool]:
    """One step, with the options and the state of `lightkit.optim.SGD`.

    Args:
        param_groups: those of the optimizer.
        state: the optimizer's, with ``momentum_buffer``, ``master_weight`` and ``average`` of a parameter.
        max_grad_norm: larger gradients are scaled down to this norm.
        skip_nonfinite: change nothing if some gradient is NaN or infinite.
        inverse_scale: factor of every gradient.

    Returns:
        The norm of the gradients, or None where neither clipping nor skipping asks for it; and whether the step
        was skipped.

    Raises:
        ValueError: some gradient is sparse.
    """
    gradients = [p.grad for group in param_groups for p in group["params"] if p.grad is not None]
    if any(g.is_sparse for g in gradients):
        raise ValueError(
            "SGD: sparse gradients are taken without max_grad_norm, skip_nonfinite, ema_decay, master_weights, "
            "stochastic_rounding and loss scaling only"
        )
    norm, factor = None, inverse_scale
    if max_grad_norm is not None or skip_nonfinite:
        norm = _norm(gradients) * abs(inverse_scale)
        if skip_nonfinite and not norm < float("inf"):
            return norm, True
        if max_grad_norm is not None:
            clip = max_grad_norm / (norm + 1e-6)
            factor *= 1.0 if clip > 1 else clip
    for group in param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                _update(parameter, state, group, factor)
    return norm, False


def _norm(gradients: list[Tensor]) -> float:
    """The 2-norm of all gradients together."""
    return sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in gradients) ** 0.5


def _update(parameter: Tensor, state: dict[Tensor, dict[str, Any]], group: dict[str, Any], factor: float) -> None:
    """The step of one parameter."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    half = dtype != parameter.dtype
    entry = state[parameter]
    if group.get("master_weights") and half and "master_weight" not in entry:
        entry["master_weight"] = parameter.detach().to(dtype)
    if group.get("master_weights") and half:
        value = entry["master_weight"]
        if not torch.equal(value.to(parameter.dtype), parameter):
            value.copy_(parameter)
    else:
        value = parameter.detach().to(dtype, copy=True)

    direction = parameter.grad.to(dtype) * (-factor if group["maximize"] else factor)
    if group["weight_decay"] != 0:
        direction = direction + group["weight_decay"] * value
    if group["momentum"] != 0:
        buffer = entry.get("momentum_buffer")
        if buffer is None:
            buffer = direction
        else:
            buffer = group["momentum"] * buffer.to(dtype) + (1 - group["dampening"]) * direction
        keep = dtype if group.get("master_weights") else parameter.dtype
        entry["momentum_buffer"] = buffer.to(keep, copy=True)
        direction = direction + group["momentum"] * buffer if group["nesterov"] else buffer
    value.sub_(group["lr"] * direction)

    if group.get("stochastic_rounding") and parameter.dtype == torch.bfloat16:
        parameter.copy_(_rounded_stochastically(value))
    else:
        parameter.copy_(value)
    if group.get("ema_decay") is not None:
        current = value if group.get("master_weights") and half else parameter.detach().to(dtype)
        average = entry.get("average")
        if average is None:
            entry["average"] = current.clone()
        else:
            average.lerp_(current, 1 - group["ema_decay"])


def _rounded_stochastically(value: Tensor) -> Tensor:
    """float32 values as bfloat16, up or down at random so that the expected result is the value."""
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device)
    rounded = ((value.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
