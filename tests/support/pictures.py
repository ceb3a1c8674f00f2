"""Folders of pictures in colour, of which each class has its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"cat": (200, 60, 40), "dog": (40, 80, 200), "owl": (60, 200, 60)}


def write_picture(path: Path, colour: tuple[int, ...] = (200, 60, 40), size: tuple[int, int] = (20, 26)) -> Path:
    """Writes a noisy picture of one colour of height and width ``size``; the same for the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(sum(path.name.encode())).normal(0, 30, (*size, 1))
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8).squeeze()).save(path)
    return path


def write_classes(root: Path, counts: Mapping[str, int], size: tuple[int, int] = (20, 26)) -> Path:
    """Writes a folder with a folder of pictures for each class of `COLOURS` that has a count; returns ``root``."""
    for name, count in counts.items():
        for index in range(count):
            write_picture(root / name / f"{index:03}.png", COLOURS.get(name, (120, 120, 0)), size)
    return root
