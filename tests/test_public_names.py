"""The public names: each rename, and each change of a signature, shows in the committed list."""

from __future__ import annotations

from support.public_names import LIST, public_names


def test_public_names_are_those_of_the_list():
    """A program breaks when a name goes: rename with an alias, then run ``python -m support.public_names`` in tests/."""
    assert public_names() == LIST.read_text().splitlines()
