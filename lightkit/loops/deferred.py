"""Running values of what is logged, brought up to date when somebody looks."""

from __future__ import annotations

import copyreg
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightkit._lightning.metrics import COMPUTED, FORWARD_VALUE, UPDATE_COUNT, ResultMetric

# Values that may wait: a list of so many takes no time to go through.
_MOST_WAITING = 4096


def _looked_at(name: str) -> property:
    """An attribute whose value is brought up to date before it is read."""

    def read(self: DeferredMetric) -> Any:
        self.settle()
        if name not in vars(self):
            raise AttributeError(name)
        return vars(self)[name]

    def write(self: DeferredMetric, value: Any) -> None:
        self.settle()
        vars(self)[name] = value

    return property(read, write)


class DeferredMetric(ResultMetric):
    """Lightning's running value of one name, to which a step adds in one operation of Python's and none of torch's.

    The values of a step wait as numbers. Whoever reads the running value gets what Lightning has at every step, to the
    bit: the same sums in float32, in the same order. It has the state of Lightning's metric and no other when nothing
    waits: a metric becomes one by its ``__class__``.
    """

    value = _looked_at("value")
    cumulated_batch_size = _looked_at("cumulated_batch_size")

    @staticmethod
    def fits(metric: ResultMetric) -> bool:
        """Whether a metric is a mean, or the last value, of numbers in float32 on the CPU, of this process alone."""
        meta = metric.meta
        return (
            type(metric) in (ResultMetric, DeferredMetric)
            and metric.is_tensor
            and (meta.is_mean_reduction or not meta.on_epoch)
            and not meta.sync.should
            and metric.value.device.type == "cpu"
            and metric.value.dtype == torch.float32
        )

    def can_wait(self, value: Tensor, batch_size: Any) -> bool:
        """Whether what a step logs is of the kind that adds up to the same."""
        return type(batch_size) is int and value.dtype == vars(self)["value"].dtype == torch.float32

    def wait(self, value: float, batch_size: int) -> None:
        """Keeps the value of a step."""
        attributes = vars(self)
        # What torchmetrics does around an update.
        attributes[COMPUTED] = None
        attributes[UPDATE_COUNT] += 1
        attributes["has_reset"] = False
        waiting = attributes["_waiting"]
        waiting.append((value, batch_size))
        if len(waiting) >= _MOST_WAITING:
            self.settle()

    def last(self) -> float | Tensor | None:
        """Returns the value of the last step, as a number if it waits."""
        waiting = vars(self)["_waiting"]
        return waiting[-1][0] if waiting else vars(self)[FORWARD_VALUE]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Copies and pickles are Lightning's. As pickle's oldest protocol does: newer ones insist on the object's class.
        self.settle()
        state = {name: value for name, value in self.__getstate__().items() if name != "_waiting"}
        return copyreg._reconstructor, (ResultMetric, object, None), state

    def settle(self) -> None:
        """Brings the running value up to date."""
        attributes = vars(self)
        waiting = attributes["_waiting"]
        if not waiting:
            return
        attributes["_waiting"] = []
        values, sizes = np.array(waiting, dtype=np.float32).T
        if self.meta.on_step:
            attributes[FORWARD_VALUE] = _tensor(values[-1])
        if not self.meta.on_epoch:
            attributes["value"] = attributes[FORWARD_VALUE]
            return
        with np.errstate(all="ignore"):
            terms = np.concatenate(([np.float32(attributes["value"].item())], values * sizes))
            attributes["value"] = _tensor(np.add.accumulate(terms, dtype=np.float32)[-1])
        attributes["cumulated_batch_size"] = attributes["cumulated_batch_size"] + sum(size for _, size in waiting)


setattr(DeferredMetric, FORWARD_VALUE, _looked_at(FORWARD_VALUE))


def _tensor(value: np.float32) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def defer(metric: ResultMetric) -> None:
    """Makes a metric one that waits."""
    vars(metric)["_waiting"] = []
    metric.__class__ = DeferredMetric


def settle(metric: DeferredMetric) -> None:
    """Makes it Lightning's again."""
    metric.settle()
    del vars(metric)["_waiting"]
    metric.__class__ = ResultMetric
