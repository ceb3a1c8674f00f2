"""Report sections of a compression: its key figures, and tables of widths, zeros and rounded weights."""

from __future__ import annotations

from lightkit.app.compression_outcome import CompressionOutcome, outcome_facts, outcome_tables
from lightkit.app.pages.document import table_rows
from lightkit.app.report.section import Section


def sections(outcome: CompressionOutcome) -> list[Section]:
    """Returns the report sections of what the callbacks of compression have made of the model."""
    facts = Section("Compression", html=f"<table>{table_rows(outcome_facts(outcome))}</table>")
    return [facts, *(Section(title, html=table) for title, table in outcome_tables(outcome).items())]
