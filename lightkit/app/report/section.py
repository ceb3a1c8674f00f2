"""A section of a report."""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightkit._util.printable import printable


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


def make_section(title: str, make: Callable[[], Path | str | None]) -> list[Section]:
    """Makes a section, as `attempt` does.

    Args:
        title: the heading.
        make: a function that returns the path of a PNG file, HTML, or None for no section.

    Returns:
        The section in a list; an empty list for no section.
    """

    def sections() -> list[Section]:
        content = make()
        if content is None:
            return []
        return [Section(title, figure=content) if isinstance(content, Path) else Section(title, html=content)]

    return attempt(title, sections)


def attempt(title: str, make: Callable[[], list[Section]]) -> list[Section]:
    """Returns the sections that ``make`` returns; if it fails, a section with the title ``title`` that says why.

    A training has ended before its report is made: whatever is wrong with one figure must not lose the rest.
    """
    try:
        return make()
    except Exception as error:
        cause = describe_error(error)
        warnings.warn(f"report: {title!r} could not be made: {cause}", stacklevel=2)
        return [Section(title, html=f"<p>This section could not be made: {html.escape(cause)}</p>")]


def describe_error(error: Exception) -> str:
    """Returns the type of an error and the first line of its message."""
    return printable(f"{type(error).__name__}: {error}".partition("\n")[0])
