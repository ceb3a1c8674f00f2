"""What a run writes is whole at any time, and what is no file is not replaced by one."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import hydra.core.utils
import pytest
import torch
from omegaconf import OmegaConf

from lightkit._util import atomic_write
from lightkit._util.atomic_write import (
    remove_leftovers,
    write_atomically,
    write_text_atomically,
)
from lightkit.app import hydra_patches, run_files
from lightkit.app.prediction.images import ImagePrediction, ImagePredictions
from lightkit.app.prediction.series import Forecast, ForecastStep
from lightkit.app.prediction.text import Continuation
from lightkit.app.report import figures


def draw(path):
    figure, _ = figures.grid(2, 2, nrows=1, ncols=1)
    figures.save(figure, path)


PICTURE = ImagePrediction(Path("a.png"), "7", 0.5, None)

WRITERS = {
    "config.yaml": lambda path: run_files.write_config(path.parent, OmegaConf.create({"seed": 1})),
    "environment.json": lambda path: run_files.write_json(path, {"python": "3"}),
    "curves.png": draw,
    "images.csv": lambda path: ImagePredictions([PICTURE], ["7"], torch.ones(1, 1), {}).write(path),
    "series.csv": lambda path: Forecast("x", 0.8, [ForecastStep(1, 2.0, 1.0, 3.0)]).write(path),
    "text.txt": lambda path: Continuation(b"\xff", b"b").write(path),
    "report.html": lambda path: write_text_atomically(path, "<html>"),
    "hydra.yaml": lambda path: hydra_patches._save_atomically(OmegaConf.create({"a": 1}), path.name, path.parent),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_takes_nothing_away(tmp_path, monkeypatch, name):
    """Whatever a run or a prediction writes, the file that was there stays until the new one is whole."""
    path = tmp_path / name
    path.write_bytes(b"what was there")
    # Later than anything is opened or written: where a file is written in its place, it is gone by then.
    monkeypatch.setattr(
        atomic_write.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
    )
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](path)
    assert path.read_bytes() == b"what was there" and os.listdir(tmp_path) == [name]
    monkeypatch.undo()
    WRITERS[name](path)
    assert path.stat().st_size > 0 and path.read_bytes() != b"what was there" and os.listdir(tmp_path) == [name]


def test_hydra_writes_by_ours():
    """The name by which Hydra writes its files is still the one that the command line replaces."""
    assert callable(hydra.core.utils._save_config)


def test_a_pipe_is_written_to(tmp_path):
    """A pipe or a device, such as /dev/null, is not a file that could be replaced."""
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, lambda stream: stream.write(b"x"))
    reader.join(10)
    assert read == [b"x"] and pipe.is_fifo()


def test_leftovers_are_those_of_a_run(tmp_path):
    """What a kill leaves of a run's files goes, at any depth; a user's own hidden files stay."""
    gone = [".best.ckpt.sf4l308q", ".config.yaml.________", ".a.b.png.00000000", ".report.html.abcdefgh"]
    stay = [".hidden.ckpt", ".notes.txt.original", "a.json.abcdefgh", ".x.json.ABCDEFGH", ".x.json.abcdefghi"]
    (tmp_path / "deep").mkdir()
    for name in gone + stay:
        (tmp_path / "deep" / name).touch()
    # Another run may be at work below.
    (tmp_path / "deep" / "other" / ".hydra").mkdir(parents=True)
    (tmp_path / "deep" / "other" / gone[0]).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path / "deep")) == sorted([*stay, "other"])
    assert (tmp_path / "deep" / "other" / gone[0]).exists()
