"""A section of a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Args:
        title: the heading.
        figure: a PNG file, which the page embeds.
        html: HTML, which the page includes unchanged: names from data must be escaped in it.
    """

    title: str
    figure: Path | None = None
    html: str | None = None
