"""The correspondence between the names of a file's tensors and those of a module, which wrappers prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# The levels of a name that may be the prefix of a wrapper, such as model. or module.model.
_MAX_LEVELS = 3

# The part that torch.compile adds to the names in a module that it wraps.
_COMPILED = "_orig_mod."


def map_names(have: Iterable[str], want: Mapping[str, Any]) -> dict[str, str]:
    """Returns the name in the module for each name in a file that may have one.

    The function removes one prefix from the names in the file and adds one, such that most names agree: a
    LightningModule has ``model.head.weight`` where its model has ``head.weight``. A name in the file without the prefix
    has no counterpart.

    Args:
        have: the names in the file.
        want: the names in the module.
    """
    clean = {name: name.replace(_COMPILED, "") for name in have}
    removed = _prefixes(clean.values())
    added = _prefixes(want)
    known = set(want)

    def score(pair: tuple[str, str]) -> tuple[int, int]:
        remove, add = pair
        agreed = sum(add + name[len(remove) :] in known for name in clean.values() if name.startswith(remove))
        return agreed, -len(remove) - len(add)

    remove, add = max(((one, other) for one in removed for other in added), key=score)
    if 2 * score((remove, add))[0] < min(len(clean), len(known)):
        # Names that agree by chance are those of another model, and the message should have its own names.
        remove = add = ""
    return {name: add + short[len(remove) :] for name, short in clean.items() if short.startswith(remove)}


def _prefixes(names: Iterable[str]) -> list[str]:
    """Returns the empty text and the beginnings of dotted names, each with its dot."""
    found = {"": None}
    for name in names:
        parts = name.split(".")[:-1][:_MAX_LEVELS]
        found |= {".".join(parts[:count]) + ".": None for count in range(1, len(parts) + 1)}
    return list(found)


def is_last_block(names: set[str], order: list[str]) -> bool:
    """Returns True if ``names`` are a whole module at the end of the names ``order``, and not all of them.

    Args:
        names: the names, which are among those in ``order``.
        order: all names, in the order of the modules.
    """
    if not names or set(order[-len(names) :]) != names or len(names) == len(order):
        return False
    parent = _common_parent(names)
    return bool(parent) and all(name in names for name in order if name.startswith(parent))


def _common_parent(names: set[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common) + "." if common else ""
