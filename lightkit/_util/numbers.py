"""Numbers as the terminal and the report show them."""

from __future__ import annotations

# From this value on, a number has an exponent.
_LARGE = 1e7


def format_number(value: float, digits: int = 4) -> str:
    """Returns ``value`` with ``digits`` significant digits: ``0.9731``, ``1e-05``, ``12346``, ``1e+12``, ``nan``.

    A number below ten million has all digits before its point. Zeros at the end show that the number was rounded:
    ``1.000`` for 1.0002, and ``1`` for 1.

    Args:
        value: the number; NaN and the infinities are shown as ``nan``, ``inf`` and ``-inf``.
        digits: the number of significant digits.
    """
    # A comparison with NaN is false.
    if 10**digits - 0.5 <= abs(value) < _LARGE:
        return f"{value:.0f}"
    text = f"{value:.{digits}g}"
    return text if float(text) == value else f"{value:#.{digits}g}".rstrip(".")


def format_percentage(share: float) -> str:
    """Returns a share from 0 to 1 as a percentage with four significant digits: ``97.31%``, ``0.001%``."""
    # 100 * 0.57 is not 57.
    return f"{format_number(round(100 * share, 10))}%"


def format_rate(value: float) -> str:
    """Returns a rate such as samples per second with commas between thousands: ``12,346``, ``0.25``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else format_number(value)
