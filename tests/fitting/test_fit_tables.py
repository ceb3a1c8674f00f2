"""`lightkit.fit` on DataFrames and files of tables."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.rows import public_frame, write_customers, write_public

import lightkit
from lightkit.errors import ConfigError, DataError, LightkitError


def test_a_frame_with_gaps_and_categories_is_learnt_saved_and_loaded(tmp_path):
    """A DataFrame needs no preparation; the saved file encodes later frames as the fit did."""
    frame = public_frame("iris")
    frame["colour"] = np.where(np.arange(150) % 3 == 0, "red", None)
    frame.loc[3:9, "sepal width (cm)"] = np.nan
    torch.manual_seed(0)
    result = lightkit.fit("mlp", frame, y="target", epochs=15, class_weight="balanced", verbose=False)
    assert result.classes == ("setosa", "versicolor", "virginica")
    assert result.evaluate(frame)["accuracy"] > 0.9 and set(result.evaluate()) == {"loss", "accuracy"}
    result.save(tmp_path / "model.ckpt")
    loaded = lightkit.load(tmp_path / "model.ckpt")
    turned = frame[frame.columns[::-1]].drop(columns="target")
    assert np.array_equal(loaded.predict(turned), result.predict(frame))
    assert loaded.evaluate(frame) == pytest.approx(result.evaluate(frame))
    with pytest.raises(DataError, match="x has no column colour, from which the model predicts"):
        loaded.predict(frame.drop(columns="colour"))


def test_a_file_and_a_model_of_ones_own(tmp_path):
    """A path and the name of a column are enough; a module gets the numbers of a row."""
    path = write_public(tmp_path / "diabetes.csv", "diabetes")
    result = lightkit.fit(torch.nn.Linear(10, 1), path, y="target", epochs=1, verbose=False, run_dir=tmp_path / "run")
    assert result.classes is None and result.predict(str(path)).shape == (442, 1)
    named = lightkit.fit("mlp", str(path), y="target", loss="mae", epochs=1, verbose=False)
    assert set(named.evaluate()) == {"loss", "mae", "rmse"}


def test_values_of_y_and_the_loss_that_decides():
    """`y` may be values beside the frame, which stays as it is; a loss by name says what few whole numbers are."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.arange(60.0) % 7, "y": np.arange(60) % 5})
    result = lightkit.fit("mlp", frame, y=np.arange(60) % 2, epochs=1, verbose=False)
    assert result.classes == ("0", "1") and list(frame.columns) == ["a", "y"]
    assert lightkit.fit("mlp", frame, y="y", loss="mse", epochs=1, verbose=False).classes is None


def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch):
    """The programs in docs/data.md about tables run as they stand there."""
    monkeypatch.chdir(tmp_path)
    content = write_customers(tmp_path / "new.csv").read_text()
    (tmp_path / "customers.csv").write_text(content.replace("leaves", "cancelled", 1))
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page.partition("## Rows of a table")[2], re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names: dict = {}
        exec(block.replace("max_epochs=20", "max_epochs=2, accelerator='cpu'"), names)
    assert names["data"].classes == ("no", "yes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": None}, "y must be the name of the column of x to predict, or its values"),
        ({"y": "b"}, "target=b: x has no such column; it has a, y"),
        ({"y": [1, 2]}, r"y must have one value for each of the 60 rows of x, got shape \(2,\)"),
        ({"y": "y", "model": "cnn"}, "model='cnn' does not take the rows of a table; model='mlp' does"),
        ({"y": "y", "validation": (1, 2)}, "validation must be a share from 0 to below 1 for a table, got tuple"),
        ({"x": "t.csv", "y": None}, "y must be the name of the column of t.csv to predict, got NoneType"),
        ({"x": "t.csv", "y": "y"}, "t.csv cannot be read"),
        ({"y": "y", "loss": "mse", "class_weight": "balanced"}, "class_weight is for labels, and y has numbers"),
    ],
)
def test_arguments_that_do_not_fit_a_table(arguments, message):
    """Each wrong argument for a table is one line that says what was expected."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.arange(60.0) % 7, "y": np.arange(60) % 2})
    with pytest.raises(LightkitError, match=message) as error:
        lightkit.fit(**{"model": "mlp", "x": frame, "epochs": 1, "verbose": False, **arguments})
    assert isinstance(error.value, (ConfigError, DataError))
