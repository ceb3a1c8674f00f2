"""Writes the tables of figures in README.md and docs/ from the rows in results/.

    python benchmarks/tables.py            # writes every table between its markers
    python benchmarks/tables.py --check    # exit status 1 if a file has a table that is not current

A page has the markers ``<!-- table: NAME -->`` and ``<!-- end -->``. The lines between them are generated: the table,
and a line with its file of rows and its machine.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import compression_tables  # noqa: F401
import job_tables  # noqa: F401
import kernel_tables  # noqa: F401
from markdown_tables import TABLES

ROOT = Path(__file__).resolve().parents[1]

_MARKED = re.compile(r"(?P<begin><!-- table: (?P<name>[a-z-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """Returns the Markdown files that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rewrite(text: str) -> str:
    """Returns a page with each of its tables written anew.

    Raises:
        KeyError: a marker names a table that there is not.
    """

    def replace(match: re.Match[str]) -> str:
        # Blank lines separate the table from the comments, which Markdown takes for a block of HTML.
        lines = ["", *TABLES[match["name"]](), "", match["end"]]
        return match["begin"] + "\n".join(lines)

    return _MARKED.sub(replace, text)


def names_in(text: str) -> list[str]:
    """Returns the names of the tables on a page."""
    return [match["name"] for match in _MARKED.finditer(text)]


def main() -> int:
    """Writes or checks the tables, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not current")
    options = parser.parse_args()
    status = 0
    for page in pages():
        old = page.read_text()
        new = rewrite(old)
        if new == old:
            continue
        if options.check:
            print(f"{page.relative_to(ROOT)} has tables that are not current: run python benchmarks/tables.py")
            status = 1
        else:
            page.write_text(new)
            print(f"wrote {page.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
