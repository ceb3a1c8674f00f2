"""Checks for instances of classes whose modules take long to import, without importing them."""

from __future__ import annotations

import sys
from typing import Any


def is_instance(value: Any, module: str, name: str) -> bool:
    """Returns True if ``value`` is an instance of the class ``name`` of the module ``module``.

    The function does not import the module. While nobody has imported it, no object is an instance of its classes.

    Args:
        value: the object.
        module: the name of the module, such as ``omegaconf``.
        name: the name of the class in the module.
    """
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)
