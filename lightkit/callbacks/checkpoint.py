"""A checkpoint callback that keeps ``last.ckpt`` up to date."""

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
    """Lightning's ``ModelCheckpoint``, except that it writes ``last.ckpt`` each time that it checks its monitor.

    Lightning 2.6 writes ``last.ckpt`` only when it also writes another checkpoint, the best so far. A job that resumes
    from ``last.ckpt`` then loses all epochs after the best one.

    A training that resumes from a checkpoint copies this checkpoint to its own ``last.ckpt``. If the training runs in
    another directory than before, it also copies the best checkpoints so far, which Lightning would forget.

    Args:
        *arguments: the positional arguments of ``ModelCheckpoint``.
        **options: the keyword arguments of ``ModelCheckpoint``.
    """

    # The directory of the checkpoint that the training resumes from.
    _source: Path | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copies the checkpoint from which the training resumes, if there is one, to ``last.ckpt``.

        Only process 0 copies, and only with ``save_last``.
        """
        super().on_fit_start(trainer, pl_module)
        source = Path(str(trainer.ckpt_path)) if trainer.ckpt_path is not None else None
        if self.save_last and trainer.is_global_zero and source is not None and source.is_file():
            assert self.dirpath is not None
            target = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            if source.resolve() != target.resolve():
                _copy(source, target)
                self.last_model_path = str(target)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Records the directory of the checkpoint from which the training resumes; `load_state_dict` reads it."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._source = Path(str(trainer.ckpt_path)).parent if trainer.ckpt_path is not None else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state, and copies the best checkpoints to ``dirpath`` if they are in another directory.

        Lightning reads and removes the files that the state names, and the state may come from an untrusted checkpoint.
        This method therefore drops the files that are neither in ``dirpath`` nor in the directory of the checkpoint.
        """
        state_dict = self._without_foreign_files(state_dict)
        before = state_dict.get("dirpath")
        if before is not None and self.dirpath is not None and before != self.dirpath:
            state_dict = self._with_copies(state_dict)
        super().load_state_dict(state_dict)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the best checkpoints and ``last.ckpt``, if Lightning saves at the end of the training epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the best checkpoints and ``last.ckpt``, if Lightning saves at the end of a validation."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def _save_last(self, trainer: pl.Trainer) -> None:
        # The interval in epochs is 0 with every_n_train_steps, where Lightning's own last.ckpt is up to date. Lightning
        # skips a step that it has saved already, and stages that it never saves.
        by_epochs = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if by_epochs and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _without_foreign_files(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns the state without files that are neither in ``dirpath`` nor in the directory of the checkpoint."""
        models = state.get("best_k_models")
        models = models if isinstance(models, dict) else {}
        paths = {key: state.get(key, "") for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        return {
            **state,
            **{key: path if self._may_touch(path) else "" for key, path in paths.items()},
            "best_k_models": {path: score for path, score in models.items() if self._may_touch(path)},
        }

    def _may_touch(self, path: object) -> bool:
        if not isinstance(path, str) or "://" in path or not path.endswith(self.FILE_EXTENSION):
            return False
        folders = [Path(folder).resolve() for folder in (self.dirpath, self._source) if folder is not None]
        return Path(path).resolve().parent in folders

    def _with_copies(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copies the best checkpoints to ``dirpath`` and returns a state that names the copies.

        The method copies nothing and returns ``state``, so that Lightning starts a new list, if a file is missing or
        was overwritten: the run that wrote the file may have continued after the checkpoint from which this training
        resumes.
        """
        models = state.get("best_k_models") or {}
        assert self.dirpath is not None
        here = {path: str(Path(self.dirpath) / Path(path).name) for path in models}
        if self.monitor is None or not all(self._has_score(path, score) for path, score in models.items()):
            return state
        for source, target in here.items():
            _copy(Path(source), Path(target))
        moved = {key: here.get(state.get(key), "") for key in ("best_model_path", "kth_best_model_path")}
        return {**state, **moved, "best_k_models": {here[path]: score for path, score in models.items()}} | {
            "dirpath": self.dirpath,
            "last_model_path": "",
        }

    def _has_score(self, path: str, score: torch.Tensor) -> bool:
        """Returns True if the checkpoint ``path`` exists, can be read, and contains ``score`` as its score."""
        try:
            return bool(load_checkpoint(path)["callbacks"][self.state_key]["current_score"] == score)
        except (CheckpointError, KeyError):
            return False


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as stream:
        write_atomically(target, lambda copy: shutil.copyfileobj(stream, copy, 1 << 22))
