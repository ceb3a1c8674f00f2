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
        params: the parameters, or dicts that define parameter groups.
        lr: the learning rate, a float or a one-element tensor.
        betas: the decay rates of the running means of the gradient and of its square.
        eps: the number that is added to the denominator.
        weight_decay: the factor of the L2 penalty, or of the decoupled weight decay [2]_ with
            ``decoupled_weight_decay=True``.
        amsgrad: True divides by the root of the largest second moment so far [3]_.
        foreach: has no effect, see `FusedStep`.
        maximize: True maximizes the objective instead of minimizing it.
        capturable: True counts the steps on the GPU if the parameters are on one.
        differentiable: must be False, see `FusedStep`.
        fused: True lets a ``GradScaler`` leave unscaling to the step, see `FusedStep`.
        decoupled_weight_decay: True decouples the weight decay from the gradient, see ``weight_decay``.
        max_grad_norm: the 2-norm to which a step clips the gradients; None clips nothing. See `FusedStep`.
        skip_nonfinite: True skips steps with NaN or infinite gradients, see `FusedStep`.
        ema_decay: the decay rate of the averaged parameters; None keeps no averages. See `FusedStep`.
        master_weights: True keeps float32 copies of half-precision parameters, see `FusedStep`.
        stochastic_rounding: True rounds bfloat16 parameters at random, see `FusedStep`.
        rounding_seed: the seed of the stochastic rounding, see `FusedStep`.

    Raises:
        ValueError: a value is out of its range, or ``differentiable`` is True.

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
        """Rounds the moments of half-precision parameters in ``state`` to half precision, in place, as torch does."""
        to_parameter_dtype(state, _MOMENTS)


class AdamW(Adam, torch.optim.AdamW):
    """A drop-in for :class:`torch.optim.AdamW`: `Adam` with decoupled weight decay of 0.01 by default.

    The arguments are those of `Adam` except ``decoupled_weight_decay``.
    """

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
