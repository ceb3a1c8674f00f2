"""Escapes the characters of an untrusted text that are not safe to print."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

# A terminal obeys control characters; characters that turn the direction of writing or begin a line deceive a reader;
# surrogates cannot be encoded.
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")

# Persian, Hindi and emoji of several characters need the joiners.
_JOINERS = "\u200c\u200d"

# The number of names that a message shows.
_SHOWN = 3


def printable(text: str, keep: str = "") -> str:
    r"""Returns ``text`` with each control, format, surrogate and line-separator character escaped: ``\x1b`` for ESC.

    Args:
        text: an untrusted text, such as a key, or the name of a file or of a column.
        keep: the characters that stay unescaped, such as ``"\n"``.
    """
    if text.isascii() and text.isprintable():
        return text
    keep += _JOINERS
    return "".join(c if c in keep or unicodedata.category(c) not in _ESCAPED else _escape(c) for c in text)


def few(texts: Sequence[str], separator: str = ", ") -> str:
    """Returns the first three of ``texts``, escaped by `printable`, and the number of the others."""
    shown = separator.join(map(printable, texts[:_SHOWN]))
    return f"{shown} and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else shown


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
