"""Sweeps on the command line: each trial runs once, with the same values in all processes, and the best is known."""

from __future__ import annotations

import json
import math
import os
from importlib.util import find_spec

import pytest
import yaml
from support.commands import run, run_python, the_error, with_modules

pytestmark = pytest.mark.slow

QUICK = ["+experiment=cnn", "+debug=quick", "test=false", "optim=sgd", "logger=none", "hydra.sweep.dir=sweep"]
WITNESS = ["trainer.accelerator=cpu", "+callbacks.witness._target_=witness.Witness"]
OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "+hydra.sweeper.sampler.seed=1"]
GRID = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid"]

needs_optuna = pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="needs the extra sweep"
)


def sweep(directory, *arguments, status=0):
    """Runs a sweep with the callback `witness.Witness` in each job."""
    return run("train", *QUICK, *WITNESS, *arguments, cwd=directory, environment=with_modules("witness"), status=status)


def trials(directory, processes):
    """Returns the records of rank 0 of each trial, after a check that all ranks trained once with the same values."""
    found = []
    numbers = sorted(p.name for p in (directory / "sweep").iterdir() if p.is_dir())
    assert numbers == [str(i) for i in range(len(numbers))]
    for number in numbers:
        files = sorted((directory / "sweep" / number).glob("rank*.jsonl"))
        assert [file.name for file in files] == [f"rank{rank}.jsonl" for rank in range(processes)]
        entries = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        assert [len(lines) for lines in entries] == [1] * processes
        first = entries[0][0]
        assert all(lines[0] == first for lines in entries)
        assert first["world_size"] == processes
        config = yaml.safe_load((directory / "sweep" / number / "config.yaml").read_text())
        assert (config["optim"]["lr"], config["seed"]) == (first["lr"], first["seed"])
        found.append(first)
    return found


def best(directory):
    return yaml.safe_load((directory / "sweep" / "optimization_results.yaml").read_text())


def several(processes):
    return [] if processes == 1 else [f"trainer.devices={processes}", "strategy=ddp"]


@pytest.mark.parametrize("processes", [1, 2])
def test_hydras_own(tmp_path, processes):
    """Hydra's basic sweeper runs each combination once and needs no objective."""
    sweep(tmp_path, *several(processes), "objective=nothing", "-m", "optim.lr=0.01,0.02", "seed=5")
    assert [(trial["lr"], trial["seed"]) for trial in trials(tmp_path, processes)] == [(0.01, 5), (0.02, 5)]


@needs_optuna
@pytest.mark.parametrize("processes", [1, 2])
def test_optuna(tmp_path, processes):
    """Optuna draws values from an interval, the same for all processes, and keeps the one with the lowest loss."""
    result = sweep(tmp_path, *several(processes), *OPTUNA, "-m", "optim.lr=tag(log,interval(0.0001,0.01))")
    found = trials(tmp_path, processes)
    values = [trial["lr"] for trial in found]
    assert len(set(values)) == 2 and all(0.0001 <= value <= 0.01 for value in values)
    winner = min(found, key=lambda trial: trial["objective"])
    assert best(tmp_path)["best_params"] == {"optim.lr": winner["lr"]}
    assert best(tmp_path)["best_value"] == pytest.approx(winner["objective"])
    assert "alembic" not in result.stdout + result.stderr


@needs_optuna
def test_optunas_grid_with_a_trial_that_diverges(tmp_path):
    """Optuna's grid runs each point once; a NaN loss counts as the worst for either direction."""
    sweep(tmp_path, *GRID, "-m", "optim.lr=0.01,1e30")
    found = trials(tmp_path, 1)
    assert sorted(trial["lr"] for trial in found) == [0.01, 1e30]
    assert sum(math.isnan(trial["objective"]) for trial in found) == 1
    assert best(tmp_path)["best_params"] == {"optim.lr": 0.01}
    sweep(tmp_path, *GRID, "hydra.sweeper.direction=maximize", "hydra.sweep.dir=up", "-m", "optim.lr=0.01,1e30")
    assert yaml.safe_load((tmp_path / "up" / "optimization_results.yaml").read_text())["best_params"] == {
        "optim.lr": 0.01
    }


@needs_optuna
def test_optuna_under_torchrun(tmp_path):
    """torchrun's first process asks for the trials, and all processes train each trial."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lightkit.train"]
    arguments = [*torchrun, *QUICK, *WITNESS, "strategy=ddp", *GRID, "-m", "seed=3,4"]
    run_python(*arguments, cwd=tmp_path, environment=with_modules("witness"), status=0)
    found = trials(tmp_path, 2)
    winner = min(found, key=lambda trial: trial["objective"])
    assert sorted(trial["seed"] for trial in found) == [3, 4]
    assert best(tmp_path)["best_params"] == {"seed": winner["seed"]}


@needs_optuna
@pytest.mark.parametrize("processes", [1, 2])
def test_no_such_objective(tmp_path, processes):
    """After the first trial one error line names the wrong key and the file with the known metrics."""
    result = sweep(tmp_path, *several(processes), *OPTUNA, "objective=val/los", "-m", "seed=1,2", status=1)
    assert "objective=val/los: the job has logged no such metric" in the_error(result)
    assert len(trials(tmp_path, processes)) == 1


def test_without_optuna(tmp_path):
    """The error says which package to install."""
    # None in sys.modules makes the import fail as if the package were not installed.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['hydra_plugins.hydra_optuna_sweeper'] = None\n")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    arguments = ["-m", "lightkit.train", "+experiment=cnn", "hydra/sweeper=optuna", "-m", "seed=1,2"]
    error = the_error(run_python(*arguments, cwd=tmp_path, environment=environment))
    assert error == "error: hydra/sweeper=optuna needs a package that is not installed: pip install -e '.[sweep]'"


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=fork"]], ids=["basic", "fork"])
def test_page_of_a_sweep(tmp_path, launcher):
    """A sweep leaves a page with every job, marks the best one, and the reports of the jobs link to it."""
    words = ["+experiment=cnn", "+debug=quick", "trainer.accelerator=cpu", "hydra.sweep.dir=sweep", *launcher]
    run("train", *words, "-m", "seed=0,1", cwd=tmp_path, status=0)
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert "2 finished" in page and page.count('class="best"') == 1 and 'href="./1/report.html"' in page
    assert 'href="../sweep.html"' in (tmp_path / "sweep" / "0" / "report.html").read_text().replace("./..", "..")
    # A job that fails is in the page, too.
    words = ["+experiment=language_model", "hydra.sweep.dir=failed", *launcher]
    assert run("train", *words, "-m", "data.path=a.txt,b.txt", cwd=tmp_path).returncode == 1
    assert "1 failed" in (tmp_path / "failed" / "sweep.html").read_text()
