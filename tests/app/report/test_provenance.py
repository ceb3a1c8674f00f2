"""Where a run comes from, as its report tells."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace

import pytest

from lightkit._util.working_copy import git_state
from lightkit.app.report import page
from lightkit.app.run_records import Run
from lightkit.app.runs.siblings import find_siblings

EVIL = "<script>alert(1)</script>"


def make(directory, started=1e9, losses=(2.0, 1.0), config=None, **options):
    run = Run(directory, started, {"name": "x", "optim": {"lr": 0.1}, **(config or {})}, **options)
    run.write()
    (directory / "metrics.csv").write_text("step,val/loss\n" + "".join(f"{i},{v}\n" for i, v in enumerate(losses)))
    (directory / "environment.json").write_text('{"git": {"commit": "abc123", "branch": "main", "is_dirty": true}}')
    (directory / "config.yaml").write_text("name: x\n")
    os.utime(directory / ".hydra" / "run.json", (started, started))
    return run


def test_page(tmp_path):
    """The page has the command with its quotes, the commit, links to what exists, and the runs beside it."""
    own = make(tmp_path / "b", overrides=["+experiment=cnn", "name=a b", f"data.path='{EVIL}'"])
    (own.directory / "checkpoints").mkdir()
    (own.directory / "checkpoints" / f"{EVIL.replace('/', '')}.ckpt").touch()
    (own.directory / "tensorboard").mkdir()
    other = make(tmp_path / f"a {EVIL.replace('/', '')}", config={"optim": {"lr": 0.2}}, is_finished=True)
    (other.directory / "report.html").touch()
    make(tmp_path / "c", error="RuntimeError: no")
    html = page.render(own.directory, {"test/loss": 1.0}, [])
    assert "python -m lightkit.train +experiment=cnn &#x27;name=a b&#x27;" in html
    assert "<code>abc123</code> on main, with changes that are not committed" in html
    assert 'href="./checkpoints/%3Cscript%3E' in html and 'href="./tensorboard/"' in html
    assert 'href="./../a%20%3Cscript%3Ealert%281%29%3Cscript%3E/report.html"' in html
    assert "c (failed)" in html and "finished; optim.lr=0.2" in html
    assert EVIL not in html and "config.yaml" in html and "train.log" not in html


def test_siblings(tmp_path):
    """The newest runs of the same name, or of the same sweep, are siblings; links, strangers and damage are not."""
    runs = [make(tmp_path / str(number), 1e9 + number) for number in range(12)]
    make(tmp_path / "other", config={"name": "y"})
    (tmp_path / "link").symlink_to(tmp_path / "3")
    (tmp_path / "file").touch()
    (tmp_path / "5" / ".hydra" / "run.json").write_text("{")
    (tmp_path / "7" / "metrics.csv").unlink()
    found = find_siblings(runs[11].directory, 4)
    assert [run.directory.name for run in found] == ["10", "9", "8", "6"]
    sweep = [
        make(tmp_path / "sweep" / str(number), config={"name": f"n{number}"}, job="j" if number else "k")
        for number in range(3)
    ]
    assert [run.directory.name for run in find_siblings(sweep[1].directory)] == ["2"]
    assert find_siblings(replace(runs[0], directory=tmp_path / "none").directory) == []


def git(directory, *words):
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.invalid")
    subprocess.run(["git", *identity, *words], cwd=directory, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_state(tmp_path, monkeypatch):
    """The state has the commit, and is dirty if a tracked file differs; a new file does not count."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_state() is None
    git(tmp_path, "init", "-q", "-b", "main")
    assert git_state() is None
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "one")
    (tmp_path / "new").touch()
    state = git_state()
    assert (state["branch"], state["is_dirty"], len(state["commit"])) == ("main", False, 40)
    (tmp_path / "a").write_text("2")
    git(tmp_path, "checkout", "-q", "--detach")
    # The repository's own settings may name a program, which must not run.
    git(tmp_path, "config", "core.fsmonitor", f"touch {tmp_path}/ran")
    assert git_state() == {"commit": state["commit"], "branch": None, "is_dirty": True}
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() is None
