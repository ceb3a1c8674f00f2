"""Names that come from somebody else, made safe to print."""

from __future__ import annotations

import unicodedata

# Control characters, which a terminal obeys; those that turn the direction of writing or begin a line, which deceive a
# reader; halves of characters, which cannot be encoded.
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")

# Joiners, which Persian, Hindi and pictures of several characters are written with.
_JOINERS = "\u200c\u200d"


def printable(text: str, keep: str = "") -> str:
    r"""Returns a text with every character escaped that is not for reading, such as ``\x1b`` for ESC.

    Args:
        text: what somebody else wrote: a key, a file name, a column.
        keep: characters that stay as they are, such as ``"\n"``.
    """
    if text.isascii() and text.isprintable():
        return text
    keep += _JOINERS
    return "".join(c if c in keep or unicodedata.category(c) not in _ESCAPED else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
