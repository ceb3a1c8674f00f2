"""What differs between the configurations of runs."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from lightkit.app.runs.summary import RunSummary

# Keys that say where and how a run was started, and not what it trained.
_IGNORED = ("name", "run_dir", "ckpt_path", "tags")

# The number of levels of a configuration that are compared key by key.
_MAX_DEPTH = 12

# The text for a key that a run does not have.
MISSING = "-"


def settings(run: RunSummary) -> dict[str, str]:
    """Returns the values of a run's configuration by dotted key, as texts; keys of its place and name are left out."""
    choices = {key: value for key, value in run.config.items() if key not in _IGNORED}
    return _flatten(choices, "", _MAX_DEPTH)


def differing_keys(runs: Sequence[RunSummary]) -> dict[str, list[str]]:
    """Returns the dotted keys whose values differ between runs, each with the value of every run as a text.

    Args:
        runs: the runs; a run without a key has `MISSING`.
    """
    found = [settings(run) for run in runs]
    values = {
        key: [one.get(key, MISSING) for one in found] for key in dict.fromkeys(key for one in found for key in one)
    }
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def uncommon_settings(runs: Sequence[RunSummary]) -> list[dict[str, str]]:
    """Returns for each run those of its settings that are not those of more than half of the runs of the same name.

    Args:
        runs: the runs, in any order and of any names.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for place, run in enumerate(runs):
        groups[run.name].append(place)
    uncommon: list[dict[str, str]] = [{} for _ in runs]
    for places in groups.values():
        for key, values in differing_keys([runs[place] for place in places]).items():
            (common, count), *_ = Counter(values).most_common(1)
            for place, value in zip(places, values, strict=True):
                if value != common or count * 2 <= len(values):
                    uncommon[place][key] = value
    return uncommon


def _flatten(node: Any, prefix: str, depth: int) -> dict[str, str]:
    if isinstance(node, dict) and node and depth:
        found: dict[str, str] = {}
        for key, part in node.items():
            found |= _flatten(part, f"{prefix}.{key}" if prefix else str(key), depth - 1)
        return found
    return {prefix: node if isinstance(node, str) else json.dumps(node)}
