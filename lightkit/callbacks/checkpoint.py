"""A checkpoint callback that keeps ``last.ckpt`` up to date, and one file for the best checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightkit._util.printable import printable
from lightkit.callbacks.kept_checkpoints import KeptCheckpoints, copy, link
from lightkit.checkpoints.random_states import RANDOM_STATES_KEY, random_states, restore_random_states
from lightkit.errors import ConfigError
from lightkit.targets import nearest

# The metric that the tasks of lightkit log, and other modules need not.
_USUAL_MONITOR = "val/loss"

# Words of metrics' names that mean the same.
_SYNONYMS = {"valid": "val", "validation": "val"}


class Checkpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` with an up-to-date ``last.ckpt``, and a fixed ``filename`` that is the best one.

    Lightning 2.6 writes ``last.ckpt`` only when it also writes another checkpoint, the best so far. A job that resumes
    from ``last.ckpt`` then loses all epochs after the best one. This callback writes ``last.ckpt`` each time that it
    checks its monitor.

    A ``filename`` without fields, such as ``best``, is always the checkpoint with the best score. If ``save_top_k``
    keeps several checkpoints, each has a name of its own, such as ``best-epoch=2-step=300.ckpt``, and ``best.ckpt`` is
    another name of the best of them. Two checkpoints that are kept never have the same name, also without
    ``enable_version_counter``.

    A training that resumes from a checkpoint copies this checkpoint to its own ``last.ckpt``. It keeps the best
    checkpoints so far, which it copies if it runs in another directory than before; Lightning would forget them. Its
    random draws, such as those of dropout, continue where process 0 saved the checkpoint; Lightning's begin anew.

    If the module logs the monitor under a name of another form, such as ``val_loss`` for ``val/loss``, that metric is
    taken. If it logs no validation loss at all, the monitor ``val/loss`` is dropped, and the best checkpoint is the
    latest one. A warning says so.

    Args:
        *arguments: the positional arguments of ``ModelCheckpoint``.
        **options: the keyword arguments of ``ModelCheckpoint``.

    Raises:
        ConfigError: the module has not logged the metric ``monitor``, which is not ``val/loss``; ``last.ckpt`` is
            written before.
    """

    # The trainer that restores this callback from a checkpoint, until the state is loaded.
    _restoring: pl.Trainer | None = None
    # The states of the random generators in that checkpoint, until the training starts.
    _random_states: Any = None
    # The fixed name that this callback gives to the best of several checkpoints, once it has one.
    _best_name: Path | None = None
    # The monitor of the constructor, once another metric has taken its place.
    _configured_monitor: str | None = None

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
                copy(source, target)
                self.last_model_path = str(target)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the states of torch's random generators to a checkpoint."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint[RANDOM_STATES_KEY] = random_states(trainer.strategy.root_device)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Records the trainer, whose checkpoint and processes `load_state_dict` needs, and the random states."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._restoring = trainer
        self._random_states = checkpoint.get(RANDOM_STATES_KEY)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the random states of the checkpoint from which the training resumes."""
        super().on_train_start(trainer, pl_module)
        states, self._random_states = self._random_states, None
        if states is not None:
            restore_random_states(states, trainer.strategy.root_device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state without the checkpoints that are gone, and copies the others to ``dirpath``.

        Lightning reads and removes the files that the state names, and the state may come from an untrusted checkpoint.
        This method therefore drops the files that are neither in ``dirpath`` nor in the directory of the checkpoint. It
        also drops the files that are missing or were overwritten since: the run that wrote them may have continued
        after the checkpoint from which this training resumes.
        """
        trainer, self._restoring = self._restoring, None
        assert self.dirpath is not None
        source = None if trainer is None or trainer.ckpt_path is None else Path(str(trainer.ckpt_path)).parent
        kept = KeptCheckpoints(self, Path(self.dirpath), source, self._fixed_path())
        state = kept.without_foreign_files(state_dict)
        if "://" not in str(self.dirpath):
            # The processes must agree on the list, and their file systems need not.
            found = kept.find(state) if trainer is None or trainer.is_global_zero else {}
            state = kept.apply(state, found if trainer is None else trainer.strategy.broadcast(found))
            self._best_name = self._fixed_path() if state["best_k_models"] else None
        super().load_state_dict(state)

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

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Saves a checkpoint with ``save_on_exception``; a fixed ``filename`` gets ``-exception``, as it is no best."""
        path = self._fixed_path()
        if path is None:
            super().on_exception(trainer, pl_module, exception)
        elif self._should_save_on_exception(trainer):
            self._save_checkpoint(trainer, str(path.with_name(f"{self.filename}-exception{self.FILE_EXTENSION}")))
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def format_checkpoint_name(
        self, metrics: dict[str, Tensor], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """Returns the path of a checkpoint, as Lightning does; one of several under a fixed name gets epoch and step.

        Args:
            metrics: the values of the fields in the name.
            filename: the name with its fields; None takes the callback's ``filename``.
            ver: a number at the end of the name; None for none.
            prefix: a text at the start of the name; None for none.
        """
        if filename is None and self.save_top_k not in (0, 1) and self._is_fixed():
            fields = "{epoch}-{step}" if self.auto_insert_metric_name else "epoch={epoch}-step={step}"
            filename = f"{self.filename}-{fields}"
        return super().format_checkpoint_name(metrics, filename, ver, prefix)

    def _fixed_path(self) -> Path | None:
        """Returns the path of the best checkpoint; None if ``filename`` has fields, or the directory is remote."""
        if not self._is_fixed() or self.dirpath is None or "://" in str(self.dirpath):
            return None
        return Path(self.dirpath) / f"{self.filename}{self.FILE_EXTENSION}"

    def _is_fixed(self) -> bool:
        return bool(self.filename) and "{" not in self.filename

    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: dict[str, Tensor], trainer: pl.Trainer, del_filepath: str | None = None
    ) -> str:
        if self.monitor is None and self.save_top_k == -1:
            # Lightning names the previous checkpoint as one to replace, and this callback keeps it.
            del_filepath = None
        path = super()._get_metric_interpolated_filepath_name(monitor_candidates, trainer, del_filepath)
        # Without its version counter Lightning would overwrite a checkpoint that it still lists.
        version = self.STARTING_VERSION
        while self._is_kept(path, trainer) and path != del_filepath:
            path = self.format_checkpoint_name(monitor_candidates, ver=version)
            version += 1
        return path

    def _is_kept(self, path: str, trainer: pl.Trainer) -> bool:
        """Returns True if ``path`` is a checkpoint that stays; without a monitor Lightning has no list of them."""
        keeps_all = self.monitor is None and self.save_top_k == -1
        return self.file_exists(path, trainer) if keeps_all else path in self.best_k_models

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint, which has the configured monitor."""
        used, self.monitor = self.monitor, self._configured_monitor or self.monitor
        try:
            return super().state_key
        finally:
            self.monitor = used

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        names = sorted(name for name in monitor_candidates if name not in ("epoch", "step"))
        if self.monitor is not None and self.monitor not in names:
            if (same := _same_metric(self.monitor, names)) is not None:
                self._replace_monitor(same, names)
            elif self._may_do_without() and not trainer.enable_validation:
                self._replace_monitor(None, names)
        try:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        except MisconfigurationException as error:
            if self._may_do_without():
                self._replace_monitor(None, names)
                super()._save_topk_checkpoint(trainer, monitor_candidates)
                return
            # The training so far is not lost for a misspelt name.
            self._save_last_checkpoint(trainer, monitor_candidates)
            raise ConfigError(
                f"monitor={self.monitor} of the checkpoints: the training logs {', '.join(names) or 'no metric'}"
                f"{nearest(str(self.monitor), names)}"
            ) from error

    def finds_score(self, names: list[str]) -> bool:
        """Returns True if the metrics ``names`` have the monitor in some form, or the callback does without it."""
        monitor = self.monitor
        return monitor is None or _same_metric(monitor, names) is not None or self._may_do_without()

    def _may_do_without(self) -> bool:
        """Returns True if the monitor is the usual one and not a choice, and one checkpoint is kept, or all are."""
        return self.monitor == _USUAL_MONITOR and self.save_top_k in (1, -1)

    def _replace_monitor(self, name: str | None, names: list[str]) -> None:
        """Compares checkpoints by the metric ``name`` from now on; None takes the latest one for the best."""
        self._configured_monitor = self._configured_monitor or self.monitor
        logged = printable(", ".join(names)) or "no metric"
        instead = f"the best checkpoint is the latest one; callbacks.checkpoint.monitor=NAME takes one of {logged}"
        if name is not None:
            instead = f"{printable(name)} is taken for it"
        rank_zero_warn(f"monitor={self.monitor} of the checkpoints is not logged: {instead}")
        self.monitor = name

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if self.save_top_k != 1 and filepath == self.best_model_path and trainer.is_global_zero:
            self._name_best(Path(filepath))

    def _name_best(self, checkpoint: Path) -> None:
        """Gives the best of several checkpoints the fixed name, or with the version counter the first free one."""
        path = self._best_name or self._fixed_path()
        if path is None:
            return
        version = self.STARTING_VERSION
        while self._best_name is None and self._enable_version_counter and path.exists():
            path = path.with_name(f"{self.filename}-v{version}{self.FILE_EXTENSION}")
            version += 1
        self._best_name = path
        link(checkpoint, path)

    def _should_save_on_train_epoch_end(self, trainer: pl.Trainer) -> bool:
        # A checkpoint that is due after the last step of an epoch waits for the validation that follows: the score that
        # the trainer still has is that of the epoch before.
        follows = self._save_on_train_epoch_end is None and self._every_n_epochs < 1 and trainer.enable_validation
        return not follows and super()._should_save_on_train_epoch_end(trainer)

    def _save_last(self, trainer: pl.Trainer) -> None:
        # The interval in epochs is 0 with every_n_train_steps, where Lightning's own last.ckpt is up to date. Lightning
        # skips a step that it has saved already, and stages that it never saves.
        by_epochs = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if by_epochs and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def _same_metric(monitor: str, names: list[str]) -> str | None:
    """Returns the first of the ``names`` that has the words of ``monitor`` in another form or order, or None."""
    return next((name for name in names if _words(name) == _words(monitor)), None)


def _words(name: str) -> list[str]:
    words = re.split(r"[^a-z0-9]+", name.lower())
    return sorted(_SYNONYMS.get(word, word) for word in words if word)
