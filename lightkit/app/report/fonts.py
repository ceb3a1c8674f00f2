"""Fonts for the names in a figure: installed fonts that have the characters which matplotlib's own font lacks."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

# The family of the font that draws each character, for those that were looked up; None where no font has it.
_families: dict[str, str | None] = {}

# Fonts of formulas, and of boxes that stand for any character.
_UNFIT = ("cm", "STIXSize", "STIXNonUnicode", "Last Resort")


def draw_as(texts: Iterable[str]) -> list[str]:
    r"""Returns texts in a form that the installed fonts can draw: other characters are escaped, as ``\u6c14``.

    Args:
        texts: the texts, without control characters. One call with all of them searches the fonts once.
    """
    texts = list(texts)
    _look_up({character for text in texts for character in text})
    return ["".join(c if _families[c] is not None else _escape(c) for c in text) for text in texts]


def families_for(text: str) -> list[str]:
    """Returns the families that draw ``text``, which `draw_as` has returned: matplotlib's own and those it needs."""
    _look_up(set(text))
    default = font_manager.FontProperties().get_family()
    return list(dict.fromkeys([*default, *(family for c in text if (family := _families[c]) not in (None, ""))]))


def _look_up(characters: set[str]) -> None:
    """Adds ``characters`` to `_families`; the default font has the family ``""``."""
    missing = {character for character in characters if character not in _families}
    if not missing:
        return
    own = FT2Font(font_manager.findfont(font_manager.FontProperties()))
    # A line break and a joiner are not drawn.
    found = {c for c in missing if own.get_char_index(ord(c)) or unicodedata.category(c) in ("Cc", "Cf")}
    _families.update(dict.fromkeys(found, ""))
    missing -= found
    fonts = _installed_fonts() if missing else iter(())
    for family, path in fonts:
        found = _characters_in(path, missing)
        _families.update(dict.fromkeys(found, family))
        missing -= found
        if not missing:
            return
    _families.update(dict.fromkeys(missing))


def _installed_fonts() -> Iterator[tuple[str, str]]:
    """Yields family and file of the installed fonts, the upright ones of regular weight first."""
    entries = [entry for entry in font_manager.fontManager.ttflist if not entry.name.startswith(_UNFIT)]
    for entry in sorted(entries, key=lambda entry: (entry.style != "normal", entry.weight not in (400, "normal"))):
        yield entry.name, entry.fname


def _characters_in(path: str, characters: set[str]) -> set[str]:
    """Returns those of the ``characters`` that a font can draw; none of a font of bitmaps, or of a damaged one."""
    try:
        font = FT2Font(path)
        return {c for c in characters if font.get_char_index(ord(c))} if font.scalable else set()
    except (OSError, RuntimeError):
        return set()


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
