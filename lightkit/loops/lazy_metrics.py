"""Running values of logged metrics that accumulate the values of the steps only when they are read."""

from __future__ import annotations

import copyreg
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightkit._lightning.metrics import COMPUTED, FORWARD_VALUE, UPDATE_COUNT, ResultMetric

# A list of this many values is accumulated in a millisecond.
_MAX_PENDING = 4096

# The key in ``vars(metric)`` of the values that are not accumulated yet.
_PENDING = "_pending"


def _flushed(name: str) -> property:
    """Returns a property that flushes a `LazyMetric` and then reads or writes its attribute `name`."""

    def read(self: LazyMetric) -> Any:
        self.flush()
        if name not in vars(self):
            raise AttributeError(name)
        return vars(self)[name]

    def write(self: LazyMetric, value: Any) -> None:
        self.flush()
        vars(self)[name] = value

    return property(read, write)


class LazyMetric(ResultMetric):
    """A running value of Lightning's that keeps the values of the steps in a list and accumulates them on demand.

    `append` costs one list operation and runs no operation of torch. A read of the value flushes the list and gives
    what Lightning would have computed at every step, to the bit: the same float32 sums in the same order. After `flush`
    the metric has the state of Lightning's metric and an empty list. `make_lazy` and `make_eager` change the class of
    an existing metric; nobody constructs this class.
    """

    @staticmethod
    def supports(metric: ResultMetric) -> bool:
        """Returns True if `metric` may become lazy.

        It must be a mean or a last value of float32 numbers on the CPU, and not be reduced over processes.
        """
        meta = metric.meta
        return (
            type(metric) in (ResultMetric, LazyMetric)
            and metric.is_tensor
            and (meta.is_mean_reduction or not meta.on_epoch)
            and not meta.sync.should
            and isinstance(value := metric.value, Tensor)
            and value.device.type == "cpu"
            and value.dtype == torch.float32
        )

    def can_append(self, value: Tensor, batch_size: object) -> bool:
        """Returns True if the sum is the same when `value` is added later: `value` is float32, `batch_size` an int."""
        return type(batch_size) is int and value.dtype == vars(self)["value"].dtype == torch.float32

    def append(self, value: float, batch_size: int) -> None:
        """Adds the value of a step to the pending values, which the next `flush` accumulates.

        Args:
            value: the logged value.
            batch_size: the weight of the value in a mean.
        """
        attributes = vars(self)
        # torchmetrics does this around an update.
        attributes[COMPUTED] = None
        attributes[UPDATE_COUNT] += 1
        attributes["has_reset"] = False
        pending = attributes[_PENDING]
        pending.append((value, batch_size))
        if len(pending) >= _MAX_PENDING:
            self.flush()

    def last_value(self) -> float | Tensor | None:
        """Returns the value of the last step: a float if it is pending, else a tensor; None before the first step."""
        pending = vars(self)[_PENDING]
        return pending[-1][0] if pending else vars(self)[FORWARD_VALUE]

    def flush(self) -> None:
        """Accumulates the pending values into the state of Lightning's metric, and removes them from the list."""
        attributes = vars(self)
        pending = attributes[_PENDING]
        if not pending:
            return
        attributes[_PENDING] = []
        values, sizes = np.array(pending, dtype=np.float32).T
        if self.meta.on_step:
            attributes[FORWARD_VALUE] = _tensor(values[-1])
        if not self.meta.on_epoch:
            attributes["value"] = attributes[FORWARD_VALUE]
            return
        with np.errstate(all="ignore"):
            terms = np.concatenate(([np.float32(attributes["value"].item())], values * sizes))
            attributes["value"] = _tensor(np.add.accumulate(terms, dtype=np.float32)[-1])
        attributes["cumulated_batch_size"] = attributes["cumulated_batch_size"] + sum(size for _, size in pending)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A copy or pickle is Lightning's metric. pickle's oldest protocol does it so: newer ones need the own class.
        self.flush()
        state = {name: value for name, value in self.__getstate__().items() if name != _PENDING}
        reconstruct = copyreg._reconstructor  # pyright: ignore[reportAttributeAccessIssue]
        return reconstruct, (ResultMetric, object, None), state


for _name in ("value", "cumulated_batch_size", FORWARD_VALUE):
    setattr(LazyMetric, _name, _flushed(_name))


def _tensor(value: np.float32) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def make_lazy(metric: ResultMetric) -> None:
    """Turns a metric that `LazyMetric.supports` into a `LazyMetric`, in place."""
    vars(metric)[_PENDING] = []
    metric.__class__ = LazyMetric


def make_eager(metric: LazyMetric) -> None:
    """Flushes a `LazyMetric` and turns it into Lightning's metric, in place."""
    metric.flush()
    del vars(metric)[_PENDING]
    metric.__class__ = ResultMetric  # pyright: ignore[reportAttributeAccessIssue]
