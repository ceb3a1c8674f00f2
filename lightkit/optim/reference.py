"""Reference steps of the optimizers in torch's operations, for parameters that the kernels do not cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Updates a parameter's value in place by its gradient, both in the accumulation dtype: at least float32. The other
# arguments are the parameter's state, its group, and the dtype in which the rule keeps the state.
Rule = Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any], torch.dtype], None]


def step_reference(
    rule: Rule,
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    inverse_scale: float,
) -> tuple[float | Tensor | None, bool]:
    """Takes one step with the options and the state of `lightkit.optim.FusedStep`.

    Args:
        rule: the update rule of the algorithm.
        param_groups: the parameter groups of the optimizer.
        state: the state of the optimizer by parameter: the entries of ``rule``, ``master_weight`` and ``average``.
        max_grad_norm: the 2-norm to which the step scales larger gradients down; None scales nothing.
        skip_nonfinite: True changes nothing if a gradient is NaN or infinite.
        inverse_scale: a factor by which the step multiplies every gradient first.

    Returns:
        The 2-norm of all gradients, or None if neither clipping nor skipping needs it; and True if the step was
        skipped. The norm is a tensor for gradients on other devices than a CPU: only ``skip_nonfinite`` waits for the
        device.

    Raises:
        ValueError: a gradient is sparse.
    """
    gradients = [p.grad for group in param_groups for p in group["params"] if p.grad is not None]
    if any(g.is_sparse for g in gradients):
        raise ValueError(
            "sparse gradients are taken without max_grad_norm, skip_nonfinite, ema_decay, master_weights, "
            "stochastic_rounding and loss scaling only"
        )
    norm, factor = None, inverse_scale
    if max_grad_norm is not None or skip_nonfinite:
        norm = _norm(gradients) * abs(inverse_scale)
        if skip_nonfinite and not norm < float("inf"):
            return norm, True
        if max_grad_norm is not None:
            clip = max_grad_norm / (norm + 1e-6)
            # NaN stays NaN.
            factor = factor * (clip.clamp(max=1.0) if isinstance(clip, Tensor) else min(clip, 1.0))
    for group in param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                _update(rule, parameter, state[parameter], group, factor)
    return norm, False


def sgd_rule(
    value: Tensor, gradient: Tensor, entry: dict[str, Any], group: dict[str, Any], state_dtype: torch.dtype
) -> None:
    """Updates ``value`` by the `Rule` of `lightkit.optim.SGD`: see :class:`torch.optim.SGD`."""
    if group["weight_decay"] != 0:
        gradient = gradient + group["weight_decay"] * value
    if group["momentum"] != 0:
        buffer = entry.get("momentum_buffer")
        if buffer is None:
            buffer = gradient
        else:
            buffer = group["momentum"] * buffer.to(value.dtype) + (1 - group["dampening"]) * gradient
        entry["momentum_buffer"] = buffer.to(state_dtype, copy=True)
        gradient = gradient + group["momentum"] * buffer if group["nesterov"] else buffer
    value.sub_(group["lr"] * gradient)


def adam_rule(
    value: Tensor, gradient: Tensor, entry: dict[str, Any], group: dict[str, Any], state_dtype: torch.dtype
) -> None:
    """Updates ``value`` by the `Rule` of `lightkit.optim.Adam` and `AdamW`.

    The moments have the dtype of ``value``, which is never half precision; ``state_dtype`` has no effect.
    """
    step = entry.setdefault("step", torch.zeros((), dtype=torch.float32))
    step += 1
    count, (beta1, beta2) = float(step), map(float, group["betas"])
    if group["weight_decay"] != 0 and group["decoupled_weight_decay"]:
        value.mul_(1 - group["lr"] * group["weight_decay"])
    elif group["weight_decay"] != 0:
        gradient = gradient + group["weight_decay"] * value
    for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
        entry[name] = entry[name].to(value.dtype) if name in entry else torch.zeros_like(value)
    mean = entry["exp_avg"].lerp_(gradient, 1 - beta1)
    square = entry["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if group["amsgrad"]:
        square = torch.maximum(entry["max_exp_avg_sq"], square, out=entry["max_exp_avg_sq"])
    denominator = square.sqrt().div_((1 - beta2**count) ** 0.5).add_(group["eps"])
    value.sub_(group["lr"] / (1 - beta1**count) * (mean / denominator))


def _norm(gradients: list[Tensor]) -> float | Tensor:
    """Returns the 2-norm of all gradients together: a float on a CPU, else a tensor on their device."""
    if not gradients:
        return 0.0
    device = gradients[0].device
    # Devices other than CPUs and GPUs may lack float64 or emulate it.
    dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    norms = [torch.linalg.vector_norm(g, dtype=dtype).to(device) for g in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return float(norm) if device.type == "cpu" else norm


def _update(
    rule: Rule, parameter: Tensor, entry: dict[str, Any], group: dict[str, Any], factor: float | Tensor
) -> None:
    """Updates one parameter by ``rule`` with its gradient times ``factor``; ``entry`` is the parameter's state."""
    assert parameter.grad is not None
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    mastered = bool(group.get("master_weights")) and dtype != parameter.dtype
    if mastered:
        value = entry.setdefault("master_weight", parameter.detach().to(dtype))
        # Adopts values that a program wrote into the parameter. torch.where does not wait for the device.
        value.copy_(torch.where(value.to(parameter.dtype) == parameter, value, parameter.to(dtype)))
    else:
        value = parameter.detach().to(dtype, copy=True)
    if isinstance(factor, Tensor):
        factor = factor.to(device=parameter.device, dtype=dtype)
    gradient = parameter.grad.to(dtype) * (-factor if group["maximize"] else factor)
    rule(value, gradient, entry, group, dtype if mastered else parameter.dtype)
    if group.get("stochastic_rounding") and parameter.dtype == torch.bfloat16:
        parameter.copy_(_rounded_stochastically(value))
    else:
        parameter.copy_(value)
    if group.get("ema_decay") is not None:
        current = value if mastered else parameter.detach().to(dtype)
        if "average" in entry:
            entry["average"].lerp_(current, 1 - group["ema_decay"])
        else:
            entry["average"] = current.clone()


def _rounded_stochastically(value: Tensor) -> Tensor:
    """Rounds float32 values up or down to bfloat16 at random; the expectation of a result is its value."""
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device)
    rounded = ((value.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
