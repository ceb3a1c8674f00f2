"""Files of series for tests."""

from __future__ import annotations

import math
from pathlib import Path


def write_wave(path: Path, rows: int = 240, **cells: str) -> None:
    """Writes a CSV file of a wave of twelve steps that climbs; ``cells`` replaces what stands in a row."""
    lines = ["day,price"]
    for row in range(rows):
        value = 100 + 0.2 * row + 5 * math.sin(row * math.pi / 6)
        lines.append(f"{row},{cells.get(f'row{row}', f'{value:.4f}')}")
    path.write_text("\n".join(lines) + "\n")
