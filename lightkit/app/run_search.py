"""The search for a run that another one may resume: the run that ``ckpt_path=last`` means, and an unfinished one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightkit._util import strict_json
from lightkit.app.run_records import RECORD_FILE, Run, display_path, read, run_directories
from lightkit.config import SIZE_KEYS
from lightkit.errors import CheckpointError

# A run may resume another one if these keys, the fold and the choice of the group `debug` are the same in both.
IDENTITY_KEYS = ("data", "model", "task", "seed", "init_from")
_DEBUG_GROUP = "debug"
_FOLD_KEYS = ("kfold", "fold")

# The keys that follow the data where they are null.
_FOLLOWING = frozenset(f"model.{key}" for key in SIZE_KEYS)

# The number of differences that an error message lists.
_MAX_DIFFERENCES = 8


def has_runs(name: str) -> bool:
    """Returns True if a run lies below ``runs/<name>``."""
    return any(run_directories(Path("runs") / name))


def find_candidates(run: Run, name: str, recorded: bool = False) -> list[Run]:
    """Returns the runs from which ``run`` might resume, the newest first.

    The candidates lie below ``runs/<name>`` or in the directory of ``run``. Jobs of the same sweep are no candidates.

    Args:
        run: the run that begins now.
        name: the name of the job.
        recorded: leave out runs of the first edition, whose files take long to read.
    """
    roots = (Path("runs") / name, run.directory)
    directories = {folder.resolve() for root in roots for folder in run_directories(root)}
    if not (run.directory / RECORD_FILE).exists():
        # Hydra has just written its files for the new run, which look like a run of the first edition.
        directories.discard(run.directory.resolve())
    if recorded:
        directories = {directory for directory in directories if (directory / RECORD_FILE).exists()}
    records = [other for directory in directories if (other := read(directory)) is not None]
    candidates = [other for other in records if run.job is None or other.job != run.job]
    return sorted(candidates, key=lambda other: other.started, reverse=True)


def find_last(run: Run, name: str, swept: Sequence[str] = ()) -> Path:
    """Returns the checkpoint that ``ckpt_path=last`` means: that of the newest run without `config_differences`.

    Args:
        run: the run that begins now.
        name: the name of the job.
        swept: the keys and groups that differ between the jobs of the run's sweep, which must be the same too.

    Raises:
        CheckpointError: no run has such a checkpoint; the message has the nearest run and the differences.
    """
    root = Path("runs") / name
    candidates = find_candidates(run, name)
    same = [other for other in candidates if not config_differences(run, other, swept)]
    for other in same:
        if (path := other.latest_intact_checkpoint()) is not None:
            return path
    *most, last = *IDENTITY_KEYS, *swept
    keys = f"{', '.join(most)} and {last}"
    if same:
        raise CheckpointError(
            f"ckpt_path=last: {display_path(same[0].directory)} has the same {keys}, but no checkpoint to go on from: "
            "leave ckpt_path out to begin anew"
        )
    if not candidates:
        raise CheckpointError(f"ckpt_path=last: there is no last.ckpt below {root.absolute()}, nor another checkpoint")
    with_checkpoints = [other for other in candidates if other.checkpoints()]
    nearest = min(with_checkpoints or candidates, key=lambda other: len(config_differences(run, other, swept)))
    differences = config_differences(run, nearest, swept)
    differing = [f"{key}={theirs} there and {mine} here" for key, mine, theirs in differences]
    more = f"; and {len(differing) - _MAX_DIFFERENCES} more" if len(differing) > _MAX_DIFFERENCES else ""
    raise CheckpointError(
        f"ckpt_path=last: no run below {root.absolute()} has the same {keys}; the nearest is "
        f"{display_path(nearest.directory)}: {'; '.join(differing[:_MAX_DIFFERENCES])}{more}"
    )


def find_unfinished(run: Run, name: str) -> Run | None:
    """Returns the newest run below ``runs/<name>`` that has no `config_differences` from ``run``.

    Returns:
        The record of that run; None if there is none, or it is not resumable: see `Run.is_resumable`.
    """
    same = (other for other in find_candidates(run, name, recorded=True) if not config_differences(run, other))
    newest = next((other for other in same if other.is_finished or other.checkpoints()), None)
    return newest if newest is not None and newest.is_resumable() else None


def config_differences(mine: Run, theirs: Run, swept: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """Returns the differences for which the run ``mine`` may not resume the run ``theirs``.

    The function compares the keys `IDENTITY_KEYS` and ``swept`` before interpolation, and the choice of the group
    ``debug``, since a run for debugging trains only a part. The run of a fold trains on other data than another fold. A
    size that is null in one of the runs follows the data, which are the same, and is no difference.

    Returns:
        For each difference the key, the value of ``mine`` and the value of ``theirs``; the values as JSON.
    """
    values: list[tuple[str, Any, Any]] = []
    for key in (*IDENTITY_KEYS, *swept):
        if key not in IDENTITY_KEYS and (key in mine.choices or key in theirs.choices):
            values.append((key, mine.choices.get(key), theirs.choices.get(key)))
            continue
        here, there = (_flatten(_select(run.config, key), key) for run in (mine, theirs))
        for name in dict.fromkeys([*here, *there]):
            if name not in _FOLLOWING or None not in (here.get(name), there.get(name)):
                values.append((name, here.get(name), there.get(name)))
    values += [(key, mine.config.get(key), theirs.config.get(key)) for key in _FOLD_KEYS]
    values.append((f"+{_DEBUG_GROUP}", mine.choices.get(_DEBUG_GROUP), theirs.choices.get(_DEBUG_GROUP)))
    return [(name, json.dumps(here), json.dumps(there)) for name, here, there in values if not _is_equal(here, there)]


def have_same_overrides(one: Run, other: Run) -> bool:
    """Returns True if the overrides of two runs are the same in any order; ``+key=value`` is ``key=value``."""
    return sorted(w.lstrip("+") for w in one.overrides) == sorted(w.lstrip("+") for w in other.overrides)


def _is_equal(one: Any, other: Any) -> bool:
    # NaN differs from itself; its text does not, which earlier records do not have.
    return one == other or strict_json.dumps(one, as_text=True) == strict_json.dumps(other, as_text=True)


def _select(config: Any, key: str) -> Any:
    """Returns the value in ``config`` under the dotted key of an override, such as ``model.dim``; None without one."""
    for part in key.partition("@")[0].lstrip("+~").split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _flatten(node: Any, prefix: str) -> dict[str, Any]:
    """Returns the values at and below ``node`` that are no dicts, by dotted key; each key begins with ``prefix``."""
    if isinstance(node, dict) and node:
        return {name: value for key, part in node.items() for name, value in _flatten(part, f"{prefix}.{key}").items()}
    return {prefix: node}
