"""The hooks of a training step that somebody has an implementation of."""

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
from lightkit._lightning.module import CURRENT_HOOK

# A person sees no more than this many seconds between two states of a progress bar.
_REFRESH = 0.1


class Hooks:
    """One hook of all callbacks and of the module, called in Lightning's order; those that are empty are left out.

    Args:
        trainer: whose callbacks and module.
        name: of the hook.
    """

    def __init__(self, trainer: pl.Trainer, name: str) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self._attributes = vars(self._module)
        self._name = name
        self._callbacks = [(c, _due(c, name)) for c in trainer.callbacks if is_implemented(name, c, Callback)]
        self._is_own = is_implemented(name, self._module, pl.LightningModule)

    def __bool__(self) -> bool:
        return bool(self._callbacks) or self._is_own

    def __call__(self, *args: Any) -> None:
        """Calls the callbacks for which something is due, and the module."""
        attributes = self._attributes
        before = attributes[CURRENT_HOOK]
        # What is logged in a hook is logged under its name.
        attributes[CURRENT_HOOK] = self._name
        for callback, is_due in self._callbacks:
            if is_due is None or is_due(self._trainer, callback):
                getattr(callback, self._name)(self._trainer, self._module, *args)
        if self._is_own:
            getattr(self._module, self._name)(*args)
        attributes[CURRENT_HOOK] = before


def is_implemented(name: str, instance: Any, parent: type) -> bool:
    """Whether an object's method is another than that of a class it is derived from, be it wrapped or a mock."""
    return name in vars(instance) or getattr(type(instance), name) is not getattr(parent, name)


def _due(callback: Callback, hook: str) -> Callable[[pl.Trainer, Any], bool] | None:
    """When a callback of Lightning's has something to do in a hook, or None for one that is called in every step."""
    implementation = None if hook in vars(callback) else getattr(type(callback), hook)
    for cls, name, is_due in _DUE:
        # By function: a subclass with one of its own may do anything.
        if name == hook and implementation is getattr(cls, name):
            return is_due
    return None


def _bar_is_due(trainer: pl.Trainer, callback: TQDMProgressBar | RichProgressBar) -> bool:
    rate = callback.refresh_rate
    if rate <= 0 or trainer.fit_loop.epoch_loop.batch_progress.current.ready % rate != 0:
        return False
    now = time.monotonic()
    if now - getattr(callback, "_lightkit_refreshed", 0.0) < _REFRESH:
        return False
    callback._lightkit_refreshed = now
    return True


_DUE: tuple[tuple[type[Callback], str, Callable[[pl.Trainer, Any], bool]], ...] = (
    (ModelCheckpoint, "on_train_batch_end", checkpoint_is_due),
    (TQDMProgressBar, "on_train_batch_end", _bar_is_due),
    (RichProgressBar, "on_train_batch_end", _bar_is_due),
    (Timer, "on_train_batch_end", timer_is_due),
    (LearningRateMonitor, "on_train_batch_start", logging_is_due),
)
