"""The state of a checkpoint callback: the best checkpoints that exist, after a resumption that may be elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightkit._util.atomic_write import write_atomically
from lightkit.checkpoints import load_checkpoint
from lightkit.errors import CheckpointError

_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


class KeptCheckpoints:
    """The checkpoints that a callback keeps after a resumption.

    Args:
        callback: the callback, whose state is restored.
        directory: the directory of the callback.
        source: the directory of the checkpoint from which the training resumes; None if there is none.
        fixed: the path of the best checkpoint if ``filename`` of the callback has no fields; else None.
    """

    def __init__(self, callback: ModelCheckpoint, directory: Path, source: Path | None, fixed: Path | None) -> None:
        self._callback = callback
        self._directory = directory
        self._folders = [folder.resolve() for folder in (directory, source) if folder is not None]
        self._fixed = fixed

    def without_foreign_files(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns the state without files that are neither in the callback's directory nor in the checkpoint's."""
        models = state.get("best_k_models")
        models = models if isinstance(models, dict) else {}
        return {
            **state,
            **{key: path if self._may_touch(path := state.get(key, "")) else "" for key in _PATHS},
            "best_k_models": {k: score for k, score in models.items() if self._may_touch(k) and _is_score(score)},
        }

    def find(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns the checkpoints of the state that exist, after copies from the directory of the earlier run.

        The method makes the fixed path the best of them. One process calls it, and the others get the result.

        Args:
            state: the state without foreign files.

        Returns:
            JSON values: ``models`` is a list of the old and the new path of each best checkpoint, the best first;
            ``best_model_path`` and ``last_model_path`` are paths, or "".
        """
        is_moved = state.get("dirpath") not in (None, str(self._directory))
        last = "" if is_moved or not Path(state["last_model_path"]).is_file() else state["last_model_path"]
        if self._callback.monitor is None:
            best = state["best_model_path"]
            return {
                "models": [],
                "best_model_path": best if Path(best).is_file() else "",
                "last_model_path": last,
            }
        best_first = sorted(state["best_k_models"].items(), key=lambda item: self._rank(item[1]))
        models: list[list[str]] = []
        for path, score in best_first:
            is_wanted = self._callback.save_top_k < 0 or len(models) < self._callback.save_top_k
            if is_wanted and (moved := self._moved(Path(path), score)) is not None:
                models.append([path, str(moved)])
        if models and self._fixed is not None:
            link(Path(models[0][1]), self._fixed)
        return {"models": models, "best_model_path": models[0][1] if models else "", "last_model_path": last}

    def apply(self, state: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Returns the state with the checkpoints that `find` has found.

        Args:
            state: the state without foreign files.
            found: the result of `find`.
        """
        state = {**state, "dirpath": self._callback.dirpath, "last_model_path": found["last_model_path"]}
        state["best_model_path"] = found["best_model_path"]
        if self._callback.monitor is None:
            return state
        models = {new: state["best_k_models"][old] for old, new in found["models"]}
        scores = list(models.values())
        return {
            **state,
            "best_k_models": models,
            "best_model_score": scores[0] if scores else None,
            "kth_best_model_path": list(models)[-1] if models else "",
            "kth_value": scores[-1] if scores else torch.tensor(self._worst()),
        }

    def _may_touch(self, path: object) -> bool:
        if not isinstance(path, str) or "://" in path or not path.endswith(self._callback.FILE_EXTENSION):
            return False
        return any(Path(path).resolve().is_relative_to(folder) for folder in self._folders)

    def _moved(self, path: Path, score: torch.Tensor) -> Path | None:
        """Returns the path of a checkpoint after a copy to the callback's directory.

        Returns:
            The path; None if the file is missing or damaged, or has another score, since it was overwritten.
        """
        try:
            content = load_checkpoint(path)
            if not bool(content["callbacks"][self._callback.state_key]["current_score"] == score):
                return None
            target = self._target(path, content)
        except (CheckpointError, KeyError, TypeError, ValueError, RuntimeError):
            # The state and the file may be a stranger's.
            return None
        if target.resolve() != path.resolve():
            copy(path, target)
        return target

    def _target(self, path: Path, content: dict[str, Any]) -> Path:
        """Returns the path in the callback's directory of a checkpoint that may be in another one."""
        if self._fixed is not None and self._callback.save_top_k != 1 and path.name == self._fixed.name:
            # An earlier training kept one checkpoint, under the name that is now that of the best of several.
            steps = {"epoch": torch.tensor(content["epoch"]), "step": torch.tensor(content["global_step"])}
            return Path(self._callback.format_checkpoint_name(steps))
        below = next(folder for folder in self._folders if path.resolve().is_relative_to(folder))
        return self._directory / path.resolve().relative_to(below)

    def _rank(self, score: torch.Tensor) -> float:
        return float(score) if self._callback.mode == "min" else -float(score)

    def _worst(self) -> float:
        return float("inf") if self._callback.mode == "min" else -float("inf")


def _is_score(score: object) -> bool:
    return isinstance(score, (int, float)) or (isinstance(score, torch.Tensor) and score.numel() == 1)


def link(source: Path, target: Path) -> None:
    """Makes ``target`` another name of the checkpoint ``source``; replaces ``target``.

    The disk holds the content once, if the file system has hard links. A sharded checkpoint is a directory and gets a
    symbolic link.

    Raises:
        OSError: the directory of ``target`` cannot be written.
    """
    if source == target:
        return
    temporary = target.with_name(f".{target.name}.linking0")
    temporary.unlink(missing_ok=True)
    try:
        if source.is_dir():
            os.symlink(os.path.relpath(source, target.parent), temporary)
        else:
            os.link(source, temporary)
    except OSError:
        # Some network file systems have no links.
        copy(source, target)
        return
    os.replace(temporary, target)
    # If both were names of one file already, POSIX leaves them as they are.
    temporary.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copies a checkpoint atomically, with its time: the search for the latest checkpoint compares times.

    Raises:
        OSError: the file cannot be read, or the copy cannot be written.
    """
    with open(source, "rb") as stream:
        write_atomically(target, lambda out: shutil.copyfileobj(stream, out, 1 << 22))
    status = source.stat()
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
