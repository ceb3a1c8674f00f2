"""A callback that saves the widths of a pruned model in checkpoints, and loads checkpoints of other widths."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightkit.compress.widths import WIDTHS_KEY, changed_shapes, dense_shapes, take_widths


class SaveWidths(Callback):
    """Saves the shapes of smaller tensors in every checkpoint, and gives the module the widths of a loaded one.

    `lightkit.compress.Prune` does the same. A training or a test that goes on from a pruned checkpoint without it needs
    this callback.
    """

    def __init__(self) -> None:
        self._hooks = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Records the shapes of the dense module, unless they are known, and lets it load other widths."""
        self._hooks.close()
        dense_shapes(pl_module)
        self._hooks.callback(pl_module.register_load_state_dict_pre_hook(_take_widths).remove)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends what `setup` has begun."""
        self._hooks.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ends what `setup` has begun after an error or Ctrl-C."""
        self._hooks.close()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the shapes of the tensors that are smaller than those of the dense model."""
        changed = changed_shapes(pl_module, dense_shapes(pl_module))
        if changed:
            checkpoint[WIDTHS_KEY] = changed

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no hooks to remove.
        return {**vars(self), "_hooks": ExitStack()}


def _take_widths(module: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
    take_widths(module, state_dict, prefix)
