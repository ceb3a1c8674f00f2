"""Stochastic gradient descent with one native call a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightkit.optim.fused import FusedStep
from lightkit.optim.reference import sgd_rule


class SGD(FusedStep, torch.optim.SGD):
    """A drop-in for :class:`torch.optim.SGD`: one native call updates all parameters in one pass.

    `FusedStep` describes the arguments that all optimizers here share.

    Args:
        params: the parameters, or dicts that define parameter groups.
        lr: the learning rate, a float or a one-element tensor.
        momentum: the factor of the momentum buffer; 0 keeps no buffer.
        dampening: the gradient enters the momentum buffer with the factor ``1 - dampening``.
        weight_decay: the factor of the L2 penalty.
        nesterov: True uses Nesterov's momentum [1]_.
        maximize: True maximizes the objective instead of minimizing it.
        foreach: has no effect, see `FusedStep`.
        differentiable: must be False, see `FusedStep`.
        fused: True lets a ``GradScaler`` leave unscaling to the step, see `FusedStep`.
        max_grad_norm: the 2-norm to which a step clips the gradients; None clips nothing. See `FusedStep`.
        skip_nonfinite: True skips steps with NaN or infinite gradients, see `FusedStep`.
        ema_decay: the decay rate of the averaged parameters; None keeps no averages. See `FusedStep`.
        master_weights: True keeps float32 copies of half-precision parameters and float32 momentum; otherwise the
            momentum has the parameter's dtype. See `FusedStep`.
        stochastic_rounding: True rounds bfloat16 parameters at random, see `FusedStep`.
        rounding_seed: the seed of the stochastic rounding, see `FusedStep`.

    Raises:
        ValueError: a value is out of its range, or ``differentiable`` is True.

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
