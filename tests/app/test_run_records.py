"""The search for the run that ``ckpt_path=last`` resumes, by the records of the runs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightkit.app import run_records
from lightkit.app.run_records import Run
from lightkit.app.run_search import config_differences, find_last, find_unfinished
from lightkit.errors import CheckpointError

CONFIG = {
    "data": {"_target_": "lightkit.data.MNIST5k", "seed": "${seed}", "share": float("nan")},
    "model": {"width": 8},
    "task": {"loss": {"_target_": "X"}},
    "seed": 0,
    "optim": {"lr": 0.1},
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Returns a function that makes runs below runs/x, each newer than the previous one."""
    monkeypatch.chdir(tmp_path)
    made = []

    def run(name, checkpoints=("last.ckpt",), **options):
        config = {**CONFIG, **options.pop("config", {})}
        new = Run(tmp_path / "runs" / "x" / name, 1e9 + len(made), config, **options)
        new.write()
        made.append(new)
        for age, file in enumerate(checkpoints):
            path = new.directory / "checkpoints" / file
            path.parent.mkdir(exist_ok=True)
            # A file without a checksum cannot be damaged.
            path.write_bytes(b"old format")
            os.utime(path, (2e9 - age, 2e9 - age))
        return new

    return run


def mine(**options):
    return Run(Path("new").absolute(), 2e9, {**CONFIG, **options.pop("config", {})}, **options)


def found(*arguments):
    return find_last(*arguments).relative_to(Path("runs/x").absolute()).as_posix()


def test_the_newest_of_the_same_kind(make):
    """The newest run with equal identity keys wins, jobs of sweeps included; other keys may differ."""
    make("old")
    make("sweep/0", config={"optim": {"lr": 9}})
    make("sweep/1", config={"seed": 1})
    make("quick", choices={"debug": "quick"})
    assert found(mine(), "x") == "sweep/0/checkpoints/last.ckpt"
    assert found(mine(config={"seed": 1}), "x") == "sweep/1/checkpoints/last.ckpt"
    assert found(mine(choices={"debug": "quick"}), "x") == "quick/checkpoints/last.ckpt"


@pytest.mark.parametrize("result", [None, 0.25, float("nan"), float("inf"), -float("inf")])
def test_records_are_json(make, result):
    """Every reader of JSON takes a record, which keeps an objective that is no number."""
    run = replace(make("a", config={"optim": {"lr": float("inf")}}), result=result)
    run.write()
    text = (run.directory / ".hydra" / "run.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    json.loads(text, parse_constant=pytest.fail)
    again = run_records.read(run.directory).result
    assert (again is None) if result is None else repr(again) == repr(result)


def test_earlier_records_of_nan(make):
    """A record whose configuration has JSON's extension NaN, as written once, is that of the same job."""
    path = make("a").directory / ".hydra" / "run.json"
    path.write_text(path.read_text().replace('"nan"', "NaN"))
    assert found(mine(), "x") == "a/checkpoints/last.ckpt"


def test_compared_before_interpolation(make):
    """A different interpolation is a different configuration even if both resolve to the same value."""
    make("a")
    with pytest.raises(CheckpointError, match=r'runs/x/a: data\.seed="\$\{seed\}" there and 0 here$'):
        find_last(mine(config={"data": {**CONFIG["data"], "seed": 0}}), "x")


def test_all_that_differs_is_named(make):
    """The error lists in one line the differences of the nearest run, missing keys included."""
    make("far", config={"seed": 5, "model": {"width": 9, "depth": 2}})
    make("near", config={"model": {"width": 8, "name": "a\nb"}})
    make("nothing to go on from", checkpoints=(), config={"seed": 3})
    with pytest.raises(CheckpointError) as error:
        find_last(mine(), "x")
    assert str(error.value).endswith(r'the nearest is runs/x/near: model.name="a\nb" there and null here')
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("checkpoints", "expected"),
    [
        (["last.ckpt", "best.ckpt"], "last"),
        (["best.ckpt", "last.ckpt"], "best"),
        (["best.ckpt"], "best"),
        (["epoch=3.ckpt"], "epoch=3"),
    ],
)
def test_the_newest_checkpoint(make, checkpoints, expected):
    """The newest checkpoint wins, whatever its name."""
    make("a", checkpoints)
    assert found(mine(), "x") == f"a/checkpoints/{expected}.ckpt"


def test_damaged_checkpoints(make, capsys):
    """The search skips a damaged checkpoint and prints a message."""
    run = make("a", ["last.ckpt", "best.ckpt"])
    last = run.directory / "checkpoints" / "last.ckpt"
    last.write_bytes(b"")
    os.utime(last, (2e9, 2e9))
    assert found(mine(), "x") == "a/checkpoints/best.ckpt"
    assert capsys.readouterr().err == "runs/x/a/checkpoints/last.ckpt is damaged (it is empty): it is passed over\n"


def test_without_a_checkpoint(make):
    """The search skips a run without a checkpoint; if no other run fits, the error says so."""
    make("first", checkpoints=())
    with pytest.raises(
        CheckpointError, match=r"runs/x/first has the same .*, but no checkpoint .* leave ckpt_path out"
    ):
        find_last(mine(), "x")
    make("second")
    make("third", checkpoints=())
    assert found(mine(), "x") == "second/checkpoints/last.ckpt"
    with pytest.raises(CheckpointError, match=r"there is no last\.ckpt below .*runs/y"):
        find_last(mine(), "y")


def test_jobs_of_a_sweep(make):
    """A job of a sweep resumes no job of its own sweep, and no run with another value of a swept key."""
    make("one/0", job="one", config={"optim": {"lr": 1}}, choices={"scheduler": "none"})
    make("one/1", job="one", config={"optim": {"lr": 2}}, choices={"scheduler": "step"})
    make("two/0", job="two", config={"optim": {"lr": 1}}, choices={"scheduler": "none"})
    job = mine(job="two", config={"optim": {"lr": 1}}, choices={"scheduler": "none"})
    for swept in ("optim.lr", "+optim.lr", "scheduler"):
        assert found(job, "x", [swept]) == "one/0/checkpoints/last.ckpt"
    with pytest.raises(CheckpointError, match=r"same .* init_from and optim\.lr; .*: optim\.lr=2 there and 3 here"):
        find_last(replace(job, config={**CONFIG, "optim": {"lr": 3}}), "x", ["optim.lr"])


def test_a_group_that_is_swept():
    """The choice of a swept group counts, and other values of the group do not."""
    one, other = mine(choices={"optim": "sgd"}), mine(choices={"optim": "sgd"}, config={"optim": {"lr": 7}})
    assert config_differences(one, other, ["optim"]) == []
    assert config_differences(one, replace(other, choices={"optim": "adam"}), ["optim"]) == [
        ("optim", '"sgd"', '"adam"')
    ]


def test_unfinished(make):
    """The function returns the newest run with a checkpoint, and None if that run is finished."""
    make("a")
    make("b", checkpoints=())
    assert find_unfinished(mine(), "x").directory.name == "a"
    make("c", config={"seed": 1})
    assert find_unfinished(mine(), "x").directory.name == "a"
    make("d", is_finished=True)
    assert find_unfinished(mine(), "x") is None


def test_runs_of_the_first_edition(tmp_path, monkeypatch):
    """For a run of the first edition Hydra's files replace the record, and ``wall_seconds`` marks its end."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "x" / "a"
    (run / ".hydra").mkdir(parents=True)
    for name, content in {
        "config": {**CONFIG, "run_dir": "${hydra:runtime.output_dir}"},
        "hydra": {"hydra": {"runtime": {"choices": {"debug": "quick", "hydra/sweeper": "basic"}}}},
        "overrides": ["seed=0"],
    }.items():
        OmegaConf.save(OmegaConf.create(content), run / ".hydra" / f"{name}.yaml")
    (run / "last.ckpt").write_bytes(b"old format")
    assert found(mine(choices={"debug": "quick"}), "x") == "a/last.ckpt"
    assert not run_records.read(run).is_finished
    (run / "metrics.json").write_text('{"val/loss": 1}')
    assert not run_records.read(run).is_finished
    (run / "metrics.json").write_text('{"wall_seconds": 1}')
    assert run_records.read(run).is_finished
    # A full disk leaves an empty file.
    (run / ".hydra" / "config.yaml").write_text("")
    assert run_records.read(run) is None


def test_older_checkpoints_are_not_its_own(make):
    """A run does not own the checkpoints that an earlier run wrote to its directory."""
    run = make("a")
    time = (run.directory / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    replace(run, older=time).write()
    with pytest.raises(CheckpointError, match="but no checkpoint to go on from"):
        find_last(mine(), "x")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"started": 1, "config": {}, "surprise": 1}'])
def test_a_damaged_record(make, content):
    """A damaged record counts as none."""
    run = make("a")
    (run.directory / ".hydra" / "run.json").write_text(content)
    assert run_records.read(run.directory) is None
