"""A section of a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Args:
        title: the heading.
        figure: the path of a PNG file, which the page embeds; None for no figure.
        html: HTML, which the page includes unchanged, so that names from data must be escaped in it; None for none.
    """

    title: str
    figure: Path | None = None
    html: str | None = None
