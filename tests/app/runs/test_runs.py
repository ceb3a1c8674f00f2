"""The table of runs: states, figures, differences and filters, and records that somebody has damaged."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.commands import run_python
from support.runs import make_run

from lightkit._util.directory_lock import hold, release
from lightkit._util.printable import printable
from lightkit.app.runs import command
from lightkit.app.runs.summary import larger_is_better, read_summary
from lightkit.errors import ConfigError, DataError
from lightkit.runs import compare_runs, find_runs, resolve_runs, select_runs, sort_runs

EVIL = "<b>\x1b[2J\u202e\n=cmd()"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Runs of every state, some of them of a sweep."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    figures = {"val/loss": 0.5, "test/accuracy": 0.9, "wall_seconds": 3.0}
    make_run(runs / "x" / "a", 1e9, figures, config={"tags": ["one", "two"]})
    make_run(runs / "x" / "b", 1e9 + 1, {**figures, "val/loss": 0.25, "test/accuracy": None}, {"optim": {"lr": 0.2}})
    make_run(runs / "x" / "c", 1e9 + 2, error="RuntimeError: no\nmore", config={"tags": "one"})
    make_run(runs / "x" / "sweep" / "0", 1e9 + 3, losses=(3.0, 1.5), job="j")
    make_run(runs / "y" / "d", 1e9 + 4, {**figures, "val/loss": 0.1}, {"name": "y", "seed": 7})
    return runs


def names(runs):
    return [run.directory.name for run in runs]


def test_find_runs(root):
    """All runs are found, the newest first, each with its state and figures, or those that it logged last."""
    runs = {run.directory.name: run for run in find_runs(root).runs}
    assert list(runs) == ["d", "0", "c", "b", "a"]
    assert {name: run.state for name, run in runs.items()} == {
        **{"a": "finished", "b": "finished", "c": "failed", "0": "killed", "d": "finished"}
    }
    assert runs["0"].metrics == {"val/loss": 1.5} and runs["0"].sweep == "j"
    assert runs["c"].error == "RuntimeError: no" and runs["c"].tags == ["one"]
    assert runs["b"].value("test/accuracy") is None and runs["b"].value("val/loss") == 0.25


def test_a_running_run(root):
    """A run is running while a process holds its directory, and not merely unfinished."""
    directory = root / "x" / "sweep" / "0"
    assert hold(directory)
    assert read_summary(directory).state == "running"
    release(directory)
    script = f"from pathlib import Path; from lightkit._util.directory_lock import hold; hold(Path({str(directory)!r}))"
    script += "; print(1, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as other:
        other.stdout.readline()
        assert read_summary(directory).state == "running"
        other.communicate(b"\n")
    assert read_summary(directory).state == "killed"


def test_filters(root):
    """Names, states and tags choose runs, and a metric sorts them, the best first and those without it last."""
    runs = find_runs(root).runs
    assert names(select_runs(runs, name="x")) == ["0", "c", "b", "a"]
    assert names(select_runs(runs, name="[xy]", states=["finished"])) == ["d", "b", "a"]
    assert names(select_runs(runs, tags=["one"])) == ["c", "a"] and names(select_runs(runs, tags=["one", "two"])) == [
        "a"
    ]
    assert names(sort_runs(runs, "val/loss")) == ["d", "b", "a", "c", "0"][:2] + ["a", "c", "0"]
    assert names(sort_runs(runs, "test/accuracy")) == ["d", "a", "0", "c", "b"]
    with pytest.raises(ConfigError, match="state 'done' is none of running, finished, failed, killed"):
        select_runs(runs, states=["done"])
    with pytest.raises(
        ConfigError, match="no run has the metric 'val/los'; there are started, name, test/accuracy, val"
    ):
        sort_runs(runs, "val/los")


@pytest.mark.parametrize(
    ("metric", "larger"),
    [
        *(("val/loss", False), ("test/mae", False), ("test/mape", False), ("val/perplexity", False), ("x", False)),
        *(("val/accuracy", True), ("test/top5_accuracy", True), ("val/F1", True), ("train/images_per_second", True)),
    ],
)
def test_larger_is_better(metric, larger):
    """The direction of a metric comes from its name, or from the checkpoints that are chosen by it."""
    assert larger_is_better(metric) == larger
    checkpoints = {"callbacks": {"checkpoint": {"monitor": metric, "mode": "min" if larger else "max"}}}
    assert larger_is_better(metric, checkpoints) != larger


def test_compare(root):
    """A comparison has the settings that differ and the figures of every run, named by the end of its path."""
    runs = resolve_runs(["a", "x/b", str(root / "y" / "d")], root)
    comparison = compare_runs(runs)
    assert comparison.settings == {"seed": ["0", "0", "7"], "optim.lr": ["0.1", "0.2", "0.1"]}
    assert comparison.metrics["val/loss"] == [0.5, 0.25, 0.1]
    for words, message in ((["nothing"], "names no run below"), ([""], "names no run"), (["sweep"], "names no run")):
        with pytest.raises(ConfigError, match=message):
            resolve_runs(words, root)
    make_run(root / "y" / "a")
    with pytest.raises(ConfigError, match=r"'a' names several runs: .*/x/a"):
        resolve_runs(["a"], root)


def call(capsys, *words):
    capsys.readouterr()
    status = command.main(words)
    return status, *capsys.readouterr()


def test_formats(root, capsys):
    """The table, JSON and CSV have a row for each run with what differs from the others."""
    status, out, _ = call(capsys)
    assert status == 0 and len(out.splitlines()) == 6 and "optim.lr=0.2" in out.splitlines()[4]
    (first, *_) = json.loads(call(capsys, "--sort", "val/loss", "--format", "json")[1])
    assert first["run"] == "y/d" and first["val/loss"] == 0.1 and first["state"] == "finished"
    rows = list(csv.DictReader(io.StringIO(call(capsys, "--name", "x", "--format", "csv")[1])))
    assert [row["state"] for row in rows] == ["killed", "failed", "finished", "finished"]
    assert rows[2]["differs"] == "optim.lr=0.2" and rows[3]["tags"] == "one;two"
    assert len(call(capsys, "--limit", "2")[1].splitlines()) == 3
    assert call(capsys, "--name", "nobody")[1] == "there are no such runs\n"
    assert "wall_seconds" in call(capsys, "list", "--metrics", "wall_seconds,none")[1].splitlines()[0]


def test_compare_command(root, capsys):
    """The command prints the comparison, and writes the page with the curves of the runs."""
    status, out, _ = call(capsys, "compare", "a", "b", "--page", "new/c.html")
    assert (
        status == 0 and ["optim.lr", "0.1", "0.2"] in [line.split() for line in out.splitlines()] and "val/loss" in out
    )
    page = Path("new/c.html").read_text()
    assert 'href="./../runs/x/a/report.html"' in page and '"name": "loss"' in page
    assert {row[""] for row in json.loads(call(capsys, "compare", "a", "b", "--format", "json")[1])} >= {"optim.lr"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--root", "none"], "there is no directory none"),
        (["compare", "a", "q"], "'q' names no run below runs"),
        (["clean"], "say what to remove: --failed"),
        (["clean", "--keep-checkpoints", "-1"], "keep_checkpoints must be 0 or more, got -1"),
        (["--state", "x"], "state 'x' is none of"),
        (["sweep", "none"], "there is no directory none"),
    ],
)
def test_errors(root, capsys, words, message):
    """A wrong word is one line of error that names it."""
    status, out, err = call(capsys, *words)
    assert status == 1 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


DAMAGE = ["", "{", "[]", "null", '"x"', "\udcff", "[" * 100_000, "NaN"]


@pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_records(root, capsys, content):
    """A damaged record is skipped with a line; damaged figures are none."""
    (root / "x" / "a" / ".hydra" / "run.json").write_text(content, errors="surrogateescape")
    (root / "x" / "b" / "metrics.json").write_text(content, errors="surrogateescape")
    (root / "y" / "d" / "metrics.csv").write_text(content, errors="surrogateescape")
    status, out, err = call(capsys)
    assert status == 0 and err.count("\n") == 1 and "skipped: " in err and "x/a/.hydra/run.json is damaged" in err
    assert len(out.splitlines()) == 5
    with pytest.raises(DataError):
        read_summary(root / "x" / "a")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("started", "config", "overrides", "job", "is_finished", "result", "error", "choices", "older")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=st.dictionaries(st.sampled_from(KEYS), values), figures=values)
def test_records_of_strangers(tmp_path, capsys, record, figures):
    """Whatever JSON a record has, the run is in the table, and nothing in it reaches the terminal as it is."""
    directory = tmp_path / "runs" / "x"
    (directory / ".hydra").mkdir(parents=True, exist_ok=True)
    (directory / ".hydra" / "run.json").write_text(json.dumps(record))
    (directory / "metrics.json").write_text(json.dumps(figures))
    for form in ("table", "json", "csv"):
        status, out, err = call(capsys, "--root", str(tmp_path / "runs"), "--format", form)
        assert (status, err) == (0, "") and out
        if form == "table":
            assert printable(out, keep="\n") == out
    assert call(capsys, "compare", "x", "x", "--root", str(tmp_path / "runs"))[0] == 0


def test_names_of_strangers(tmp_path, monkeypatch, capsys):
    """Names of directories and metrics are texts."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / EVIL, metrics={EVIL: 1.0, "val/loss": 2.0}, config={"name": EVIL, EVIL: EVIL})
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "runs")
    _, out, _ = call(capsys, "--metrics", EVIL)
    assert len(out.splitlines()) == 2 and all(line.isprintable() for line in out.splitlines())
    assert call(capsys, "compare", f"runs/{EVIL}", f"runs/{EVIL}", "--page", "p.html")[0] == 0
    assert "<b>\x1b" not in Path("p.html").read_text()


def test_the_example_of_the_documentation(root, capsys):
    """The program in docs/report.md runs, and finds the best run."""
    page = (Path(__file__).parents[3] / "docs" / "report.md").read_text()
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    assert capsys.readouterr().out == "runs/x/b 0.25 {'optim.lr': ['0.2', '0.1']}\n"


def test_no_torch(root):
    """The table and the versions import neither torch nor Hydra, so that they are there in a moment."""
    code = (
        "import sys; from lightkit.runs import main; main(['--limit', '1']); main(['clean', '--failed']); "
        "main(['compare', 'a', 'b', '--page', 'p.html']); main(['sweep', 'runs/x/sweep'])\n"
        "try: main(['--version'])\nexcept SystemExit: pass\n"
        "print({'torch', 'hydra', 'lightning', 'matplotlib', 'omegaconf', 'yaml', 'numpy'} & set(sys.modules))"
    )
    assert run_python("-c", code, cwd=root.parent, status=0).stdout.splitlines()[-1] == "set()"
