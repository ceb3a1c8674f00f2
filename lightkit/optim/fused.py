"""What lightkit's optimizers have in common: one native call a step, and what that can do beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightkit import native
from lightkit._util.compiler import undisguised
from lightkit.optim.reference import Rule, step_reference

# What the parameter groups have beside torch's options. Those of a converted optimizer lack them.
_GROUP_DEFAULTS = ("ema_decay", "master_weights", "stochastic_rounding", "rounding_seed")

# What an optimizer has beside its groups; kept by copies and pickles.
_ATTRIBUTES = ("max_grad_norm", "skip_nonfinite", "_grad_norm", "skipped_steps", "_step_supports_amp_scaling")


class FusedStep(torch.optim.Optimizer):
    """The base of `SGD`, `Adam` and `AdamW`, each of which is also derived from torch's optimizer of that name.

    Arguments, defaults, parameter groups and state dict are those of torch's, in both directions. The update is
    computed in float32 (float64 for float64) and rounded once, whatever the parameter's dtype. On an x86 CPU,
    numbers below the smallest normal one (1e-38 in float32) count as 0. Parameters may be frozen, unfrozen, moved
    or re-pointed between steps; their state follows.

    What the kernels do not cover (sparse gradients, complex parameters, tensor subclasses such as DTensor,
    memory with gaps, devices without kernels, clipping over several devices) is done by torch's operations. On a GPU
    only ``skip_nonfinite`` waits for the device, once a step. ``foreach`` is accepted as torch's: there is one
    implementation. So is ``fused``; as in torch, ``True`` lets a ``GradScaler`` leave unscaling and the skipping of
    overflowed steps to the optimizer, which saves a pass over the gradients. On a GPU the kernels themselves read the
    scale, the overflow and a learning rate that is a float32 tensor there: nothing waits for the device. A step can be
    captured in a CUDA graph; one of Adam must count its steps on the GPU for that (``capturable``).
    ``differentiable`` is not supported.

    Args:
        max_grad_norm: scale the gradients of all groups down where their 2-norm is larger, as
            :func:`torch.nn.utils.clip_grad_norm_` does before a step, without writing them. The norm before
            scaling is then in ``grad_norm``.
        skip_nonfinite: leave everything as it is where some gradient is NaN or infinite. ``skipped_steps``
            counts these steps, and those that a ``GradScaler`` skips, if not on a GPU.
        ema_decay: keep an exponential moving average of each parameter in float32 (float64 for float64),
            ``average = decay * average + (1 - decay) * parameter``, that starts with the first step's result;
            see `averaged_parameters`. A group may have its own.
        master_weights: keep a float32 copy of each bfloat16 and float16 parameter, of which the parameter is
            the rounding, and the state in float32. What others write into a parameter goes into its copy.
        stochastic_rounding: round bfloat16 parameters up or down at random, such that updates too small to
            change a parameter change it on average. Not with ``master_weights``.
        rounding_seed: of that randomness; the groups' entry of this name counts on from it, so that a resumed
            run rounds as one that was not interrupted. Default: :func:`torch.initial_seed`.

    Raises:
        ValueError: values out of range, or ``differentiable=True``.
    """

    # The class of torch's whose place is taken, the native plan, and the update in torch's operations.
    _torch_class: ClassVar[type[torch.optim.Optimizer]]
    _plan_name: ClassVar[str]
    _rule: ClassVar[Rule]

    # As class attributes they hold for a converted optimizer too, whose __init__ was torch's: see `convert`.
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    _grad_norm: float | Tensor | None = None
    skipped_steps: int = 0
    _step_supports_amp_scaling: bool = False
    _plan: Any = None

    def _init(
        self,
        *arguments: Any,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
        ema_decay: float | None,
        master_weights: bool,
        stochastic_rounding: bool,
        rounding_seed: int | None,
        differentiable: bool,
        fused: bool | None,
        **options: Any,
    ) -> None:
        """Makes torch's optimizer of its arguments, and adds what it does not have."""
        if differentiable:
            raise ValueError(
                "differentiable=True is not supported: the native step is not recorded by autograd; "
                f"use torch.optim.{self._torch_class.__name__} to differentiate through the optimizer"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        if rounding_seed is None:
            rounding_seed = torch.initial_seed() if stochastic_rounding else 0
        self._extra_defaults = {
            "ema_decay": ema_decay,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
        }
        self._torch_class.__init__(self, *arguments, **options)
        self.defaults.update(self._extra_defaults)
        del self._extra_defaults
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self._step_supports_amp_scaling = bool(fused)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which takes the optimizer's defaults for what it does not say."""
        undisguised(super().add_param_group)(param_group)
        group = self.param_groups[-1]
        # While the optimizer is being made, torch fills in what it knows of alone.
        for name, value in getattr(self, "_extra_defaults", {}).items():
            group.setdefault(name, value)
        # The groups of a converted optimizer have none of these.
        decay = group.get("ema_decay")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and less than 1, got {decay}")
        if group.get("master_weights") and group.get("stochastic_rounding"):
            raise ValueError("master_weights and stochastic_rounding exclude each other: nothing is left to round")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _ATTRIBUTES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # A state dict of torch's does not know these; nor does a converted optimizer.
            for name in _GROUP_DEFAULTS:
                if name in self.defaults:
                    group.setdefault(name, self.defaults[name])
        if "_step_supports_amp_scaling" not in state:
            self._step_supports_amp_scaling = type(self)._step_supports_amp_scaling

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state dict with ``skipped_steps``, which torch's own `load_state_dict` passes over."""
        return {**undisguised(super().state_dict)(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` of this class or of torch's returned; torch's has skipped no steps."""
        amp_scaling = self._step_supports_amp_scaling
        # After those of others, which may have changed it.
        loaded: list[dict[str, Any]] = [state_dict]
        hook = self.register_load_state_dict_pre_hook(lambda optimizer, changed: loaded.append(changed))
        try:
            undisguised(super().load_state_dict)(state_dict)
        finally:
            hook.remove()
        self._step_supports_amp_scaling = amp_scaling
        self.skipped_steps = int(loaded[-1].get("skipped_steps", 0))
        self.restore_unrounded(self, loaded[-1])

    @classmethod
    def restore_unrounded(cls, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Gives an optimizer the saved state that keeps its dtype; torch has rounded all to that of the parameters."""
        for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(own["params"], saved["params"], strict=True):
                entry = state_dict["state"].get(index, {})
                # None where another thread has loaded another state meanwhile: asked for, it would be made, half.
                state = optimizer.state.get(parameter)
                for name in cls._unrounded(entry) if state is not None else ():
                    state[name] = entry[name].detach().to(parameter.device, copy=True)

    @classmethod
    def _unrounded(cls, entry: dict[str, Any]) -> set[str]:
        """What of a parameter's saved state has a dtype of its own."""
        return {"master_weight", "average"} & entry.keys()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None without one.
        """
        return self._watched_step(closure) if is_watched(self) else self.step_for(self, closure)

    # torch would wrap every step, to run hooks and to name it to a profiler: of a small model that takes as long as the
    # step itself. So it is done where there is somebody to see it.
    step.hooked = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, or makes them zeros."""
        if not set_to_none or torch.autograd._profiler_enabled():
            undisguised(super().zero_grad)(set_to_none)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step_for(self, optimizer: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> float | None:
        """Takes a step of an optimizer, itself or a converted one, without the hooks around it.

        Args:
            optimizer: its groups and state are used.
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A GradScaler sets these for the time of a step.
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        options = (optimizer.param_groups, optimizer.state, self.max_grad_norm, self.skip_nonfinite)
        plan = self._plan
        if plan is None and (module := native.load()) is not None:
            # One for all threads: whichever makes it first, they take their steps in turn.
            plan = vars(self).setdefault("_plan", getattr(module, self._plan_name)())

        outcome = None
        if plan is not None and _is_on_gpu(found_inf) and (grad_scale is None or _is_on_gpu(grad_scale)):
            outcome = plan.step(*options, 1.0, grad_scale, found_inf)
        if outcome is None:
            if found_inf is not None and found_inf.item() != 0:
                self.skipped_steps += 1
                return loss
            options += (1.0 if grad_scale is None else 1.0 / float(grad_scale),)
            if plan is not None:
                outcome = plan.step(*options, None, None)
        if outcome is None:
            if found_inf is None and grad_scale is None and self._is_plain(optimizer):
                self._take_torch_step(optimizer)
                return loss
            outcome = step_reference(type(self)._rule, *options)
        norm, skipped = outcome
        if norm is not None:
            self._grad_norm = norm
        if skipped:
            self.skipped_steps += 1
        for group in optimizer.param_groups:
            if group.get("stochastic_rounding") and not skipped:
                group["rounding_seed"] += 1
        return loss

    @torch.optim.Optimizer.profile_hook_step
    def _watched_step(self, closure: Callable[[], float] | None = None) -> float | None:
        return self.step_for(self, closure)

    @property
    def grad_norm(self) -> float | None:
        """The norm of the last step's gradients before clipping; to ask for it may wait for the device."""
        return None if self._grad_norm is None else float(self._grad_norm)

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Within this context the parameters have their averages' values (see ``ema_decay``).

        Afterwards they have their own again, whatever was written into them in between. Parameters without an
        average keep their values.
        """
        own = {p: p.detach().clone() for p, entry in list(self.state.items()) if "average" in entry}
        try:
            with torch.no_grad():
                for parameter in own:
                    parameter.copy_(self.state[parameter]["average"])
            yield
        finally:
            with torch.no_grad():
                for parameter, value in own.items():
                    parameter.copy_(value)

    def _is_plain(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether nothing is asked that torch's optimizer does not do."""
        extras = ("master_weights", "stochastic_rounding")
        return (
            self.max_grad_norm is None
            and not self.skip_nonfinite
            and not any(g.get("ema_decay") is not None or any(map(g.get, extras)) for g in optimizer.param_groups)
        )

    def _take_torch_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes torch's own step, without the hooks that it runs around it: the caller's step has run them."""
        step = self._torch_class.step
        if getattr(step, "hooked", False):
            step = step.__wrapped__
        # Not the fused one, which a state dict may ask for: it takes neither sparse gradients nor gaps, and SGD's
        # leaves half-precision parameters on a CPU nearly unchanged (2.13).
        fused = [group.get("fused") for group in optimizer.param_groups]
        try:
            for group in optimizer.param_groups:
                group["fused"] = None
            step(optimizer)
        finally:
            for group, value in zip(optimizer.param_groups, fused, strict=True):
                group["fused"] = value

    @classmethod
    def release(cls, state: dict[Tensor, dict[str, Any]]) -> None:
        """Makes the state of an optimizer one that torch's class goes on with: see `convert`."""


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Returns True if somebody wants to see a step: a profiler, or the owner of a hook around it."""
    return bool(
        torch.autograd._profiler_enabled()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def _is_on_gpu(number: Tensor | None) -> bool:
    """Whether a number is one that the kernels read where it lies."""
    return number is not None and number.is_cuda and number.dtype == torch.float32 and number.numel() == 1


def to_parameter_dtype(state: dict[Tensor, dict[str, Any]], names: tuple[str, ...]) -> None:
    """Rounds some entries of an optimizer's state to the dtypes of the parameters, as torch keeps them."""
    for parameter, entry in list(state.items()):
        for name in names:
            if isinstance(entry.get(name), Tensor):
                entry[name] = entry[name].to(parameter.dtype)
