"""README.md and docs/: tables are current, links lead somewhere, and the two commands are what CI runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_PAGES = sorted([*_ROOT.glob("*.md"), *(_ROOT / "docs").rglob("*.md"), *(_ROOT / "csrc").rglob("*.md")])

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tables():
    """The generator, which is a program beside the rows and no part of a package."""
    sys.path.insert(0, str(_ROOT / "benchmarks"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    return tables


def _anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and MkDocs name them."""
    headings = _HEADING.findall(_CODE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tables_are_current(tables):
    """Each table says what the rows say: `python benchmarks/tables.py` writes them."""
    stale = [page.name for page in tables.pages() if tables.rewrite(page.read_text()) != page.read_text()]
    assert not stale


def test_each_table_stands_on_a_page(tables):
    """A table that no page shows is measured for nobody."""
    shown = {name for page in tables.pages() for name in tables.names_in(page.read_text())}
    assert shown == set(tables.TABLES)


def test_a_changed_figure_is_noticed(tables):
    """The check would fail if a row were another."""
    text = (_ROOT / "README.md").read_text()
    name = tables.names_in(text)[0]
    line = tables.TABLES[name]()[-1]
    assert tables.rewrite(text.replace(line, line.replace("1", "7"))) == text


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_ROOT)))
def test_links_lead_somewhere(page: Path):
    """Relative links name files, and their anchors headings."""
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: there is no {file}"
        assert not anchor or anchor in _anchors(file), f"{target}: {file.name} has no such heading"


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_ROOT)))
def test_a_page_has_one_title(page: Path):
    """A site takes the first heading for the title of the page."""
    headings = re.findall(r"^(#+) ", _CODE.sub("", page.read_text()), re.MULTILINE)
    assert headings[0] == "#" and headings.count("#") == 1


def test_readme_is_short():
    """What is longer has a page in docs/."""
    assert len((_ROOT / "README.md").read_text().splitlines()) <= 150
