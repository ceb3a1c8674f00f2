"""Pages: nothing in the data runs or leaves the page, whatever it is called."""

from __future__ import annotations

import html.parser
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightkit.app.pages import document
from lightkit.app.pages.document import link, plotting_library, render_page

EVIL = "</script><script>alert(1)</script><!--\u2028 <img src=x onerror=alert(2)>\x1b[2J\u202e\"'"


class Parsed(html.parser.HTMLParser):
    """Collects the elements of a page with their attributes, and the content of its scripts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.scripts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script":
            self.scripts.append(data)


def test_the_plotting_library_is_there():
    """The extra `app` installs d3, which the charts need, with its licence in the first line."""
    source = plotting_library()
    assert source is not None and source.startswith("// https://d3js.org v5.") and len(source) < 300_000


@given(st.text() | st.just(EVIL))
def test_data_stays_data(text):
    """A text in the data is the same text for the scripts of the page, and adds no element."""
    page = render_page(text, text, "", {"curves-data": {"names": [text]}}, ["curves"])
    empty = Parsed(render_page("", "", "", {"curves-data": {"names": [""]}}, ["curves"]))
    parsed = Parsed(page)
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in empty.elements]
    data = page.partition('<script type="application/json" id="curves-data">')[2].partition("</script>")[0]
    assert json.loads(data) == {"names": [text]}


def test_scripts_have_their_hashes():
    """The content security policy names exactly the scripts of the page, and lets it load nothing."""
    page = render_page("x", "y", "<p>z</p>", {}, ["curves", "table", "parallel"])
    policy = next(a["content"] for tag, a in Parsed(page).elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;") and policy.count("'sha256-") == 5
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_without_the_library(monkeypatch):
    """A page without d3 is a page without charts, and still has its other scripts."""
    monkeypatch.setattr(document, "_PACKAGE", "no_such_package")
    plotting_library.cache_clear()
    try:
        assert plotting_library() is None
        assert "d3js.org" not in render_page("x", "y", "", {}, ["curves"])
    finally:
        plotting_library.cache_clear()


@pytest.mark.parametrize("name", ["javascript:alert(1)", "//host/x", "a b&c\"'<>#?%", "\udcff", "été"])
def test_links_are_relative(name):
    """A link leads to a file beside the page, whatever it is called."""
    (address,) = [a["href"] for tag, a in Parsed(link(name, name)).elements if tag == "a"]
    assert address.startswith("./") and not set(" \"'<>#?") & set(address)
