"""Finds the regular step of times: a fixed step, calendar months, weekdays, or sessions such as trading hours.

Clocks are read to their last digit, offices close on holidays, and local clocks are put forward and back: each of these
leaves a series regular. Any other time that the step has and the column has not is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np

from lightkit.data.tables.grid import MAX_CELLS
from lightkit.data.tables.times import MICROSECONDS, Times

_HOUR, _DAY = MICROSECONDS["h"], MICROSECONDS["D"]

# A step is regular if more than this share of the differences are one step.
_USUAL = 0.5

# Offices close for at most so many working days in a row (the Chinese New Year takes 8), and on at most so many of all.
_LONGEST_HOLIDAY, _HOLIDAYS = 10, 0.15

# A working week without a Saturday needs more rows than one without a weekend, to be told from missing days.
_FIVE_DAYS, _SIX_DAYS = 7, 21

# Between sessions there are at least so many gaps, of which more than this share are alike.
_SESSIONS, _SAME_GAPS = 3, 0.8

# Months of 31 days are the longest.
_SHORTEST_MONTH, _MONTHS_IN_YEAR = 28, 12


@dataclass(frozen=True)
class Steps:
    """The positions of the times on a regular grid.

    Attributes:
        positions: the number of steps from the first time to each, an increasing int64 array ``(R)``. Times without a
            regular step, and times whose gaps are holidays, count up by one.
        step: the step in words, such as ``1 day``; empty if the times have none.
        filled: the times on the grid that the column has not, as values of `Times`.
        note: what is left out of account, such as holidays; None for nothing.
        clock: the times as the clock shows them by which they are regular.
    """

    positions: np.ndarray
    step: str
    filled: np.ndarray
    note: str | None = None
    clock: Times | None = None

    def filled_texts(self, count: int | None = None) -> list[str]:
        """Returns the first ``count`` of the missing times as text; None for all."""
        assert self.clock is not None
        return self.clock.format(self.filled[:count])


def find_steps(times: Times) -> Steps:
    """Finds the regular step of increasing times; see `in_order` for local times.

    Args:
        times: at least one time; all are `in_order`.
    """
    if len(times) < 3:
        return Steps(np.arange(len(times)), "", times.values[:0])
    # Numbers near the largest float have differences beyond it.
    with np.errstate(over="ignore", invalid="ignore"):
        found = _find(times)
        if not found.step and times.wall_clock is not None:
            # A day of a place with a changed clock has 23 or 25 hours.
            local = replace(times, values=times.wall_clock, has_zone=False)
            if (by_clock := _find(local)).step:
                return replace(by_clock, clock=local)
        return replace(found, clock=times)


def _find(times: Times) -> Steps:
    values = times.values
    if times.kind in ("month", "quarter"):
        unit = 1 if times.kind == "month" else 3
        return _on_grid(values, values, _months(unit * _usual(np.diff(values))), 0) or _irregular(times)
    if times.kind == "instant":
        found = _calendar(values) or _weekdays(values)
        if found is not None:
            return found
    elapsed, note = (values, None) if times.kind == "number" else _without_clock_changes(times)
    found = _on_grid(values, elapsed, "", times.resolution, note)
    if found is None:
        return _irregular(times)
    step = float(elapsed[-1] - elapsed[0]) / int(found.positions[-1])
    shown = f"{step:.6g}" if times.kind == "number" else _duration(step)
    if times.kind == "instant" and step < _DAY and _has_sessions(values, found.positions):
        note = f"sessions of times {shown} apart as they stand"
        return Steps(np.arange(len(values)), shown, values[:0], note)
    return Steps(found.positions, shown, found.filled, note)


def in_order(times: Times) -> np.ndarray:
    """Returns for each time but the first if it comes after the one before, bool ``(R - 1)``.

    A local clock that is put back an hour, in a night of autumn to a Sunday, repeats an hour in order.
    """
    forward = times.values[1:] > times.values[:-1]
    if forward.all() or times.kind != "instant" or times.has_zone:
        return forward
    back, _ = _clock_changes(times.values)
    return forward | back


def _usual(differences: np.ndarray) -> int:
    """Returns the most frequent difference; the smallest of several."""
    found, counts = np.unique(differences, return_counts=True)
    return int(found[counts.argmax()])


def _on_grid(
    values: np.ndarray, elapsed: np.ndarray, step: str, resolution: float, note: str | None = None
) -> Steps | None:
    """Returns the steps of times that lie on a grid, except for missing ones; None if they do not.

    Args:
        values: the values of the times, by which missing times are named.
        elapsed: the values by which the times are regular.
        step: the step in words.
        resolution: the value of the last digit of a time: times may be off by so much.
        note: a note for the result.
    """
    differences = np.diff(elapsed)
    if elapsed.dtype == np.float64 and not np.isfinite(differences).all():
        return None
    middle = np.sort(differences)[(len(differences) - 1) // 2]
    # The median is one of the rounded differences; the mean of those like it is more exact.
    base = differences[np.abs(differences - middle) <= 0.25 * middle].mean()
    # With more missing times than a table may have cells, a step explains nothing.
    if differences.sum() / base > MAX_CELLS:
        return None
    counts = np.round(differences / base).astype(np.int64)
    if counts.min() < 1 or (counts == 1).mean() <= _USUAL or (counts.max() > 1 and len(counts) < 3):
        return None
    positions = np.concatenate([[0], np.cumsum(counts)])
    exact = float(elapsed[-1] - elapsed[0]) / int(positions[-1])
    off = np.abs((elapsed - elapsed[0]) - positions * exact).max()
    if off > min(2 * resolution, 0.25 * exact) + 1e-9 * max(float(np.abs(elapsed).max()), exact):
        return None
    return Steps(positions, step, _between(values, counts, exact), note)


def _between(values: np.ndarray, counts: np.ndarray, step: float) -> np.ndarray:
    """Returns the missing times: those after each value that a gap follows."""
    gaps = np.flatnonzero(counts > 1)
    missing = counts[gaps] - 1
    starts = np.repeat(values[gaps], missing)
    within = np.arange(missing.sum()) - np.repeat(np.cumsum(missing) - missing, missing) + 1
    return (starts + within * step).astype(values.dtype)


def _calendar(values: np.ndarray) -> Steps | None:
    """Returns the steps of times that are one or several months apart, on the same day of each month; else None."""
    instants = values.astype("datetime64[us]")
    days, months = instants.astype("datetime64[D]"), instants.astype("datetime64[M]")
    differences = np.diff(months.astype(np.int64))
    if (
        differences.min() < 1
        or np.diff(values).min() < _SHORTEST_MONTH * _DAY - _DAY
        or (values % _DAY != values[0] % _DAY).any()
    ):
        return None
    # Of the last day of a month, or the 30th in February, the nearest day that the month has.
    first, last = months.astype("datetime64[D]"), (months + 1).astype("datetime64[D]") - 1
    day = int((days - first).astype(np.int64).max())
    on_day = np.minimum(first + day, last)
    anchors = {
        "same": on_day,
        "last": last,
        "last weekday": np.busday_offset(last, 0, roll="backward"),
        "first weekday": np.busday_offset(first, 0, roll="forward"),
    }
    anchor = next((name for name, expected in anchors.items() if (days == expected).all()), None)
    if anchor is None:
        return None
    index = months.astype(np.int64)
    found = _on_grid(index, index, _months(_usual(differences)), 0)
    if found is None:
        return None
    # The days of the missing months.
    missing = found.filled.astype("datetime64[M]")
    first, last = missing.astype("datetime64[D]"), (missing + 1).astype("datetime64[D]") - 1
    named = np.minimum(first + day, last)
    if anchor == "last weekday":
        named = np.busday_offset(last, 0, roll="backward")
    elif anchor == "first weekday":
        named = np.busday_offset(first, 0, roll="forward")
    filled = named.astype("datetime64[us]").astype(np.int64) + values[0] % _DAY
    return Steps(found.positions, found.step, filled)


def _months(count: int) -> str:
    years, months = divmod(count, _MONTHS_IN_YEAR)
    count, unit = (years, "year") if months == 0 else (count // 3, "quarter") if count == 3 else (count, "month")
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def _weekdays(values: np.ndarray) -> Steps | None:
    """Returns the steps of days of a working week; None if the times are no days or have each day of the week."""
    days = values.astype("datetime64[us]").astype("datetime64[D]")
    if (values % _DAY != values[0] % _DAY).any() or len(days) < 5:
        return None
    # The first of January 1970 was a Thursday, day 3 of NumPy's week.
    present = sorted(set(((days.astype(np.int64) + 3) % 7).tolist()))
    span = int((days[-1] - days[0]).astype(np.int64))
    if span < {5: _FIVE_DAYS, 6: _SIX_DAYS}.get(len(present), span + 1):
        return None
    absent = [day for day in range(7) if day not in present]
    if len(absent) == 2 and (absent[1] - absent[0]) not in (1, 6):
        return None
    week = np.array([day in present for day in range(7)])
    counts = np.busday_count(days[:-1], days[1:], weekmask=week)
    if (counts == 1).mean() <= _USUAL:
        return None
    holidays = counts - 1
    closed = (holidays > 0) & (holidays <= _LONGEST_HOLIDAY)
    closed &= holidays[closed].sum() <= _HOLIDAYS * len(days)
    days_off = int(holidays[closed].sum())
    left_out = f"{days_off} {'holiday' if days_off == 1 else 'holidays'} left out"
    note = f"working days as they stand, {left_out}" if days_off else None
    counts = np.where(closed, 1, counts)
    positions = np.concatenate([[0], np.cumsum(counts)])
    filled = [
        np.busday_offset(days[gap], np.arange(1, counts[gap]), weekmask=week) for gap in np.flatnonzero(counts > 1)
    ]
    named = np.concatenate(filled) if filled else days[:0]
    return Steps(positions, "1 working day", named.astype("datetime64[us]").astype(np.int64) + values[0] % _DAY, note)


def _clock_changes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where a local clock is put back and forward between two times, two bool arrays ``(R - 1)``.

    Clocks change in a night to a Sunday or from it, in March, April, September, October or November.
    """
    differences = np.diff(values)
    step = _usual(differences)
    instants = values[1:].astype("datetime64[us]")
    month = instants.astype("datetime64[M]").astype(np.int64) % _MONTHS_IN_YEAR + 1
    is_sunday = (instants.astype("datetime64[D]").astype(np.int64) + 3) % 7 == 6
    is_night = values[1:] % _DAY <= 4 * _HOUR
    possible = is_sunday & is_night & np.isin(month, (3, 4, 9, 10, 11)) & (0 < step <= _HOUR)
    return possible & (differences == step - _HOUR), possible & (differences == step + _HOUR)


def _without_clock_changes(times: Times) -> tuple[np.ndarray, str | None]:
    """Returns the values by a clock that is never changed, and a note of the changes."""
    if times.has_zone:
        return times.values, None
    back, forward = _clock_changes(times.values)
    changes = forward.astype(np.int64) - back.astype(np.int64)
    # A clock is put back only after it was put forward, and the other way round; else an hour is missing or doubled.
    signs = changes[changes != 0]
    if len(signs) == 0 or (len(signs) > 1 and (np.diff(signs) == 0).any()):
        return times.values, None
    elapsed = times.values - np.concatenate([[0], np.cumsum(changes)]) * _HOUR
    days = times.values[1:][changes != 0].astype("datetime64[us]").astype("datetime64[D]")
    more = f" and {len(days) - 2} more" if len(days) > 2 else ""
    return elapsed, f"clock changes on {', '.join(map(str, days[:2]))}{more}"


def _has_sessions(values: np.ndarray, positions: np.ndarray) -> bool:
    """Returns True if most gaps begin and end at the same two times of the day, as between trading hours.

    Markets with a break at noon have two such gaps.
    """
    gaps = np.diff(positions) > 1
    if gaps.sum() < _SESSIONS:
        return False
    ends_and_begins = np.stack([values[:-1][gaps] % _DAY, values[1:][gaps] % _DAY], axis=1)
    _, counts = np.unique(ends_and_begins, axis=0, return_counts=True)
    return np.sort(counts)[-2:].sum() > _SAME_GAPS * gaps.sum() and counts.max() >= _SESSIONS


def _irregular(times: Times) -> Steps:
    differences = np.diff(times.values)
    low, high = differences.min(), differences.max()
    if times.kind == "instant":
        steps = f"{_duration(low)} to {_duration(high)}"
    elif times.kind == "number":
        steps = f"{low:.6g} to {high:.6g}"
    else:
        steps = f"{low} to {high} {times.kind}s"
    note = f"times without a regular step, {steps} apart, taken as evenly spaced"
    return Steps(np.arange(len(times)), "", times.values[:0], note)


def _duration(microseconds: float) -> str:
    """Returns a duration in its largest fitting unit, such as ``15 minutes``."""
    for unit, name in (("D", "day"), ("h", "hour"), ("m", "minute"), ("s", "second")):
        count = round(microseconds) / MICROSECONDS[unit]
        if count >= 1:
            text = f"{count:.4g}"
            return f"{text} {name}" if text == "1" else f"{text} {name}s"
    return f"{timedelta(microseconds=round(microseconds)).total_seconds():g} seconds"
