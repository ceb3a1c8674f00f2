"""Adam and AdamW with one native call a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightkit.optim.fused import FusedStep, to_parameter_dtype
from lightkit.optim.reference import adam_rule

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Adam(FusedStep, torch.optim.Adam):
    """A drop-in for :class:`torch.optim.Adam` [1]_: one native call updates all parameters in one pass.

    `FusedStep` describes the arguments that all optimizers here share. The moments of half-precision parameters are
    float32: in half precision 0.999 times a second moment rounds to that moment, which would never decay.

    Args:
        params: parameters, or dicts that define parameter groups.
        lr: learning rate, a float or a one-element tensor.
        betas: decay rates of the running means of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: L2 penalty, or decoupled weight decay [2]_ with ``decoupled_weight_decay=True``.
        amsgrad: divide by the largest second moment so far [3]_.
        foreach: see `FusedStep`.
        maximize: maximize the objective instead of minimizing it.
        capturable: count the steps on the GPU if the parameters are on one.
        differentiable: must be False, see `FusedStep`.
        fused: True lets a ``GradScaler`` leave unscaling to the step, see `FusedStep`.
        decoupled_weight_decay: see ``weight_decay``.
        max_grad_norm: clip the gradients to this norm within the step, see `FusedStep`.
        skip_nonfinite: skip steps with NaN or infinite gradients, see `FusedStep`.
        ema_decay: decay rate of averaged parameters, see `FusedStep`.
        master_weights: keep float32 copies of half-precision parameters, see `FusedStep`.
        stochastic_rounding: round bfloat16 parameters at random, see `FusedStep`.
        rounding_seed: seed of the stochastic rounding, see `FusedStep`.

    Raises:
        ValueError: values out of range, or ``differentiable=True``.

    References:
        .. [1] Kingma and Ba, Adam: a method for stochastic optimization, ICLR 2015.
        .. [2] Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019.
        .. [3] Reddi et al., On the convergence of Adam and beyond, ICLR 2018.
    """

    _torch_class = torch.optim.Adam
    _plan_name = "AdamPlan"
    _rule = staticmethod(adam_rule)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int | None = None,
    ) -> None:
        options = {} if isinstance(self, torch.optim.AdamW) else {"decoupled_weight_decay": decoupled_weight_decay}
        self._init(
            params,
            lr,
            # A configuration gives a list.
            tuple(betas),
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            ema_decay=ema_decay,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
            **options,
        )

    @classmethod
    def _unrounded(cls, entry: dict[str, Any]) -> set[str]:
        return super()._unrounded(entry) | {name for name in _MOMENTS if isinstance(entry.get(name), Tensor)}

    def _is_plain(self, optimizer: torch.optim.Optimizer) -> bool:
        # torch's step needs the moments of half-precision parameters in half precision.
        halves = (torch.bfloat16, torch.float16)
        has_halves = any(p.dtype in halves for group in optimizer.param_groups for p in group["params"])
        return super()._is_plain(optimizer) and not has_halves

    @classmethod
    def release(cls, state: dict[Tensor, dict[str, Any]]) -> None:
        """Rounds the moments of half-precision parameters to half precision, as torch keeps them."""
        to_parameter_dtype(state, _MOMENTS)


class AdamW(Adam, torch.optim.AdamW):
    """A drop-in for :class:`torch.optim.AdamW`: `Adam` with decoupled weight decay of 0.01 by default."""

    _torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)
