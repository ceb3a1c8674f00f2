"""Stochastic gradient descent, one native call a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightkit.optim.fused import FusedStep
from lightkit.optim.reference import sgd_rule


class SGD(FusedStep, torch.optim.SGD):
    """A drop-in for :class:`torch.optim.SGD`: one pass over all parameters, in one native call.

    For what all optimizers here have in common, the arguments from ``foreach`` on among it, see `FusedStep`.

    Args:
        params: parameters, or dicts that define parameter groups.
        lr: learning rate, a float or a one-element tensor.
        momentum: factor of the momentum buffer; Nesterov's variant with ``nesterov=True`` [1]_.
        dampening: the gradient enters the momentum buffer with the factor ``1 - dampening``.
        weight_decay: L2 penalty.
        nesterov: see ``momentum``.
        maximize: ascend instead of descend.
        foreach: see `FusedStep`, as for all that follow.
        differentiable: not supported.
        fused: for a ``GradScaler``.
        max_grad_norm: clips within the step.
        skip_nonfinite: leaves out steps with NaN or infinite gradients.
        ema_decay: keeps averaged parameters.
        master_weights: keeps float32 copies; the momentum is in float32 then, else of the parameter's dtype.
        stochastic_rounding: of bfloat16 parameters.
        rounding_seed: of that.

    Raises:
        ValueError: values out of range, or ``differentiable=True``.

    References:
        .. [1] Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013.
    """

    _torch_class = torch.optim.SGD
    _plan_name = "SgdPlan"
    _rule = staticmethod(sgd_rule)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int | None = None,
    ) -> None:
        self._init(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=False,
            differentiable=differentiable,
            fused=fused,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            ema_decay=ema_decay,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )

    @classmethod
    def _unrounded(cls, entry: dict[str, Any]) -> set[str]:
        names = super()._unrounded(entry)
        if "master_weight" in entry and isinstance(entry.get("momentum_buffer"), Tensor):
            names.add("momentum_buffer")
        return names
