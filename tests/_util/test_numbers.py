"""Numbers in the terminal and in the report: readable at any size."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightkit._util.numbers import format_number, format_percentage, format_rate


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.97314, "0.9731"),
        (1.0002, "1.000"),
        (4.30981, "4.310"),
        (0.95, "0.95"),
        (999.96, "1000"),
        (1.00001e-5, "1.000e-05"),
        (1e-5, "1e-05"),
        (1e-4, "0.0001"),
        (1.23456e-7, "1.235e-07"),
        (1e12, "1e+12"),
        (12345.6, "12346"),
        (9999.4, "9999"),
        (9999.6, "10000"),
        (-123456.7, "-123457"),
        (0.0, "0"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (3, "3"),
    ],
)
def test_numbers(value, shown):
    """Four digits are significant, none of a number below ten million is hidden, and NaN is NaN."""
    assert format_number(value) == shown


@given(st.floats(-1e300, 1e300))
def test_no_number_looks_like_another(value):
    """What is shown is the number, up to its fifth digit."""
    assert math.isclose(float(format_number(value)), value, rel_tol=5.1e-4, abs_tol=1e-320)


def test_shares_and_rates():
    """Shares are percentages, small ones too, and rates have commas."""
    assert [format_percentage(x) for x in (0.97313, 1e-5, 1.0, 0.975, 0.57, math.nan)] == [
        *("97.31%", "0.001%", "100%", "97.5%", "57%", "nan%")
    ]
    assert [format_rate(x) for x in (12345.6, 0.25, 1e12, math.nan)] == ["12,346", "0.25", "1,000,000,000,000", "nan"]
