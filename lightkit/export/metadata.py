"""The metadata of an export as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightkit._util.printable import printable
from lightkit.errors import CheckpointError
from lightkit.export.runtime import InputSpec

# The name of the metadata in a file.
KEY = "lightkit"

# The entry of the metadata with the forms of the inputs.
INPUTS = "inputs"

# The largest number of characters: the encoding of a table has up to a million categories.
_MAX_CHARACTERS = 64 << 20


def to_json(metadata: dict[str, Any]) -> str:
    """Returns metadata as JSON.

    Raises:
        ValueError: a number is NaN or infinite, which JSON lacks.
    """
    return json.dumps(metadata, allow_nan=False)


def from_json(text: str, path: Path) -> dict[str, Any]:
    """Returns the metadata in an export; an empty dict for an empty text.

    Args:
        text: the JSON, from an untrusted file.
        path: the file, for the message.

    Raises:
        CheckpointError: the text is no JSON of a mapping, or too long.
    """
    if len(text) > _MAX_CHARACTERS:
        raise CheckpointError(
            f"{path}: its metadata has {len(text):,} characters, expected {_MAX_CHARACTERS:,} at most"
        )
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is no JSON") from error
    if type(found) is not dict:
        raise CheckpointError(f"{path}: its metadata is a {type(found).__name__}, expected a mapping")
    return found


def input_specs(metadata: dict[str, Any], path: Path) -> tuple[InputSpec, ...]:
    """Returns the forms of the inputs that the metadata of an untrusted file give; an empty tuple for none.

    Raises:
        CheckpointError: they are no such forms.
    """
    try:
        return tuple(InputSpec(**{**node, "shape": tuple(node["shape"])}) for node in metadata.get(INPUTS, []))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not say the form of its inputs: {printable(str(error))}") from error
