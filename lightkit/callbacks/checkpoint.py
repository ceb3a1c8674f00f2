"""Checkpoints of which ``last.ckpt`` is the latest one, to go on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightkit._util.atomic_write import write_atomically
from lightkit.checkpoints import load_checkpoint
from lightkit.errors import CheckpointError


class Checkpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, with a ``last.ckpt`` each time that it looks at its monitor.

    Lightning 2.6 writes it only when it also wrote another checkpoint, the best so far: a job that goes on from
    there loses all that came after its best epoch.

    The checkpoint that a training goes on from becomes its ``last.ckpt``. In another directory it takes the best one so
    far along too, which Lightning would forget: each directory is then complete.

    Args:
        *arguments: of Lightning's callback.
        **options: likewise.
    """

    # Of the checkpoint that the training goes on from.
    _source: Path | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copies what the training goes on from."""
        super().on_fit_start(trainer, pl_module)
        source = Path(str(trainer.ckpt_path)) if trainer.ckpt_path is not None else None
        if self.save_last and trainer.is_global_zero and source is not None and source.is_file():
            target = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            if source.resolve() != target.resolve():
                _copy(source, target)
                self.last_model_path = str(target)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes where the checkpoint lies that the training goes on from, before its state is loaded."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._source = Path(str(trainer.ckpt_path)).parent if trainer.ckpt_path is not None else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the best checkpoints over, into the present directory if they lie in another one.

        Files that the state names count only if they lie there or beside the checkpoint that the state is from:
        Lightning reads and removes them, and the checkpoint may be somebody else's.
        """
        state_dict = self._with_near_files(state_dict)
        before = state_dict.get("dirpath")
        if before is not None and self.dirpath is not None and before != self.dirpath:
            state_dict = self._taken_along(state_dict)
        super().load_state_dict(state_dict)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after an epoch of training, where Lightning does it here."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves after a validation, where Lightning does it here."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def _save_last(self, trainer: pl.Trainer) -> None:
        # With every_n_train_steps it is 0, and those are the ones that count. To skip means: saved, or not to be.
        by_epochs = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if by_epochs and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _with_near_files(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns the state without files that lie elsewhere."""
        models = state.get("best_k_models")
        models = models if isinstance(models, dict) else {}
        paths = {key: state.get(key, "") for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        return {
            **state,
            **{key: path if self._is_near(path) else "" for key, path in paths.items()},
            "best_k_models": {path: score for path, score in models.items() if self._is_near(path)},
        }

    def _is_near(self, path: Any) -> bool:
        if not isinstance(path, str) or "://" in path or not path.endswith(self.FILE_EXTENSION):
            return False
        folders = [Path(folder).resolve() for folder in (self.dirpath, self._source) if folder is not None]
        return Path(path).resolve().parent in folders

    def _taken_along(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns the state with its best checkpoints in the present directory.

        As it was, which makes Lightning begin anew with them, if one is gone or is a later one of the same name: the
        run that wrote it may have come further than the checkpoint that is gone on from.
        """
        models = state.get("best_k_models") or {}
        here = {path: str(Path(self.dirpath) / Path(path).name) for path in models}
        if self.monitor is None or not all(self._is_of(path, score) for path, score in models.items()):
            return state
        for source, target in here.items():
            _copy(Path(source), Path(target))
        moved = {key: here.get(state.get(key), "") for key in ("best_model_path", "kth_best_model_path")}
        return {**state, **moved, "best_k_models": {here[path]: score for path, score in models.items()}} | {
            "dirpath": self.dirpath,
            "last_model_path": "",
        }

    def _is_of(self, path: str, score: torch.Tensor) -> bool:
        """Returns whether a checkpoint is there and is the one that had this score when it was written."""
        try:
            return bool(load_checkpoint(path)["callbacks"][self.state_key]["current_score"] == score)
        except (CheckpointError, KeyError):
            return False


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as stream:
        write_atomically(target, lambda copy: shutil.copyfileobj(stream, copy, 1 << 22))
