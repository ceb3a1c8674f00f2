"""Names of strangers: what a reader sees is what is there."""

from __future__ import annotations

import sys
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from lightkit._util.printable import printable


def test_what_is_for_reading_stays():
    """Letters of any script, pictures of several characters, spaces."""
    for text in ("plain", "naïve", "日本語", "می‌خواهم", "👩‍👧", "a b"):
        assert printable(text) == text


def test_what_is_not_is_escaped():
    """Control sequences, directions of writing, lines, and halves of characters as file names may have them."""
    assert printable("\x1b[2J\x07\x9b\r\n\t\x00") == r"\x1b[2J\x07\x9b\r\n\t\x00"
    assert printable("a\u202eb\u2028c\udc80") == r"a\u202eb\u2028c\udc80"
    assert printable("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"


@given(st.text(st.characters(codec=None), max_size=30))
def test_any_text_can_be_printed(text):
    """No control character is left, and the result can be encoded."""
    shown = printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in shown)
    shown.encode(sys.getdefaultencoding())
