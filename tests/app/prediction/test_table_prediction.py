"""Predictions for rows of a table, with the encoding that a checkpoint has."""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch
from support.rows import write_rows

from lightkit.app import prediction
from lightkit.app.prediction.request import PredictionRequest
from lightkit.app.restore import RestoredTask
from lightkit.data import TableDataModule, sizes_for
from lightkit.errors import CheckpointError, ConfigError, DataError
from lightkit.models import MLP
from lightkit.tasks import ClassificationTask, RegressionTask


@pytest.fixture
def restored(tmp_path):
    """Returns a function that makes the untrained task of a table with a target of the given cells."""

    def make(cells):
        rows = [f"{row % 7 / 4};{'ab'[row % 2]};{cells[row % len(cells)]}" for row in range(60)]
        path = write_rows(tmp_path / "train.csv", "x;c;y", rows)
        data = TableDataModule(str(path), "y")
        data.setup()
        torch.manual_seed(0)
        model = MLP(**sizes_for(MLP, data))
        task = ClassificationTask(model) if data.classes else RegressionTask(model)
        config = {
            "data": {"_target_": "lightkit.data.TableDataModule", "path": str(path), "target": "y"},
            "model": {"_target_": "lightkit.models.MLP", **data.model_sizes()},
        }
        config["model"].pop("num_classes", None)
        path.unlink()
        state = copy.deepcopy(data.state_dict())
        return RestoredTask(config, task.eval(), {"TableDataModule": state})

    return make


def test_batches_and_settings_do_not_change_predictions(restored, tmp_path):
    """A batch size, another separator, and the order of the columns give the same predictions for the same rows."""
    task = restored(["u", "v", "w"])
    plain = write_rows(tmp_path / "p.csv", "c,x", ["a,0.25", "b,", ",1.5", "z,0.75"])
    other = write_rows(tmp_path / "q.csv", "x|c", ["0,25|a", "|b", "1,5|", "0,75|z"])
    one = prediction.predict(task, PredictionRequest(str(plain)))
    two = prediction.predict(task, PredictionRequest(str(other), batch_size=1, decimal="comma"))
    assert torch.allclose(one.values, two.values) and one.predicted() == two.predicted()
    assert list(one.lines) == ["line 2", "line 3", "line 4", "line 5"]
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        prediction.predict(task, PredictionRequest(str(plain), batch_size=0))


def test_a_single_row_is_read_as_the_training_was(restored, tmp_path, capsys):
    """A German row alone leaves its decimal mark open: that of the training decides, as for the target's classes."""
    task = restored(["1,5", "2,25", "3,125"])
    path = write_rows(tmp_path / "one.csv", "x;c", ["1,125;a"])
    predicted = prediction.predict(task, PredictionRequest(str(path)))
    expected = task.build_data().encode(write_rows(tmp_path / "two.csv", "x,c", ["1.125,a"]))
    assert torch.allclose(predicted.values, task.task.predict_step((*expected, None), 0))
    predicted.show()
    assert "predictions of y" in capsys.readouterr().out


def test_files_have_a_row_for_each_row(restored, tmp_path):
    """CSV and JSON have the same rows; names of classes with quotes and commas stay whole."""
    task = restored(['"u,1"', "v"])
    path = write_rows(tmp_path / "p.csv", "c,x", ["a,0.25", "b,1"])
    predicted = prediction.predict(task, PredictionRequest(str(path)))
    predicted.write(tmp_path / "out.csv")
    predicted.write(tmp_path / "out.JSON")
    predicted.write(tmp_path / "out.jsonl")
    rows = list(csv.DictReader(open(tmp_path / "out.csv", newline="")))
    entries = json.loads((tmp_path / "out.JSON").read_text())
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == entries
    assert rows[0].keys() == {"row", "y", "probability", "probability of u,1", "probability of v"}
    assert [(row["y"], float(row["probability"])) for row in rows] == [
        (entry["prediction"], entry["probability"]) for entry in entries
    ]


@pytest.mark.parametrize("state", [None, {}, [], "x", {"encoding": None}, {"encoding": {"target": "y"}}])
def test_a_checkpoint_without_an_encoding_reads_no_file(restored, tmp_path, state):
    """Without an encoding nothing is predicted; above all, the file that a stranger's checkpoint names is not read."""
    task = restored(["u", "v"])
    write_rows(tmp_path / "train.csv", "x;c;y", ["secret"])
    task.checkpoint["TableDataModule"] = state
    path = write_rows(tmp_path / "p.csv", "c,x", ["a,0.25"])
    with pytest.raises(CheckpointError, match="which says how its columns are encoded"):
        prediction.predict(task, PredictionRequest(str(path)))


def test_a_model_and_an_encoding_that_do_not_fit(restored, tmp_path):
    """A checkpoint whose model has other sizes than its encoding is one line."""
    task = restored(["u", "v"])
    task.config["model"]["input_size"] = 9
    path = write_rows(tmp_path / "p.csv", "c,x", ["a,0.25"])
    with pytest.raises(CheckpointError, match=r"do not fit: model\.input_size is 9, but the table has 1"):
        prediction.predict(task, PredictionRequest(str(path)))


def test_a_table_without_rows_or_columns(restored, tmp_path):
    """A file with a header alone, and a missing input, are one line each."""
    task = restored(["u", "v"])
    path = write_rows(tmp_path / "p.csv", "c,x", [])
    with pytest.raises(DataError, match="has a header and no rows"):
        prediction.predict(task, PredictionRequest(str(path), header=True))
    with pytest.raises(ConfigError, match="input=PATH must say which tables"):
        prediction.predict(task, PredictionRequest())
