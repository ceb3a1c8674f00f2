"""Writes JSON that every reader accepts: the standard has no NaN and no infinities."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def dumps(content: Any, indent: int | None = None, as_text: bool = False) -> str:
    """Returns ``content`` as JSON.

    Args:
        content: mappings, lists, tuples, texts, numbers, True, False and None; any other object becomes its text.
        indent: the number of spaces of each level; None for one line.
        as_text: True writes NaN and infinities as the texts ``"nan"``, ``"inf"`` and ``"-inf"``, which `float` reads.
            False writes them as null.
    """
    replace: Callable[[float], Any] = str if as_text else lambda value: None
    return json.dumps(_finite(content, replace), indent=indent, default=str, allow_nan=False)


def _finite(value: Any, replace: Callable[[float], Any]) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else replace(value)
    if isinstance(value, Mapping):
        return {_finite(key, str): _finite(part, replace) for key, part in value.items()}
    return [_finite(part, replace) for part in value] if isinstance(value, (list, tuple)) else value
