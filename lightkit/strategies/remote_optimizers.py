"""Optimizers whose steps are made by parameter servers: gradients are pushed, parameters and states come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightkit.errors import ConfigError
from lightkit.parameter_server import Client, Clipping, group_options
from lightkit.parameter_server.client import OptimizerState, PendingPush
from lightkit.parameter_server.shard import ParameterState


class RemoteOptimizers:
    """The optimizers of a worker, while parameter servers make their steps.

    Args:
        overlap: True lets the worker compute the next batch while a push is under way.

    Attributes:
        steps: the number of steps of the first optimizer so far.
    """

    def __init__(self, overlap: bool) -> None:
        self._overlap = overlap
        self._optimizers: list[Optimizer] = []
        self._client: Client | None = None
        self._pending: dict[int, PendingPush] = {}
        # For each optimizer the latest parameters of the servers, and the versions of its parameters after their copy.
        self._copied: dict[int, list[Tensor]] = {}
        self._copied_versions: dict[int, list[int]] = {}
        # Lightning's gradient clipping of the next step, by optimizer.
        self._clipping: dict[int, Clipping] = {}
        # States of a checkpoint, which the servers get when the training begins.
        self._restored: list[list[ParameterState]] | None = None
        # The servers' states since the latest push.
        self._fetched: list[OptimizerState] | None = None
        # The masks that the servers are to set, and their number.
        self._masks: dict[Tensor, Tensor] = {}
        self._mask_number = 0
        self._traffic = (0, 0)
        self.steps = 0

    @property
    def traffic(self) -> tuple[int, int]:
        """The number of bytes of the sent pushes, and the number of bytes of the received parameters."""
        return self._traffic if self._client is None else self._client.traffic

    def attach(self, optimizers: list[Optimizer]) -> None:
        """Replaces the ``step`` of optimizers by a push.

        Raises:
            ConfigError: an optimizer does not step once for each gradient.
        """
        self._optimizers = optimizers
        for index, optimizer in enumerate(optimizers):
            if isinstance(optimizer, LBFGS):
                raise ConfigError("ParameterServer: LBFGS evaluates the model several times in a step")
            step: Any = Optimizer.profile_hook_step(self._make_step(index))
            # Schedulers expect their own wrapper, and warn without this mark.
            step._wrapped_by_lr_sched = True
            vars(optimizer)["step"] = MethodType(step, optimizer)

    def detach(self) -> None:
        """Restores the ``step`` of the optimizers."""
        for optimizer in self._optimizers:
            vars(optimizer).pop("step", None)
        self._restored = self._fetched = None
        self._masks, self._mask_number = {}, 0

    def _make_step(self, index: int) -> Callable[..., Any]:
        def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            # Schedulers check that the optimizer has stepped before them.
            cast("Any", optimizer)._opt_called = True
            self.push(index, optimizer)
            return loss

        return step

    def start(self, client: Client) -> bool:
        """Joins the training of the servers; if the servers have none, worker 0 begins it with its parameters.

        The method copies no parameters from the servers: `pull` does.

        Args:
            client: the client of the servers.

        Returns:
            True if this worker has begun the training with its own parameters.

        Raises:
            LightkitError: a server cannot be reached, or refuses this worker.
        """
        self._client = client
        values = [[p.detach() for p in parameters_of(optimizer)] for optimizer in self._optimizers]
        options = [group_options(optimizer) for optimizer in self._optimizers]
        has_begun = client.start(options, values, self._restored)
        self._send_masks(client)
        return has_begun

    def set_masks(self, masks: Mapping[Tensor, Tensor], number: int) -> None:
        """Makes the servers keep masked entries at zero, from the update with the next push on.

        Args:
            masks: for each masked parameter a bool tensor of its shape, False where an entry stays zero.
            number: see `lightkit.parameter_server.Client.set_masks`; 0 for no masks.
        """
        self._masks, self._mask_number = dict(masks), number
        if self._client is not None:
            self._send_masks(self._client)

    def _send_masks(self, client: Client) -> None:
        for index, optimizer in enumerate(self._optimizers if self._mask_number else ()):
            client.set_masks(index, self._mask_number, [self._masks.get(p) for p in parameters_of(optimizer)])

    @property
    def mask_number(self) -> int:
        """The number of the masks of the parameters that this worker has; 0 without masks."""
        if self._client is None:
            return 0
        return min((self._client.mask_number(index) for index in range(len(self._optimizers))), default=0)

    def fetch_masks(self) -> dict[Tensor, Tensor]:
        """Returns the servers' masks by parameter."""
        client = self._connected()
        self.drain()
        found: dict[Tensor, Tensor] = {}
        for index, optimizer in enumerate(self._optimizers):
            for parameter, mask in zip(parameters_of(optimizer), client.masks(index), strict=True):
                if mask is not None:
                    found[parameter] = mask.to(parameter.device)
        return found

    def pull(self) -> None:
        """Copies the servers' parameters to the parameters of the optimizers."""
        client = self._connected()
        self._restored = self._fetched = None
        for index in range(len(self._optimizers)):
            self._copy_parameters(index, client.pull(index))

    @property
    def has_restored_states(self) -> bool:
        """True if the optimizers have states of a checkpoint that the servers have not got."""
        return self._restored is not None

    def restore_states(self) -> None:
        """Keeps the states of the optimizers, for the servers to start with."""
        self._restored = [[dict(o.state.get(p, {})) for p in parameters_of(o)] for o in self._optimizers]

    def clip_gradients(
        self, optimizer: Optimizer | LightningOptimizer, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm"
    ) -> None:
        """Makes the servers clip the gradients in the next step of an optimizer.

        Args:
            optimizer: the optimizer.
            clip_val: the largest norm, or the largest absolute value; 0 or less clips nothing.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        """
        if clip_val <= 0:
            return
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        value = float(clip_val)
        clipping = Clipping(max_value=value) if gradient_clip_algorithm == "value" else Clipping(max_norm=value)
        self._clipping[self._optimizers.index(inner)] = clipping

    def push(self, index: int, optimizer: Optimizer) -> None:
        """Pushes the gradients of an optimizer's parameters, and copies the parameters that come back.

        With ``overlap`` the parameters are copied by the next `drain`.

        Args:
            index: the index of the optimizer.
            optimizer: the optimizer.

        Raises:
            ConfigError: the training has not begun, the parameters were written to, or a gradient is sparse.
            LightkitError: a server is gone.
        """
        client = self._connected()
        self._check_unwritten(index, optimizer)
        self.drain(index)
        self._fetched = None
        clipping = self._clipping.pop(index, Clipping())
        own_max_norm: float | None = getattr(optimizer, "max_grad_norm", None)
        max_norms = [norm for norm in (clipping.max_norm, own_max_norm) if norm is not None]
        skips_nonfinite = bool(getattr(optimizer, "skip_nonfinite", False))
        clipping = Clipping(min(max_norms, default=None), clipping.max_value, skips_nonfinite)
        gradients: list[Tensor | None] = []
        for parameter in parameters_of(optimizer):
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise ConfigError("ParameterServer: gradients must be dense; use sparse=False in embeddings")
            gradients.append(parameter.grad)
        self._pending[index] = client.push(index, gradients, optimizer.param_groups, clipping)
        if index == 0:
            self.steps += 1
        if not self._overlap:
            self.drain(index)
        if client.norm is None:
            return
        # The optimizers of lightkit report both.
        own = cast("Any", optimizer)
        if own_max_norm is not None:
            own._grad_norm = client.norm
        if skips_nonfinite and not math.isfinite(client.norm):
            own.skipped_steps += 1

    def _connected(self) -> Client:
        if self._client is None:
            raise ConfigError("ParameterServer: an optimizer was stepped before the training began")
        return self._client

    def _check_unwritten(self, index: int, optimizer: Optimizer) -> None:
        """Checks that no program has written to the parameters: the servers' next reply would overwrite the change.

        Raises:
            ConfigError: the parameters were written to, or the optimizer has other parameters.
        """
        parameters = parameters_of(optimizer)
        versions = self._copied_versions[index]
        if len(parameters) != len(versions):
            raise ConfigError(
                "ParameterServer: the optimizer has got other parameters since the training began; the servers accept "
                "no new parameters during a training"
            )
        for position, (parameter, version) in enumerate(zip(parameters, versions, strict=True)):
            if parameter._version == version:
                continue
            # A callback may swap weights and swap them back. The latest reply is there while no push is under way.
            same = index not in self._pending and torch.equal(parameter.cpu(), self._copied[index][position])
            if not same:
                raise ConfigError(
                    "ParameterServer: between two steps somebody wrote to the parameters of the optimizer; the "
                    "servers, which hold the parameters, would overwrite that"
                )
            # While the push is under way there is nothing to compare with.
            versions[position] = parameter._version

    def drain(self, index: int | None = None) -> None:
        """Waits for pending pushes, and copies the parameters that come back.

        Args:
            index: the index of the optimizer whose push the method waits for; None waits for all optimizers.

        Raises:
            LightkitError: a server is gone, or refuses the push.
        """
        for place in list(self._pending) if index is None else [index]:
            if (pending := self._pending.pop(place, None)) is not None:
                self._copy_parameters(place, pending.result())

    @torch.no_grad()
    def _copy_parameters(self, index: int, values: Sequence[Tensor]) -> None:
        parameters = parameters_of(self._optimizers[index])
        torch._foreach_copy_([p.detach() for p in parameters], list(values))
        self._copied[index] = list(values)
        self._copied_versions[index] = [p._version for p in parameters]

    def fetch(self) -> None:
        """Copies the servers' parameters and optimizer states, unless nothing was pushed since the latest copy."""
        if self._client is None or self._fetched is not None:
            return
        self.drain()
        self._fetched = self._client.state()
        for index, (optimizer, fetched) in enumerate(zip(self._optimizers, self._fetched, strict=True)):
            self._copy_parameters(index, fetched.values)
            optimizer.state.clear()
            for parameter, entry in zip(parameters_of(optimizer), fetched.state, strict=True):
                if entry:
                    optimizer.state[parameter] = {
                        name: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
                        for name, value in entry.items()
                    }
            for group_index, seed in fetched.rounding_seeds.items():
                optimizer.param_groups[group_index]["rounding_seed"] = seed

    def finish(self) -> None:
        """Waits until no worker pushes any more, and copies the final parameters and optimizer states."""
        client = self._connected()
        self.drain()
        client.finish()
        # Other workers may have pushed since the latest checkpoint.
        self._fetched = None
        self.fetch()

    def leave(self) -> None:
        """Leaves the servers; without a `finish` before, the servers count this worker as lost."""
        if self._client is not None:
            self._traffic = self._client.traffic
            self._client.leave()
            self._client = None
        self._pending.clear()
        self._clipping.clear()
        self._copied.clear()
        self._copied_versions.clear()

    def abandon(self) -> None:
        """Closes the connections at once; the servers count this worker as lost."""
        if self._client is not None:
            self._client.abandon()


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Returns all parameters of an optimizer, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
