"""Names of the previous release still work, and warn with the new name."""

import pytest

import lightkit.data
from lightkit.loops.slicing import fetch_slices


def test_fetch_slices():
    with pytest.warns(DeprecationWarning, match=r"lightkit\.data\.fetch_slices is now lightkit\.loops\.slicing"):
        assert lightkit.data.fetch_slices is fetch_slices
