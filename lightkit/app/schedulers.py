"""Learning-rate schedulers from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lightkit.config import build, to_plain
from lightkit.tasks.schedule import LENGTH_ARGUMENTS, RATE_ARGUMENT, Schedule

# The keys of the group that say when the scheduler is called, with their defaults.
_CALLS: dict[str, Any] = {"interval": None, "frequency": 1, "monitor": "val/loss"}


def build_scheduler(node: Any) -> Schedule | None:
    """Returns the scheduler factory that the key ``scheduler`` of a configuration describes.

    A length argument or a ``max_lr`` that is null stays None in the factory: `lightkit.tasks.schedule.make_schedule`
    replaces it.

    Args:
        node: the value of the key; None if the configuration has no such key.

    Returns:
        The factory; None for no scheduler.

    Raises:
        ConfigError: the class or one of the keys ``interval``, ``frequency`` and ``monitor`` is wrong.
    """
    node = to_plain(node) or {}
    calls = {name: default if node.get(name) is None else node[name] for name, default in _CALLS.items()}
    if node.get("_target_") is not None:
        # The optimizer comes later; a class of the user's in the place of scheduler=none has no such key.
        node = {**node, "_partial_": True}
    # The scheduler itself does not accept None, by which the check of the arguments would reject it.
    unset = [name for name in (*LENGTH_ARGUMENTS, RATE_ARGUMENT) if name in node and node[name] is None]
    make = build({name: value for name, value in node.items() if name not in (*unset, *_CALLS)}) or None
    if make is None:
        return None
    return Schedule(partial(make, **dict.fromkeys(unset)) if unset else make, **calls)


def arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the scheduler's class in its configuration, without those that are null."""
    return {k: v for k, v in node.items() if k[0] != "_" and k not in _CALLS and v is not None}


def settings(node: Any) -> dict[str, Any]:
    """Returns the keys of a scheduler's configuration that differ from null and from the default of every scheduler.

    Args:
        node: the value of the key ``scheduler``, as plain containers; None if the configuration has no such key.
    """
    node = node or {}
    # Without an open length, null is another word for epochs.
    is_open = any(name in node and node[name] is None for name in LENGTH_ARGUMENTS)
    defaults = _CALLS if is_open else {**_CALLS, "interval": "epoch"}
    return {key: value for key, value in node.items() if value is not None and value != defaults.get(key)}
