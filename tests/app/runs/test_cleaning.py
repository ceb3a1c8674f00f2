"""The removal of runs: nothing goes without --yes, nothing of a running run, and no file that is not lightkit's."""

from __future__ import annotations

import os

import pytest
from support.runs import make_run

from lightkit._util.directory_lock import hold, release
from lightkit.app.runs import command
from lightkit.errors import ConfigError
from lightkit.runs import find_removals, find_runs, remove


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    for number, loss in enumerate((0.5, 0.1, 0.3)):
        make_run(runs / "x" / f"done{number}", 1e9 + number, {"val/loss": loss})
    make_run(runs / "x" / "failed", error="E: x")
    make_run(runs / "x" / "killed")
    make_run(runs / "x" / "empty", checkpoints=())
    return runs


def left(root):
    return sorted(path.name for path in (root / "x").iterdir())


def call(capsys, *words):
    capsys.readouterr()
    status = command.main(["clean", *words])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        (["--failed"], ["failed"]),
        (["--killed"], ["empty", "killed"]),
        (["--empty"], ["empty"]),
        (["--failed", "--empty", "--name", "x"], ["empty", "failed"]),
        (["--failed", "--name", "y"], []),
    ],
)
def test_whole_runs(root, capsys, words, gone):
    """Without --yes the runs are named and stay; with it they go."""
    before = left(root)
    status, out, _ = call(capsys, *words)
    assert status == 0 and left(root) == before
    assert all(f"runs/x/{name}" in out for name in gone)
    assert ("--yes removes it" in out) == bool(gone)
    assert call(capsys, *words, "--yes")[0] == 0 and left(root) == [name for name in before if name not in gone]


def test_checkpoints(root, capsys):
    """The best runs keep their checkpoints, and all runs their figures and reports."""
    assert "4.0 MB removed" in call(capsys, "--keep-checkpoints", "1", "--yes")[1]
    kept = sorted(path.parent.parent.name for path in root.rglob("best.ckpt"))
    assert kept == ["done1", "failed", "killed"]
    assert len(list(root.rglob("report.html"))) == 3 and len(left(root)) == 6
    assert call(capsys, "--keep-checkpoints", "1", "--yes")[1] == "there is nothing to remove\n"
    with pytest.raises(ConfigError, match="no run has the metric 'q'"):
        find_removals(find_runs(root).runs, keep_checkpoints=1, metric="q")


def test_files_of_others(root, capsys, tmp_path):
    """A run that wrote to a directory with other files loses its own files alone; links are not followed."""
    directory = root / "x" / "failed"
    (directory / "thesis.tex").write_text("years of work")
    make_run(directory / "inner", metrics={"val/loss": 1.0})
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.ckpt").touch()
    (directory / "tensorboard").symlink_to(outside)
    other = root / "x" / "empty"
    (other / "checkpoints").symlink_to(outside)
    status, out, _ = call(capsys, "--failed", "--empty", "--yes")
    assert status == 0 and "kept inner, thesis.tex" in out
    assert sorted(os.listdir(directory)) == ["inner", "thesis.tex"] and os.listdir(other) == ["checkpoints"]
    assert (outside / "a.ckpt").exists() and (directory / "inner" / "report.html").exists()


def test_a_running_run(root, capsys):
    """A run that is running, or that begins to run after it was found, stays; so do the jobs of a running sweep."""
    found = find_removals(find_runs(root).runs, ["failed", "killed"])
    make_run(root / "x" / "sweep" / "0", error="E: x")
    for place in (root / "x" / "failed", root / "x" / "killed", root / "x" / "sweep"):
        assert hold(place)
    try:
        assert [
            removal.run.directory.name for removal in find_removals(find_runs(root).runs, ["failed", "killed"])
        ] == ["empty"]
        for removal in found:
            if removal.run.directory.name != "empty":
                with pytest.raises(ConfigError, match="is running: nothing of it was removed"):
                    remove(removal)
    finally:
        for place in (root / "x" / "failed", root / "x" / "killed", root / "x" / "sweep"):
            release(place)
    assert "failed" in left(root) and "killed" in left(root)


def test_states(root):
    """Finished runs are not removed by a misspelt state."""
    with pytest.raises(ConfigError, match="runs that are finished are not removed"):
        find_removals(find_runs(root).runs, ["finished"])
