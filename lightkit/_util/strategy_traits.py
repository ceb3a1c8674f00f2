"""Traits of strategies: the capabilities that loops, callbacks, data modules and the application ask for."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from torch import Tensor
    from torch.optim import Optimizer


@dataclass(frozen=True)
class StrategyTraits:
    """Capabilities of a strategy, which its class declares as the attribute ``traits``.

    Args:
        replicates_evaluation: each process evaluates on the whole data set, so that one process suffices.
        tolerates_worker_loss: the training continues after the loss of any process except the first.
        supports_lean_loop: `lightkit.callbacks.LeanLoop` may replace Lightning's training step.
        trains_locally: each process has its own optimizer state, because the processes do not share the gradients.
    """

    replicates_evaluation: bool = False
    tolerates_worker_loss: bool = False
    supports_lean_loop: bool = False
    trains_locally: bool = False


@runtime_checkable
class StepObserver(Protocol):
    """A strategy that acts after each optimizer step, whether Lightning or the lean loop took the step."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Acts after a step of ``optimizer``."""


@runtime_checkable
class LocalTrainer(Protocol):
    """A strategy whose processes have weights of their own between two averages."""

    @property
    def has_common_weights(self) -> bool:
        """True after a step in which all processes have taken part in an average and go on together."""
        ...

    def set_masks(self, masks: Mapping[Tensor, Tensor]) -> None:
        """Keeps the masked entries of the weights that the processes share at zero.

        Args:
            masks: for each masked parameter a bool tensor, False where an entry is zero; the same in all processes.
        """

    def outer_state(self) -> Optimizer | None:
        """Returns the state of an outer optimizer by the parameters of the module; None without one.

        The optimizer of the result is never stepped. After a change of the shapes of parameters, `resize` takes it.
        """

    def resize(self, outer_state: Optimizer | None) -> None:
        """Goes on with parameters of other shapes, which are the same in all processes.

        Args:
            outer_state: what `outer_state` has returned, with the new shapes.
        """

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Returns the ``obj`` of process ``src``; all processes must call the method."""


@runtime_checkable
class WeightServers(Protocol):
    """A strategy whose weights are on servers, which step them."""

    @property
    def mask_number(self) -> int:
        """The number of the masks of the weights that this process has; 0 without masks."""
        ...

    def set_masks(self, masks: Mapping[Tensor, Tensor], number: int) -> None:
        """Makes the servers keep masked entries of the weights at zero, from the update with the next gradient on.

        Args:
            masks: for each masked parameter a bool tensor of its shape, False where an entry stays zero.
            number: a number from 1; the servers ignore masks whose number is not larger than that of theirs.
        """

    def fetch_masks(self) -> dict[Tensor, Tensor]:
        """Returns the servers' masks by parameter."""
        ...


@runtime_checkable
class TrafficCounter(Protocol):
    """A strategy that counts the bytes that its process sends."""

    @property
    def communication(self) -> dict[str, float]:
        """Returns the counts of bytes by metric name, such as ``communication/bytes_per_step``.

        The dict is empty before the first step.
        """
        ...


# The class attributes that declared the traits in the previous release.
_OLD_NAMES = {
    "evaluates_everything": "replicates_evaluation",
    "survives_lost_workers": "tolerates_worker_loss",
    "takes_lean_steps": "supports_lean_loop",
}


def traits_of(strategy: object) -> StrategyTraits:
    """Returns the traits of a strategy or of a strategy class.

    A class without a declaration has the default traits. A subclass inherits the traits of its base class, except
    ``supports_lean_loop``: the methods that it overrides may change the step, so that it has to declare that itself.
    """
    cls = strategy if isinstance(strategy, type) else type(strategy)
    traits = getattr(cls, "traits", None)
    if not isinstance(traits, StrategyTraits):
        traits = StrategyTraits()
    elif "traits" not in vars(cls):
        traits = replace(traits, supports_lean_loop=False)
    for old, new in _OLD_NAMES.items():
        value = vars(cls).get(old) if new == "supports_lean_loop" else inspect.getattr_static(cls, old, None)
        if isinstance(value, bool):
            warnings.warn(
                f"{cls.__name__}.{old} is deprecated: declare traits = StrategyTraits({new}={value})",
                DeprecationWarning,
                stacklevel=2,
            )
            traits = replace(traits, **{new: value})
    return traits
