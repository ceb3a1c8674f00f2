"""The public names: each rename, and each change of a signature, shows in the committed list."""

from __future__ import annotations

from support.public_names import LIST, public_names


def test_public_names_are_those_of_the_list():
    """A program breaks when a name goes: it keeps an alias. ``python -m support.public_names`` rewrites the list."""
    assert public_names() == LIST.read_text().splitlines()
