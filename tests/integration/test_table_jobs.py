"""Whole jobs on tables: training, evaluation and prediction on the command line."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from support.commands import run, the_error
from support.rows import write_customers, write_public, write_rows

pytestmark = pytest.mark.slow

SMALL = ["+experiment=table", "model.hidden_sizes=[16]", "logger=csv", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Returns the directory of a short classification job."""
    directory = tmp_path_factory.mktemp("customers")
    write_customers(directory / "customers.csv", rows=400)
    arguments = [*SMALL, "data.path=customers.csv", "data.target=leaves", "trainer.max_epochs=12", "hydra.run.dir=out"]
    run("train", *arguments, cwd=directory, status=0)
    return directory


def test_a_classification_and_its_report(job):
    """The model learns what a linear rule cannot, and the report has the confusion matrix."""
    metrics = json.loads((job / "out" / "metrics.json").read_text())
    assert metrics["test/accuracy"] > metrics["baseline/linear_accuracy"] > metrics["baseline/majority_accuracy"] - 0.1
    assert "train/rows_per_second" in metrics
    page = (job / "out" / "report.html").read_text()
    assert "Confusion matrix" in page and page.count('src="data:image/png;base64,') == 2
    assert "could not be made" not in page
    config = (job / "out" / "config.yaml").read_text()
    assert "lightkit.tasks.ClassificationTask" in config and "RegressionTask" not in config


def test_evaluate_gives_the_same_numbers(job, tmp_path):
    """The checkpoint alone gives the training's test metrics on its file, and measures all rows of another one."""
    best = job / "out" / "checkpoints" / "best.ckpt"
    run("evaluate", f"ckpt_path={best}", f"output={tmp_path}/own.json", "accelerator=cpu", cwd=job, status=0)
    own = json.loads((tmp_path / "own.json").read_text())
    trained = json.loads((job / "out" / "metrics.json").read_text())
    assert own == {name: trained[name] for name in own} and own.keys() >= {"test/accuracy", "test/loss"}
    write_customers(tmp_path / "other.csv", rows=60, seed=7)
    arguments = [f"ckpt_path={best}", "data_dir=other.csv", "output=other.json", "accelerator=cpu"]
    run("evaluate", *arguments, cwd=tmp_path, status=0)
    run("predict", f"ckpt_path={best}", "input=other.csv", "output=p.csv", cwd=tmp_path, status=0)
    predicted, true = (
        [row["leaves"] for row in csv.DictReader(open(tmp_path / name, newline=""))] for name in ("p.csv", "other.csv")
    )
    accuracy = sum(one == other for one, other in zip(predicted, true, strict=True)) / 60
    assert json.loads((tmp_path / "other.json").read_text())["test/accuracy"] == pytest.approx(accuracy)


def test_predict_a_file_of_other_columns(job, tmp_path):
    """Rows without a target, with columns in another order, get a class and probabilities, as CSV and as JSON."""
    pandas = pytest.importorskip("pandas")
    write_customers(tmp_path / "c.csv", rows=30, seed=3, target=False)
    frame = pandas.read_csv(tmp_path / "c.csv", dtype=str)[["since", "postcode", "plan", "region", "age"]]
    frame.loc[4, "plan"] = "gold"
    frame.to_csv(tmp_path / "c.csv", sep=";", index=False)
    best = job / "out" / "checkpoints" / "best.ckpt"
    result = run("predict", f"ckpt_path={best}", "input=c.csv", "output=p.csv", cwd=tmp_path, status=0)
    assert "c.csv: plan: 1 cell is unknown to the model or rare in its training (gold)" in result.stdout
    assert "predictions of leaves" in result.stdout and "and 10 more; output=FILE.csv has them all" in result.stdout
    run("predict", f"ckpt_path={best}", "input=c.csv", "output=p.json", cwd=tmp_path, status=0)
    rows = list(csv.DictReader(open(tmp_path / "p.csv", newline="")))
    entries = json.loads((tmp_path / "p.json").read_text())
    assert [row["row"] for row in rows] == [str(entry["row"]) for entry in entries] == list(map(str, range(1, 31)))
    for row, entry in zip(rows, entries, strict=True):
        assert row["leaves"] == entry["prediction"] == max(entry["probabilities"], key=entry["probabilities"].get)
        assert float(row["probability of yes"]) == entry["probabilities"]["yes"]
        assert sum(entry["probabilities"].values()) == pytest.approx(1)


def test_options_of_other_tasks_are_refused(job):
    """A key for series or images, and a file without the columns, are one line each."""
    best = job / "out" / "checkpoints" / "best.ckpt"
    for arguments, message in [
        (
            ["input=customers.csv", "horizon=3"],
            "horizon: the checkpoint is of a model for tables, these are",
        ),
        (["input=customers.csv", "sheet=x", "length=3"], "length: the checkpoint is of a model for tables"),
        ([], "input=PATH must say which table"),
        (["input=iris.csv"], "iris.csv has no column age, plan, region and 2 more, from which the model predicts"),
    ]:
        write_public(job / "iris.csv", "iris")
        assert message in the_error(run("predict", f"ckpt_path={best}", *arguments, cwd=job))


def test_a_regression_and_its_report(tmp_path):
    """The same experiment regresses where the target has numbers; the report compares it with simple rules."""
    write_public(tmp_path / "diabetes.csv", "diabetes")
    arguments = [*SMALL, "data.path=diabetes.csv", "data.target=target", "trainer.max_epochs=15", "hydra.run.dir=out"]
    run("train", *arguments, cwd=tmp_path, status=0)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["test/mae"] < 0.7 * metrics["baseline/mean_mae"] and metrics["test/r2"] > 0.3
    page = (tmp_path / "out" / "report.html").read_text()
    titles = ("Predicted and true", "Errors of the test", "Beside simple rules", "The largest errors")
    assert all(title in page for title in titles) and "could not be made" not in page
    best = "ckpt_path=out/checkpoints/best.ckpt"
    run("predict", best, "input=diabetes.csv", "output=p.csv", cwd=tmp_path, status=0)
    rows = list(csv.DictReader(open(tmp_path / "p.csv", newline="")))
    assert len(rows) == 442 and rows[0].keys() == {"row", "target"}
    run("evaluate", best, "output=own.json", "accelerator=cpu", cwd=tmp_path, status=0)
    own = json.loads((tmp_path / "own.json").read_text())
    assert own == {name: metrics[name] for name in own}


def test_a_resumed_training_is_that_of_one_run(tmp_path):
    """A training that ended within an epoch goes on with the same rows, to the same weights."""
    write_customers(tmp_path / "c.csv")
    arguments = [*SMALL, "data.path=c.csv", "data.target=leaves", "scheduler=none", "test=false"]
    # Dropout draws other numbers after a resumption, as in every job.
    arguments.append("model.dropout=0")
    run("train", *arguments, "trainer.max_epochs=3", "run_dir=whole", cwd=tmp_path, status=0)
    often = ["callbacks.checkpoint.monitor=null", "+callbacks.checkpoint.every_n_train_steps=2"]
    run("train", *arguments, *often, "trainer.max_steps=7", "run_dir=part", cwd=tmp_path, status=0)
    last = "ckpt_path=part/checkpoints/last.ckpt"
    run("train", *arguments, "trainer.max_epochs=3", last, "run_dir=rest", cwd=tmp_path, status=0)
    whole, resumed = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "rest")
    )
    # Five batches an epoch; the checkpoint is that of step 6.
    assert whole["global_step"] == resumed["global_step"] == 15
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())
    write_customers(tmp_path / "c.csv", seed=1)
    error = the_error(run("train", *arguments, "trainer.max_epochs=4", last, cwd=tmp_path))
    assert "c.csv is not the table with which the training began" in error


def test_two_processes_read_the_table_and_one_says_so(tmp_path):
    """With strategy=ddp each process serves its rows, and the lines about the table are printed once."""
    write_customers(tmp_path / "c.csv")
    arguments = [*SMALL, "data.path=c.csv", "data.target=leaves", "strategy=ddp", "trainer.devices=2"]
    result = run("train", *arguments, "trainer.max_epochs=2", "run_dir=out", cwd=tmp_path, status=0)
    assert result.stdout.count("predicts leaves (2 classes)") == 1
    assert "test/accuracy" in json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_what_does_not_fit_is_one_line(tmp_path):
    """A model, a task or a column that does not fit the table ends the job before the training, in one line."""
    write_rows(tmp_path / "t.csv", "a,b,y", [f"{row % 7},x{row % 3},{row / 2}" for row in range(60)])
    own = ["data.path=t.csv", "data.target=y"]
    for arguments, message in [
        (["data=csv", *own], "does not take; experiments for it: table"),
        (["+experiment=table", *own, "task=classification"], "asks for a regression: use task=table, or set data.kind"),
        (["+experiment=table", *own, "task=classification", "data.kind=regression"], "asks for a regression"),
        (["+experiment=table", *own, "data.target=z"], "data.target=z: t.csv has no such column; it has a, b, y"),
        (["+experiment=table", "data.path=t.csv"], "data.target=COLUMN must name the column to predict"),
        (["+experiment=table", "data.target=y"], "data.path=FILE must name the file of the table"),
        (["+experiment=table", *own, "model.input_size=5"], "model.input_size is 5, but the table has"),
        (["+experiment=table", *own, "data.test_size=0"], "data.test_size=0 leaves no rows for the test; test=false"),
        (["+experiment=table", *own, "trainer.precision=16-true"], "targets cannot be represented in half precision"),
        (["+experiment=table", "data=co2"], "the task is one of classification, regression, and CO2 has neither"),
    ]:
        assert message in the_error(run("train", *arguments, cwd=tmp_path)), arguments


def test_cross_validation_and_its_ensemble(tmp_path):
    """``kfold`` trains each fold in its own encoding; the directory of the run predicts and evaluates their mean."""
    write_customers(tmp_path / "c.csv", rows=120)
    arguments = [*SMALL, "data.path=c.csv", "data.target=leaves", "trainer.max_epochs=2", "kfold=3"]
    run("train", *arguments, "hydra.run.dir=out", cwd=tmp_path, status=0)
    folds = json.loads((tmp_path / "out" / "folds.json").read_text())["folds"]
    assert len(folds) == 3 and len({fold["metrics"]["val/loss"] for fold in folds}) == 3
    run("evaluate", "ckpt_path=out", "output=e.json", "accelerator=cpu", cwd=tmp_path, status=0)
    evaluated = json.loads((tmp_path / "e.json").read_text())
    for member, fold in zip(evaluated["members"], folds, strict=True):
        assert member["test/loss"] == pytest.approx(fold["metrics"]["test/loss"])
    # By convexity the loss of the mean is below the mean of the losses.
    assert evaluated["test/loss"] < sum(member["test/loss"] for member in evaluated["members"]) / 3
    shares = []
    for index, place in enumerate(["out", *(f"out/fold_{index}" for index in range(3))]):
        words = [f"ckpt_path={place}", "input=c.csv", f"output={index}.json"]
        run("predict", *words, cwd=tmp_path, status=0)
        entries = json.loads((tmp_path / f"{index}.json").read_text())
        shares.append(torch.tensor([entry["probabilities"]["yes"] for entry in entries]))
    assert torch.allclose(shares[0], torch.stack(shares[1:]).mean(dim=0), atol=1e-6)
