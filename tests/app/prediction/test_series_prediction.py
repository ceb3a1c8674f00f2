"""Forecasts of a table of the user: how it is read, and advice that names keys of the command at hand."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from omegaconf import OmegaConf
from support.series import write_wave

from lightkit.app import prediction
from lightkit.app.evaluation import evaluate
from lightkit.app.factory import build_task
from lightkit.app.prediction.request import COLUMN_FIELDS, TABLE_FIELDS, PredictionRequest
from lightkit.app.restore import RestoredTask
from lightkit.data import Series
from lightkit.data.advice import advise, settings_named
from lightkit.errors import ConfigError, DataError


def restored_with(**options):
    """Returns an untrained forecaster whose training file was read with ``options``."""
    torch.manual_seed(0)
    data = {"_target_": "lightkit.data.Series", "path": "nowhere.csv", "history": 4, "horizon": 2, **options}
    config = OmegaConf.create(
        {
            "model": {"_target_": "lightkit.models.RNN", "input_size": 1, "hidden_size": 4, "num_outputs": 2},
            "task": {"_target_": "lightkit.tasks.ForecastTask", "horizon": 2},
            "optim": {"_target_": "lightkit.optim.Adam", "_partial_": True},
            "data": data,
        }
    )
    return RestoredTask(OmegaConf.to_container(config), build_task(config).eval(), {})


@pytest.fixture
def predict(tmp_path):
    """Returns a function that forecasts the file with some content."""

    def call(content, restored=None, **keys):
        (tmp_path / "v.csv").write_bytes(content.encode() if isinstance(content, str) else content)
        request = PredictionRequest(str(tmp_path / "v.csv"), **keys)
        return prediction.predict(restored or restored_with(), request)

    return call


PLAIN = "x\n1.5\n2.5\n3.5\n4.5\n5.5\n"


def steps(forecast):
    return [(step.forecast, step.lower, step.upper) for step in forecast.steps]


def test_a_file_of_another_country_has_the_same_forecast(predict, capsys):
    """A German file has the forecast of the plain one, and one line says how it was read."""
    expected = steps(predict(PLAIN))
    assert capsys.readouterr().out == ""
    german = "Größe;x\na;1,5\na;2,5\na;3,5\na;4,5\na;5,5\n"
    assert steps(predict(german.encode("cp1252"))) == expected
    assert capsys.readouterr().out == "v.csv: cp1252, separated by semicolons, decimal commas\n"


def test_settings_of_training_hold_and_keys_go_before_them(predict):
    """The file is read as the training file was, except for what a key says."""
    ambiguous = "x;t\n1,234;a\n2,345;b\n3,456;c\n4,567;d\n"
    trained = restored_with(decimal="comma")
    assert steps(predict(ambiguous, trained)) == steps(predict("x\n1.234\n2.345\n3.456\n4.567\n"))
    assert steps(predict(ambiguous, trained, decimal="point")) == steps(predict("x\n1234\n2345\n3456\n4567\n"))
    gaps = "x\n1.5\n\n3.5\n4.5\n5.5\n"
    assert steps(predict(gaps, missing="interpolate")) == steps(predict(PLAIN))
    assert steps(predict(gaps, missing="drop")) == steps(predict("x\n1.5\n3.5\n4.5\n5.5\n"))


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ("x\n1\n\n3\n4\n5\n", "missing=interpolate fills gaps, missing=drop leaves them out"),
        ("day,x\n2020-01-01,1\n2020-01-02,1\n2020-01-03,1\n2020-01-05,1\n2020-01-06,1\n", "missing=interpolate fills"),
        ("x,y\n1,2\n", "column=NAME"),
        ("x;y\n1,234;a\n", "decimal=comma or decimal=point"),
        ("day;x\n01/02/2020;1\n", "day_first=true or day_first=false"),
        ("1\n2\n", "header=false takes it for values"),
        ("title\na;b\n1;2\n", "skip_lines=1 leaves out"),
        ("x\n1,5\n", "separator=semicolon reads"),
        (b"\x8d\xe9", "encoding=NAME names"),
    ],
)
def test_advice_names_keys_of_the_command(predict, tmp_path, content, advice):
    """Each key that an error of a table proposes is one of predict; in training the keys are those below data."""
    with pytest.raises(DataError) as error:
        predict(content)
    assert advice in str(error.value) and "data." not in str(error.value)
    name = advice.partition("=")[0]
    assert name in {field.name for field in fields(PredictionRequest)}
    assert name in OmegaConf.load("conf/predict.yaml") and name in OmegaConf.load("conf/data/series.yaml")
    with settings_named("data."), pytest.raises(DataError) as error:
        Series(path=str(tmp_path / "v.csv"), history=4, horizon=2).setup()
    assert f"data.{name}=" in str(error.value)


def test_advice_is_named_for_each_command(monkeypatch):
    """Without a command the settings are arguments; evaluate, which has none of them, refers to the training."""
    assert advise("missing=drop") == "missing=drop"
    with settings_named("data."):
        assert advise("missing=drop") == "data.missing=drop"
    assert advise("missing=drop") == "missing=drop"

    def restore(*arguments, **options):
        raise DataError(advise("missing=drop"))

    monkeypatch.setattr("lightkit.app.ensembles.restore", restore)
    with pytest.raises(DataError, match=r"^training with data\.missing=drop$"):
        evaluate("x.ckpt")


def test_keys_of_a_series_are_for_series_alone():
    """Every key of a table is among those of the request, and of no other kind of task."""
    assert set(COLUMN_FIELDS + TABLE_FIELDS) <= {field.name for field in fields(PredictionRequest)}
    with pytest.raises(ConfigError, match="horizon must be from 1 to 2, got 3"):
        prediction.predict(restored_with(), PredictionRequest("x.csv", horizon=3))


def test_train_names_its_keys(call, tmp_path):
    """An error of the training's file names keys of train, on the command line."""
    write_wave(tmp_path / "wave.csv", 60, row7="NA")
    arguments = ["+experiment=forecast", "data=series", "data.path=wave.csv", "data.column=price", "data.history=12"]
    result = call("train", *arguments, "data.horizon=4", "trainer.accelerator=cpu", cwd=tmp_path)
    assert result.returncode == 1
    expected = "line 9 is a gap, 'NA' (1 in all); data.missing=interpolate fills gaps, data.missing=drop leaves"
    assert expected in result.stderr, result.stderr
