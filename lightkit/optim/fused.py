"""The base of the optimizers: one native call a step, with clipping, averaging and master weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeGuard, overload

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightkit import native
from lightkit._util.compiler import undisguised
from lightkit.optim.masked_entries import find_masks
from lightkit.optim.reference import Rule, step_reference

# Options of parameter groups in addition to torch's. The groups of an optimizer of torch that `convert` has converted
# lack them.
_GROUP_DEFAULTS = ("ema_decay", "master_weights", "stochastic_rounding", "rounding_seed")

# Attributes of an optimizer that copies and pickles keep.
_ATTRIBUTES = ("max_grad_norm", "skip_nonfinite", "_grad_norm", "skipped_steps", "_step_supports_amp_scaling")


class FusedStep(torch.optim.Optimizer):
    """The base of `SGD`, `Adam` and `AdamW`, each of which also derives from torch's optimizer of that name.

    Arguments, defaults, parameter groups and state dicts are torch's; each loads the other's state dict. The update is
    computed in float32 (float64 for float64) and rounded once to the parameter's dtype. On an x86 CPU denormal numbers
    (below 1e-38 in float32) count as 0. Parameters may be frozen, unfrozen, moved or re-pointed between steps; their
    state follows.

    Torch's operations take the steps that the kernels do not cover: sparse gradients, complex parameters, tensor
    subclasses such as DTensor, memory with gaps, devices without kernels, clipping over several devices. On a GPU only
    ``skip_nonfinite`` waits for the device, once a step. ``foreach`` has no effect, since there is one implementation.
    ``fused=True`` lets a ``GradScaler`` leave unscaling and the skipping of overflowed steps to the optimizer, as in
    torch, which saves a pass over the gradients. On a GPU the kernels read the scale, the overflow and a float32 tensor
    learning rate on the device, without a wait. A CUDA graph can capture a step; Adam must count its steps on the GPU
    for that (``capturable``). ``differentiable`` is not supported.

    Args:
        max_grad_norm: the 2-norm of the gradients of all groups to which a step scales larger gradients down, as
            :func:`torch.nn.utils.clip_grad_norm_` does before a step, without writing the gradients; None scales
            nothing. `grad_norm` is the norm before scaling.
        skip_nonfinite: True changes nothing in a step with NaN or infinite gradients. ``skipped_steps`` counts these
            steps. It also counts the steps that a ``GradScaler`` skips on the CPU; those on a GPU it does not see.
        ema_decay: the decay of an exponential moving average of each parameter in float32 (float64 for float64),
            ``average = decay * average + (1 - decay) * parameter``, which starts with the result of the first step; see
            `averaged_parameters`. None keeps no averages. A group may have its own decay.
        master_weights: True keeps a float32 copy of each bfloat16 and float16 parameter, and the state in float32; the
            parameter is the rounded copy. The copy adopts values that a program writes into the parameter.
        stochastic_rounding: True rounds bfloat16 parameters up or down at random, so that updates too small for
            bfloat16 take effect on average. Excludes ``master_weights``.
        rounding_seed: the seed of the stochastic rounding. The group's entry of this name increases by one a step, so
            that a resumed run rounds like an uninterrupted one. Default: :func:`torch.initial_seed`.

    Attributes:
        skipped_steps: the number of skipped steps.

    Raises:
        ValueError: a value is out of its range, or ``differentiable`` is True.
    """

    # The class of torch that this one replaces, the name of the native plan, and the update in torch's operations.
    _torch_class: ClassVar[type[torch.optim.Optimizer]]
    _plan_name: ClassVar[str]
    _rule: ClassVar[Rule]

    # Class attributes serve converted optimizers, whose __init__ was torch's: see `convert`.
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
        """Initializes torch's optimizer with its arguments, and adds the options of this class."""
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
        """Adds a parameter group; the optimizer's defaults fill the options that the group lacks.

        Raises:
            ValueError: an option of the group is out of its range, or two options exclude each other.
        """
        undisguised(super().add_param_group)(param_group)
        group = self.param_groups[-1]
        # During __init__ torch fills in its own options only.
        for name, value in getattr(self, "_extra_defaults", {}).items():
            group.setdefault(name, value)
        # The groups of a converted optimizer have none of these options.
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
            # The groups in a state dict of torch lack these options, as do those of a converted optimizer.
            for name in _GROUP_DEFAULTS:
                if name in self.defaults:
                    group.setdefault(name, self.defaults[name])
        if "_step_supports_amp_scaling" not in state:
            self._step_supports_amp_scaling = type(self)._step_supports_amp_scaling

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state dict and ``skipped_steps``, which torch's own `load_state_dict` ignores."""
        return {**undisguised(super().state_dict)(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's, which has no ``skipped_steps``."""
        amp_scaling = self._step_supports_amp_scaling
        # This hook runs after those of the user, which may replace the state dict.
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
        """Copies the tensors that keep their own dtype from a loaded state dict to the optimizer's state.

        torch's ``load_state_dict`` has rounded these tensors to the dtypes of the parameters.

        Args:
            optimizer: the optimizer that has loaded ``state_dict``.
            state_dict: the state dict as it was saved.
        """
        for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(own["params"], saved["params"], strict=True):
                entry = state_dict["state"].get(index, {})
                # None if another thread has loaded another state meanwhile; state[parameter] would make an empty entry.
                state = optimizer.state.get(parameter)
                if state is None:
                    continue
                for name in cls._unrounded(entry):
                    state[name] = entry[name].detach().to(parameter.device, copy=True)

    @classmethod
    def _unrounded(cls, entry: dict[str, Any]) -> set[str]:
        """Returns the names of the tensors in ``entry``, a parameter's saved state, that keep their own dtype."""
        return {"master_weight", "average"} & entry.keys()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters that have a gradient.

        Args:
            closure: a function that reevaluates the model and returns the loss; None takes the present gradients.

        Returns:
            The loss from the closure, or None without a closure.
        """
        return self._observed_step(closure) if is_observed(self) else self.step_for(self, closure)

    # torch wraps the step of every class without this mark, to run hooks and open a profiler range. With a small model
    # that takes as long as the step. `step` calls the wrapper only if there are hooks or a profiler.
    vars(step)["hooked"] = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets the gradients to None, or to zero if ``set_to_none`` is False."""
        if not set_to_none or torch.autograd._profiler_enabled():
            undisguised(super().zero_grad)(set_to_none)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @overload
    def step_for(self, optimizer: torch.optim.Optimizer, closure: None = None) -> None: ...
    @overload
    def step_for(self, optimizer: torch.optim.Optimizer, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step_for(self, optimizer: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> float | None:
        """Takes a step of ``optimizer`` with this object's clipping and skipping, without the hooks around a step.

        Call `step` to take a step with the hooks. `lightkit.optim.convert` makes the ``step`` of an optimizer of torch
        call this method.

        Args:
            optimizer: the optimizer whose groups, state and parameters the step reads and updates: this object, or an
                optimizer that `lightkit.optim.convert` has converted, of the class of torch that this class replaces
                (``torch.optim.Adam`` for `Adam`).
            closure: a function that reevaluates the model and returns the loss; None takes the present gradients.

        Returns:
            The loss from the closure, or None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        masked = find_masks(optimizer)
        masks = None if masked is None else masked.on_cpu()
        is_native = self._update(optimizer, masks)
        if masked is not None and (masks is None or not is_native):
            masked.apply(optimizer)
        return loss

    def _update(self, optimizer: torch.optim.Optimizer, masks: dict[Tensor, Tensor] | None) -> bool:
        """Updates the parameters by the present gradients.

        Args:
            optimizer: see `step_for`.
            masks: the masks that the kernels apply, see `MaskedEntries.on_cpu`.

        Returns:
            True if the kernels have taken the step, False if torch's operations have.
        """
        # A GradScaler sets these attributes during a step.
        grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        options = (optimizer.param_groups, optimizer.state, self.max_grad_norm, self.skip_nonfinite)
        plan = self._plan
        if plan is None and (module := native.load()) is not None:
            # All threads share one plan, which runs one step at a time.
            plan = vars(self).setdefault("_plan", getattr(module, self._plan_name)())

        outcome = None
        if plan is not None and _is_on_gpu(found_inf) and (grad_scale is None or _is_on_gpu(grad_scale)):
            outcome = plan.step(*options, 1.0, grad_scale, found_inf, masks)
        if outcome is None:
            if found_inf is not None and found_inf.item() != 0:
                self.skipped_steps += 1
                return True
            inverse_scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
            if plan is not None:
                outcome = plan.step(*options, inverse_scale, None, None, masks)
        is_native = outcome is not None
        if outcome is None:
            if found_inf is None and grad_scale is None and self._is_plain(optimizer):
                self._take_torch_step(optimizer)
                return False
            outcome = step_reference(type(self)._rule, *options, inverse_scale)
        norm, skipped = outcome
        if norm is not None:
            self._grad_norm = norm
        if skipped:
            self.skipped_steps += 1
        for group in optimizer.param_groups:
            if group.get("stochastic_rounding") and not skipped:
                group["rounding_seed"] += 1
        return is_native

    @torch.optim.Optimizer.profile_hook_step
    def _observed_step(self, closure: Callable[[], float] | None = None) -> float | None:
        return self.step_for(self, closure)

    @property
    def grad_norm(self) -> float | None:
        """The 2-norm of the gradients before clipping in the last step that computed the norm; None before such a step.

        A step computes the norm for ``max_grad_norm`` and ``skip_nonfinite``. Reading the property may wait for the
        device.
        """
        return None if self._grad_norm is None else float(self._grad_norm)

    def averages(self) -> dict[Tensor, Tensor]:
        """Returns the average of each parameter that has one (see ``ema_decay``), float32 or float64."""
        return {p: entry["average"] for p, entry in list(self.state.items()) if "average" in entry}

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Sets the parameters to their averages (see ``ema_decay``) within the context.

        Afterwards the parameters have their own values again, whatever a program wrote into them within the context.
        Parameters without an average keep their values.
        """
        averages = self.averages()
        own = {p: p.detach().clone() for p in averages}
        try:
            with torch.no_grad():
                for parameter, average in averages.items():
                    parameter.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in own.items():
                    parameter.copy_(value)

    def _is_plain(self, optimizer: torch.optim.Optimizer) -> bool:
        """Returns True if this object and the groups of ``optimizer`` set no option that torch's class lacks."""
        extras = ("master_weights", "stochastic_rounding")
        return (
            self.max_grad_norm is None
            and not self.skip_nonfinite
            and not any(g.get("ema_decay") is not None or any(map(g.get, extras)) for g in optimizer.param_groups)
        )

    def _take_torch_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs the ``step`` of torch's class on the groups and the state of ``optimizer``.

        The hooks of ``optimizer`` do not run here: the ``step`` that called `step_for` runs them.

        Args:
            optimizer: this object, or an optimizer that `lightkit.optim.convert` has converted.
        """
        step = self._torch_class.step
        if getattr(step, "hooked", False):
            step = step.__wrapped__
        # A state dict may ask for torch's fused step. That takes neither sparse gradients nor gaps, and the one of SGD
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
        """Changes, in place, the state that this class has written into the form that torch's class writes.

        `lightkit.optim.convert` calls the method before a step of torch's own, for a copy or a pickle of a converted
        optimizer, and at the end of a conversion. Here the method does nothing; `Adam` overrides it.

        Args:
            state: the ``state`` of an optimizer of torch's class: the entries of each parameter by name.
        """


def is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Returns True if a profiler runs, or a hook around the step of ``optimizer`` is registered."""
    return bool(
        torch.autograd._profiler_enabled()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def _is_on_gpu(number: Tensor | None) -> TypeGuard[Tensor]:
    """Returns True for a float32 scalar on a GPU, which the kernels read there."""
    return number is not None and number.is_cuda and number.dtype == torch.float32 and number.numel() == 1


def to_parameter_dtype(state: dict[Tensor, dict[str, Any]], names: tuple[str, ...]) -> None:
    """Rounds the entries ``names`` of an optimizer's state to the dtypes of the parameters, in place."""
    for parameter, entry in list(state.items()):
        for name in names:
            if isinstance(entry.get(name), Tensor):
                entry[name] = entry[name].to(parameter.dtype)
