"""Calls of the hooks of a training step, only where a callback or the module overrides a hook."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)

from lightkit._lightning.callbacks import checkpoint_is_due, logging_is_due, timer_is_due
from lightkit._lightning.loops import connected
from lightkit._lightning.module import CURRENT_HOOK

# Seconds between two updates of a progress bar: ten a second look continuous.
_REFRESH_INTERVAL = 0.1


class Hooks:
    """Calls one hook of the callbacks, then of the module, in Lightning's order; calls only those that override it.

    The object is False as a bool if neither a callback nor the module overrides the hook.

    Args:
        trainer: a trainer in a fit.
        name: the name of the hook, such as ``on_train_batch_end``.
    """

    def __init__(self, trainer: pl.Trainer, name: str) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._attributes = vars(self._module)
        self._name = name
        self._callbacks = [
            (c, _condition(c, name)) for c in connected(trainer).callbacks if is_overridden(name, c, Callback)
        ]
        self._module_overrides = is_overridden(name, self._module, pl.LightningModule)

    def __bool__(self) -> bool:
        return bool(self._callbacks) or self._module_overrides

    def __call__(self, *args: Any) -> None:
        """Calls the hook of the callbacks and of the module with ``args``.

        A callback of Lightning's is left out in steps in which it would do nothing: see `_CONDITIONS`.
        """
        attributes = self._attributes
        before = attributes[CURRENT_HOOK]
        # The module logs under the name of the hook.
        attributes[CURRENT_HOOK] = self._name
        for callback, is_due in self._callbacks:
            if is_due is None or is_due(self._trainer, callback):
                getattr(callback, self._name)(self._trainer, self._module, *args)
        if self._module_overrides:
            getattr(self._module, self._name)(*args)
        attributes[CURRENT_HOOK] = before


def is_overridden(name: str, instance: object, parent: type) -> bool:
    """Returns True if the method `name` of `instance` is not that of `parent`; a wrapper or a mock is not."""
    return name in vars(instance) or getattr(type(instance), name) is not getattr(parent, name)


def _condition(callback: Callback, hook: str) -> Callable[[pl.Trainer, Any], bool] | None:
    """Returns a function that returns True in the steps in which `callback` does something in `hook`.

    None means that the callback must be called in every step.
    """
    implementation = None if hook in vars(callback) else getattr(type(callback), hook)
    for cls, name, is_due in _CONDITIONS:
        # A subclass with an implementation of its own is called in every step.
        if name == hook and implementation is getattr(cls, name):
            return is_due
    return None


def _bar_is_due(trainer: pl.Trainer, callback: TQDMProgressBar | RichProgressBar) -> bool:
    rate = callback.refresh_rate
    if rate <= 0 or trainer.fit_loop.epoch_loop.batch_progress.current.ready % rate != 0:
        return False
    now = time.monotonic()
    if now - vars(callback).get("_lightkit_refreshed", 0.0) < _REFRESH_INTERVAL:
        return False
    vars(callback)["_lightkit_refreshed"] = now
    return True


_CONDITIONS: tuple[tuple[type[Callback], str, Callable[[pl.Trainer, Any], bool]], ...] = (
    (ModelCheckpoint, "on_train_batch_end", checkpoint_is_due),
    (TQDMProgressBar, "on_train_batch_end", _bar_is_due),
    (RichProgressBar, "on_train_batch_end", _bar_is_due),
    (Timer, "on_train_batch_end", timer_is_due),
    (LearningRateMonitor, "on_train_batch_start", logging_is_due),
)
