"""No run or sweep writes to the directory of another one, whether it has ended or not."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from omegaconf import OmegaConf
from support.commands import run, the_error

from lightkit.app.run_directories import check_free, is_named_by_time, make_new, remove_unbegun
from lightkit.errors import ConfigError

# A name that is the same at each start, and is made of the time.
YEAR = "out/${now:%Y}"
QUICK = ["+experiment=cnn", "+debug=quick", "test=false", "logger=csv"]


def files(directory):
    """Returns a digest of each file below a directory by its path."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_names_of_runs_that_start_at_once(tmp_path):
    """Processes that take the same name at the same moment get different directories."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make_new, [tmp_path / "a" / "12-00-00"] * 24))
    assert len(set(made)) == 24 and all(path.is_dir() for path in made)
    assert {path.name for path in made} == {"12-00-00", *(f"12-00-00_{number}" for number in range(2, 25))}


@pytest.mark.parametrize(
    ("directory", "name", "expected"),
    [
        ("runs/${name}/${now:%H}", "x", True),
        ("runs/${name}", "x-${now:%H}", True),
        ("runs/${name}", "x", False),
        ("${name}", "${hydra.run.dir}", False),
        ("out", "x", False),
    ],
)
def test_is_named_by_time(directory, name, expected):
    """A name of one's own is rejected where a name of the time gets a number; a loop of keys ends."""
    config = OmegaConf.create({"name": name, "hydra": {"run": {"dir": directory}}})
    assert is_named_by_time(config, "hydra.run.dir") is expected


@pytest.mark.parametrize(
    ("names", "is_removed"),
    [
        ([".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"], True),
        ([".hydra/config.yaml", ".hydra/run.json"], False),
        ([".hydra/config.yaml", "notes.txt"], False),
        (["notes.txt"], False),
    ],
)
def test_what_is_unbegun(tmp_path, names, is_removed):
    """The directory of a job without a run goes; one with a record, or with anything of a user, stays as it is."""
    directory = tmp_path / "run"
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    (directory / "train.log").touch()
    remove_unbegun(directory)
    assert directory.exists() is not is_removed
    assert is_removed or len(files(directory)) == len(names) + 1


def test_a_log_is_kept(tmp_path):
    """A log with content says why the job failed."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "train.log").write_text("a line")
    remove_unbegun(tmp_path)
    assert (tmp_path / "train.log").exists()


@pytest.mark.parametrize("words", [["test=off"], ["kfold=1", "hydra.run.dir=mine"], ["ckpt_path=last"]])
def test_an_error_before_the_run_leaves_no_directory(tmp_path, words):
    """A value that is rejected after the composition leaves nothing that looks like a run."""
    the_error(run("train", *QUICK, *words, cwd=tmp_path))
    assert files(tmp_path) == {} and not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("names", "is_free"),
    [
        ([], True),
        (["notes.txt", "checkpoints/notes.txt"], True),
        ([".hydra/run.json", "config.yaml", "environment.json"], True),
        (["config.yaml"], False),
        (["metrics.json"], False),
        ([".hydra/run.json", "metrics.csv"], False),
        (["checkpoints/epoch=3.ckpt"], False),
    ],
)
def test_what_is_another_run(tmp_path, names, is_free):
    """A failed attempt may be repeated in its directory; a directory with results or with a user's files may not."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("something")
    (tmp_path / "report.html").touch()
    check_free("run_dir", tmp_path, str(tmp_path / "checkpoints" / "last.ckpt"))
    if is_free:
        check_free("run_dir", tmp_path, "elsewhere.ckpt")
        return
    for checkpoint in (None, "elsewhere.ckpt"):
        with pytest.raises(ConfigError, match="holds another run already"):
            check_free("run_dir", tmp_path, checkpoint)


def test_the_next_free_name(call, tmp_path):
    """A second run whose name of the time is taken gets a directory of its own, and leaves the first as it was."""
    arguments = [*QUICK, f"hydra.run.dir={YEAR}"]
    assert call("train", *arguments, cwd=tmp_path).returncode == 0
    (first,) = (tmp_path / "out").iterdir()
    before = files(first)
    assert call("train", *arguments, "seed=1", cwd=tmp_path).returncode == 0
    assert files(first) == before
    assert json.loads((tmp_path / "out" / f"{first.name}_2" / ".hydra" / "run.json").read_text())["is_finished"]


def test_another_run_is_not_overwritten(call, tmp_path):
    """A directory that holds a run is rejected before Hydra writes there, except for a resumption of that run."""
    assert call("train", *QUICK, "hydra.run.dir=out", cwd=tmp_path).returncode == 0
    before = files(tmp_path / "out")
    for arguments in (
        ["hydra.run.dir=out", "seed=1"],
        ["run_dir=out"],
        ["hydra.run.dir=out", "ckpt_path=elsewhere.ckpt"],
    ):
        assert "=out holds another run already (metrics.json" in the_error(
            call("train", *QUICK, *arguments, cwd=tmp_path)
        )
        assert files(tmp_path / "out") == before
    # A run that was rejected leaves no directory.
    assert not (tmp_path / "runs" / "cnn").exists() or not os.listdir(tmp_path / "runs" / "cnn")
    for epochs, checkpoint in enumerate(("out/checkpoints/last.ckpt", "last"), start=2):
        arguments = ["hydra.run.dir=out", f"ckpt_path={checkpoint}", f"trainer.max_epochs={epochs}"]
        assert call("train", *QUICK, *arguments, cwd=tmp_path).returncode == 0
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["epochs"] == epochs


@pytest.mark.slow
def test_sweeps(tmp_path):
    """A sweep whose name of the time is taken gets another one; a directory of its own must hold no run."""
    one = [*QUICK, "-m", "seed=1"]
    for _ in range(2):
        run("train", *one, f"hydra.sweep.dir={YEAR}", cwd=tmp_path, status=0)
    first, second = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert second == f"{first}_2" and (tmp_path / "out" / second / "0" / "metrics.json").exists()
    before = files(tmp_path / "out" / first)
    result = run("train", *one, f"hydra.sweep.dir=out/{first}", "optim.lr=0.1", cwd=tmp_path)
    assert f"hydra.sweep.dir=out/{first} holds a run already" in the_error(result)
    assert files(tmp_path / "out" / first) == before
