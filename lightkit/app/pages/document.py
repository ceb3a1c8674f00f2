"""Puts a page together: the template, the style, the scripts, the plotting library and the data.

Everything is in the one file. A content security policy lets a browser run these scripts alone, by their hashes, and
load nothing, so that neither a name in the data nor a mistake in a section can run code or reach a network.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from lightkit._util import strict_json
from lightkit._util.printable import printable

_ASSETS = Path(__file__).with_name("assets")

# The package of the extra `app` that ships d3, a library of building blocks for figures: 240 kB, under the licence
# BSD-3-Clause. The bundle of plotly has 4.8 MB, which each run of a sweep would hold; bokeh's has 1.3 MB and needs
# pandas and tornado.
_PACKAGE = "mpld3"
_LIBRARY_FILE = "js/d3.v5.min.js"


@functools.cache
def plotting_library() -> str | None:
    """Returns the source of d3; None if the package that ships it is not installed or has no such file."""
    try:
        found = importlib.util.find_spec(_PACKAGE)
        # The package itself, which would import matplotlib, is not imported.
        places = [] if found is None else list(found.submodule_search_locations or [])
        return (Path(places[0]) / _LIBRARY_FILE).read_text(encoding="utf-8") if places else None
    except (OSError, ValueError, ImportError):
        return None


def render_page(
    title: str,
    subtitle: str,
    body: str,
    data: Mapping[str, Any] | None = None,
    scripts: Iterable[str] = (),
) -> str:
    """Returns a page as HTML.

    Args:
        title: the heading, a plain text.
        subtitle: the line below the heading, a plain text.
        body: the HTML of the page, in which texts from data are escaped.
        data: what the scripts read, by the id of the element that holds it as JSON.
        scripts: the names of the scripts in ``assets``, such as ``"curves"``, which may use d3.
    """
    sources = [_asset(f"{name}.js") for name in scripts]
    if sources and (library := plotting_library()) is not None:
        sources.insert(0, library)
    theme = _asset("theme.js")
    hashes = " ".join(f"'sha256-{_hash(_script_text(source))}'" for source in [theme, *sources])
    return Template(_asset("page.html")).substitute(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}",
        title=escape(title),
        subtitle=escape(subtitle),
        style=_asset("style.css"),
        head=_script(theme),
        body=body,
        data="\n".join(_json_element(name, content) for name, content in (data or {}).items()),
        scripts="\n".join(map(_script, sources)),
    )


def escape(text: str) -> str:
    """Returns ``text`` for HTML, in which control characters are shown as escapes."""
    return html.escape(printable(text, keep="\n\t"))


def link(path: str, text: str) -> str:
    """Returns an HTML link to a relative path, in which no character has a meaning of its own.

    Args:
        path: the path relative to the directory of the page, with ``/`` between its parts.
        text: the text of the link.
    """
    # Without ./ a directory called "javascript:..." would be a scheme.
    return f'<a href="./{html.escape(quote(path, errors="surrogateescape"))}">{escape(text)}</a>'


def table_rows(values: Mapping[str, str]) -> str:
    """Returns rows of an HTML table with names and texts."""
    return "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in values.items())


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns an HTML table of plain texts with a line of names."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<table><tr>{names}</tr>{lines}</table>"


@functools.cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _json_element(name: str, content: Any) -> str:
    # The end of the element, and the beginning of a comment, are all that a browser looks for in it.
    text = strict_json.dumps(content).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return f'<script type="application/json" id="{html.escape(name)}">{text}</script>'


def _script_text(source: str) -> str:
    return "\n" + re.sub(r"</(script)", r"<\\/\1", source, flags=re.IGNORECASE) + "\n"


def _script(source: str) -> str:
    return f"<script>{_script_text(source)}</script>"


def _hash(text: str) -> str:
    # A browser reads every end of a line as \n.
    return base64.b64encode(hashlib.sha256(text.replace("\r\n", "\n").encode()).digest()).decode()
