"""Stochastic gradient descent, one native call a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightkit import native


class SGD(torch.optim.SGD):
    """A drop-in for :class:`torch.optim.SGD`: one pass over all parameters, in one native call.

    Arguments, defaults, parameter groups and state dict are those of torch's SGD, in both directions. The
    update is computed in float32 (float64 for float64) and rounded once, whatever the parameter's dtype.
    Parameters may be frozen, unfrozen, moved or re-pointed between steps; their momentum follows.

    What the kernel does not cover (sparse gradients, complex parameters, tensor subclasses such as DTensor,
    memory with gaps, devices without kernels) is done by torch's own loop.

    Args:
        params: parameters, or dicts that define parameter groups.
        lr: learning rate, a float or a one-element tensor.
        momentum: factor of the momentum buffer; Nesterov's variant with ``nesterov=True`` [1]_.
        dampening: the gradient enters the momentum buffer with the factor ``1 - dampening``.
        weight_decay: L2 penalty.
        maximize: ascend instead of descend.
        foreach: accepted as torch's; there is one implementation.
        fused: accepted as torch's; there is one implementation.
        differentiable: not supported.

    Raises:
        ValueError: values out of range, or ``differentiable=True``.

    References:
        .. [1] Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013.
    """

    # As class attributes they hold for a converted optimizer too, whose __init__ was torch's: see `convert`.
    _plan: Any = None
    # Whatever torch's `fused` said: the gradient scaler must unscale the gradients itself.
    _step_supports_amp_scaling = property(lambda self: False)

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
    ) -> None:
        if differentiable:
            raise ValueError(
                "differentiable=True is not supported: the native step is not recorded by autograd; "
                "use torch.optim.SGD to differentiate through the optimizer"
            )
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._plan is None and (module := native.load()) is not None:
            self._plan = module.SgdPlan()
        if self._plan is None or not self._plan.step(self.param_groups, self.state):
            _torch_step(self)
        return loss


def _torch_step(optimizer: torch.optim.SGD) -> None:
    """Takes torch's own step, without the hooks that it runs around it: the caller's step has run them."""
    step = torch.optim.SGD.step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    # Not the fused one, which a state dict may ask for: it takes neither sparse gradients nor gaps, and leaves
    # half-precision parameters on a CPU nearly unchanged (2.13).
    fused = [group.get("fused") for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["fused"] = None
        step(optimizer)
    finally:
        for group, value in zip(optimizer.param_groups, fused, strict=True):
            group["fused"] = value
