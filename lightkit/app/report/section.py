"""A part of a report: a title, and a figure or a piece of HTML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """What stands under one heading of the page. ``html`` is put in as it is: escape what comes from outside."""

    title: str
    figure: Path | None = None
    html: str | None = None
