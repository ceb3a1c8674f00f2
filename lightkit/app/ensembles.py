"""Several checkpoints as one model: the members that ``ckpt_path`` names, and their ensemble."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightkit._util.printable import printable
from lightkit.app import run_records
from lightkit.app.fold_results import FOLDS
from lightkit.app.restore import RestoredTask, restore
from lightkit.app.table_ensembles import encoding_of, share_inputs
from lightkit.errors import CheckpointError, ConfigError
from lightkit.tasks import ensemble

# The directories of the folds of a run, and those of the jobs of a sweep.
_MEMBER_DIRECTORY = re.compile(r"(?:fold_)?(\d+)")

_CHECKPOINTS = ("checkpoints/best.ckpt", "checkpoints/last.ckpt")

# Arguments of data modules that may differ between members: they change neither the classes nor the test set.
_FREE_ARGUMENTS = ("batch_size", "eval_batch_size", "seed", "validation_size", "validation_share", "download")
LOCATION_ARGUMENTS = ("data_dir", "path")

# Arguments that decide on the test set alone, which a prediction does not read.
_TEST_ARGUMENTS = ("test_share", "test_size", "test_path", "split_seed")

# The file of `lightkit.fit` in its directory; the checkpoints there have no configuration.
_FIT = "model.ckpt"


def find_members(ckpt_path: str) -> list[Path]:
    """Returns the checkpoints that a value of ``ckpt_path`` names.

    Args:
        ckpt_path: a file, a directory, or a list ``[a.ckpt,b.ckpt]`` of these, whose brackets may be left out. The
            directory of a run or of `lightkit.fit` stands for its best checkpoint; the directory of a run with
            ``kfold``, or of a sweep, stands for one checkpoint of each fold or job. A path that exists is never read
            as a list.

    Raises:
        CheckpointError: a directory has no checkpoint, or its run is unfinished.
        ConfigError: the list is empty.
    """
    text = ckpt_path.strip()
    if Path(ckpt_path).exists():
        return members_of(Path(ckpt_path))
    is_list = text.startswith("[") and text.endswith("]")
    parts = _split(text[1:-1] if is_list else text)
    if is_list and not parts:
        raise ConfigError(f"ckpt_path={ckpt_path} is an empty list")
    if is_list or (len(parts) > 1 and all(path.exists() for path in parts)):
        return [member for path in parts for member in members_of(path)]
    return [Path(ckpt_path)]


def restore_members(
    paths: Sequence[Path],
    for_evaluation: bool = False,
    free: Collection[str] = (*LOCATION_ARGUMENTS, *_TEST_ARGUMENTS),
    trust: bool = False,
) -> list[RestoredTask]:
    """Returns the tasks of checkpoints, each restored as an untrusted file, after a check that they go together.

    Args:
        paths: the checkpoints.
        for_evaluation: build the loss and the metrics too, which a prediction does not need.
        free: arguments of the data module that may differ; by default those that a prediction does not read.
        trust: as for `lightkit.app.restore.restore`.

    Raises:
        CheckpointError: a checkpoint cannot be used, or two differ in the task or in the data; the message has both
            paths and the first difference.
    """
    members = [restore(path, for_evaluation=for_evaluation, trust=trust) for path in paths]
    for path, member in zip(paths[1:], members[1:], strict=True):
        for name, ours, theirs in _differences(members[0], member, {*_FREE_ARGUMENTS, *free}):
            raise CheckpointError(
                f"{paths[0]} and {path} make no ensemble: {name} is {_show(ours)} in the first and {_show(theirs)} in "
                "the second"
            )
    return share_inputs(members)


def combine(members: Sequence[RestoredTask]) -> RestoredTask:
    """Returns the ensemble of restored tasks with the configuration of the first; of a single one the task itself.

    Raises:
        ConfigError: the tasks have no ensemble: see `lightkit.tasks.ensemble`.
    """
    if len(members) == 1:
        return members[0]
    return replace(members[0], task=ensemble([member.task for member in members]))  # pyright: ignore


def members_of(path: Path) -> list[Path]:
    """Returns a file, or the checkpoints of the run, of its folds or of the jobs of a sweep in a directory.

    Args:
        path: the file, which need not exist, or the directory.

    Raises:
        CheckpointError: the directory has no checkpoint, or its run is unfinished.
    """
    if not path.is_dir():
        return [path]
    if own := next((path / name for name in (_FIT, *_CHECKPOINTS) if (path / name).is_file()), None):
        return [own]
    numbered = [
        (int(match[1]), place) for place in path.iterdir() if (match := _MEMBER_DIRECTORY.fullmatch(place.name))
    ]
    if not numbered:
        raise CheckpointError(
            f"{path} is a directory without {' or '.join(_CHECKPOINTS)}, and without folds or jobs that have them"
        )
    if not _is_finished(path):
        raise CheckpointError(
            f"{path} is unfinished: ckpt_path=last goes on with its training, and [a.ckpt,b.ckpt] lists checkpoints"
        )
    return [member for _, place in sorted(numbered) for member in members_of(place)]


def _split(text: str) -> list[Path]:
    """Returns the paths between the commas of ``text``; a comma within the name of an existing file does not count."""
    pieces = text.split(",")
    found, begin = [], 0
    while begin < len(pieces):
        ends = range(len(pieces), begin, -1)
        path, end = next(
            ((path, end) for end in ends if (path := _to_path(",".join(pieces[begin:end]))) and path.exists()),
            (_to_path(pieces[begin]), begin + 1),
        )
        found += [] if path is None else [path]
        begin = end
    return found


def _to_path(text: str) -> Path | None:
    """Returns the path of an element of a list, without blanks and quotes around it; None for an empty one."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return Path(text).expanduser() if text else None


def _is_finished(directory: Path) -> bool:
    """Returns True if all folds of a run or all jobs of a sweep are finished, or if no record says otherwise."""
    if (directory / FOLDS).is_file():
        return True
    try:
        return bool(json.loads((directory / "sweep.json").read_text())["is_finished"])
    except (OSError, ValueError, LookupError, TypeError):
        record = run_records.read(directory)
        return record is None or record.is_finished


def _differences(one: RestoredTask, other: RestoredTask, free: set[str]) -> list[tuple[str, Any, Any]]:
    """Returns the differences for which two tasks make no ensemble: a name and the two values of each."""
    ours, theirs = one.config.get("data"), other.config.get("data")
    ours, theirs = ours if isinstance(ours, dict) else {}, theirs if isinstance(theirs, dict) else {}
    found: list[tuple[str, Any, Any]] = [("the task", type(one.task).__name__, type(other.task).__name__)]
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if key not in free]
    found += [(f"data.{key}", ours.get(key), theirs.get(key)) for key in keys]
    mine, others = encoding_of(one), encoding_of(other)
    if mine is not None and others is not None:
        found.append(("the list of classes", mine.classes, others.classes))
    else:
        state = str(ours.get("_target_")).rpartition(".")[2]
        found.append(("the size of the images", one.checkpoint.get(state), other.checkpoint.get(state)))
    found += [(f"the {name} of the model", *sizes) for name, sizes in _outputs(one, other).items()]
    return [(name, first, second) for name, first, second in found if first != second]


def _outputs(one: RestoredTask, other: RestoredTask) -> dict[str, tuple[Any, Any]]:
    """Returns the numbers of classes or outputs of two models, by the name of the key that both have."""
    models = [config if isinstance(config := member.config.get("model"), dict) else {} for member in (one, other)]
    names = [name for name in ("num_classes", "num_outputs") if all(name in model for model in models)]
    return {name: (models[0][name], models[1][name]) for name in names}


def _show(value: Any) -> str:
    return printable(str(value)[:100])
