"""Asks about classes of modules that take long to import, without importing them."""

from __future__ import annotations

import sys
from typing import Any


def is_instance(value: Any, module: str, name: str) -> bool:
    """Returns whether ``value`` is an instance of the class ``name`` of ``module``.

    While nobody has imported the module, nothing is.
    """
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(value, found)
