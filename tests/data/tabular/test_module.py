"""The data module of a table: targets, splits, batches, the state in a checkpoint, and simple rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.rows import public_frame, write_customers, write_public, write_rows
from support.trainers import bare_trainer

from lightkit.data import TableDataModule, sizes_for
from lightkit.data.tabular import frame_to_table
from lightkit.errors import DataError
from lightkit.models import MLP
from lightkit.tasks import ClassificationTask, RegressionTask


def module(path, target, **options):
    """Returns a data module after its setup."""
    data = TableDataModule(str(path), target, **options)
    data.setup()
    return data


@pytest.mark.parametrize(
    ("cells", "classes"),
    [
        (["yes", "no"], ("no", "yes")),
        (["TRUE", "FALSE"], ("FALSE", "TRUE")),
        (["0", "1"], ("0", "1")),
        # pandas writes whole numbers with gaps so.
        (["0.0", "1.0"], ("0", "1")),
        (["10", "9", "8"], ("8", "9", "10")),
        (["01", "02"], ("01", "02")),
        ([str(number) for number in range(60)], None),
        (["1.5", "2.5"], None),
        (["1,5 €", "2,5 €"], None),
    ],
)
def test_the_target_decides_between_classes_and_numbers(tmp_path, cells, classes):
    """Texts, truth values and few whole numbers are classes in their order; other numbers are a regression."""
    rows = [f"{row % 7};{cells[row % len(cells)]}" for row in range(60)]
    data = module(write_rows(tmp_path / "t.csv", "a;y", rows), "y")
    assert data.classes == classes
    assert data.task_name() == ("regression" if classes is None else "classification")
    assert data.model_sizes()["num_outputs"] == (1 if classes is None else len(classes))


def test_kind_decides_against_the_rule(tmp_path):
    """`kind` makes classes of few numbers with decimals, and numbers of few whole ones."""
    path = write_rows(tmp_path / "k.csv", "a,y", [f"{row % 7},{row % 3}" for row in range(60)])
    assert module(path, "y", kind="regression").classes is None
    path = write_rows(tmp_path / "l.csv", "a,y", [f"{row % 7},{row % 3}.5" for row in range(60)])
    assert module(path, "y", kind="classification").classes == ("0.5", "1.5", "2.5")


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        (["", "NA"], {}, "column y has no value to predict"),
        (["x"], {}, "column y has only the value 'x': two are needed"),
        (["2020-01-01", "2021-01-01"], {}, "column y has dates; a target has classes or numbers"),
        (
            [f"name {row}" for row in range(40)],
            {},
            r"40 different values in 40 rows, too many .*regression",
        ),
        (["a", "b"], {"kind": "regression"}, "line 2, column y: 'a' is not a number; kind=classification takes"),
        (["a", "b"], {"target": "Y"}, "target=Y: .* has no such column; it has a, y"),
        (["a", "b"], {"target": None}, "target=COLUMN must name the column to predict; .* has a, y"),
        (
            ["a", "b"],
            {"validation_size": 30, "test_size": 10},
            "40 rows, too few .* validation_size=30, test_size=10",
        ),
        (["a", "b"], {"validation_size": -1}, "validation_size must be a share from 0 to below 1 or a whole number"),
        (["a", "b"], {"test_size": 1.5}, "test_size must be a share"),
        (["a", "b"], {"kind": "classes"}, "kind must be classification or regression, got 'classes'"),
        (["a", "b"], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (["a", "b"], {"time_column": "a"}, "column a: .* is not a time like"),
    ],
)
def test_errors_name_the_column_and_what_helps(tmp_path, cells, options, message):
    """What cannot be predicted, or split, is one line that names the column or the argument."""
    path = write_rows(tmp_path / "e.csv", "a,y", [f"{row % 7 or ''},{cells[row % len(cells)]}" for row in range(40)])
    with pytest.raises(DataError, match=message):
        module(path, **{"target": "y", **options})


def test_rows_without_a_target_are_left_out(tmp_path, capsys):
    """A gap in the target is no class and no number: the row is left out, and one line says how many."""
    rows = [f"{row % 7},{'' if row % 10 == 0 else row * 1.5}" for row in range(60)]
    data = module(write_rows(tmp_path / "g.csv", "a,y", rows), "y")
    assert sum(len(data._part(name)[0]) for name in ("train", "validation", "test")) == 54
    assert "6 rows without a value of y left out" in capsys.readouterr().out


def test_splits_are_stratified_seeded_and_disjoint(tmp_path):
    """Each part has the mix of the classes; the seed of the run does not change it; a rare class is in the training."""
    rows = [f"{row},{row % 7},{('a', 'a', 'a', 'b')[row % 4] if row else 'rare'}" for row in range(201)]
    path = write_rows(tmp_path / "s.csv", "id,a,y", rows)
    one = module(path, "y", columns=["id", "a"], seed=1)
    parts = [one._part(name) for name in ("train", "validation", "test")]
    ids = [set(part[0][:, 0].tolist()) for part in parts]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 201
    assert all(0.22 < float((part[-1] == 1).double().mean()) < 0.28 for part in parts)
    assert [int((part[-1] == 2).sum()) for part in parts] == [1, 0, 0]
    other, moved = module(path, "y", columns=["id", "a"], seed=2), module(path, "y", columns=["id", "a"], split_seed=1)
    assert torch.equal(one._part("test")[0], other._part("test")[0])
    assert not torch.equal(one._part("test")[0], moved._part("test")[0])


def test_a_split_in_the_order_of_time(tmp_path):
    """With `time_column` the test has the last times, wherever their rows stand in the file."""
    order = np.random.default_rng(0).permutation(60)
    rows = [f"2024-{1 + day // 28:02d}-{1 + day % 28:02d},{day / 2}" for day in order]
    data = module(write_rows(tmp_path / "t.csv", "day,y", rows), "y", time_column="day")
    latest = [data._part(name)[-1] for name in ("train", "validation", "test")]
    assert latest[0].max() < latest[1].min() and latest[1].max() < latest[2].min()


def test_a_test_file_is_encoded_by_the_training(tmp_path, capsys):
    """`test_path` gives the test; its statistics are not used, and a class that the training lacks is an error."""
    path = write_rows(tmp_path / "a.csv", "a,y", [f"{row},{row % 2}" for row in range(0, 120, 3)])
    test = write_rows(tmp_path / "b.csv", "y,a", ["1,1000", "0,2000", ",5"])
    data = module(path, "y", test_path=str(test), columns=["a"])
    assert data._part("test")[-1].tolist() == [1, 0] and data._part("test")[0].min() > 10
    assert "b.csv: 1 row without a value of y left out" in capsys.readouterr().out
    write_rows(test, "y,a", ["2,1"])
    with pytest.raises(DataError, match=r"b\.csv, line 2, column y: '2' is none of the classes of the training: 0, 1"):
        module(path, "y", test_path=str(test))


def test_a_restored_encoding_reads_another_file_alone(tmp_path):
    """With the state of a checkpoint and a test file, the training file is not needed; an own file gives its test."""
    path = write_customers(tmp_path / "c.csv")
    data = module(path, "leaves")
    again = TableDataModule(str(path), "leaves")
    again.load_state_dict(data.state_dict())
    again.setup()
    assert all(map(torch.equal, again._part("test"), data._part("test")))
    other = TableDataModule(str(tmp_path / "gone.csv"), "leaves", test_path=str(path))
    other.load_state_dict(data.state_dict())
    other.setup("test")
    assert len(other._part("test")[0]) == 200 and other.classes == ("no", "yes")


def test_a_changed_table_does_not_resume(tmp_path):
    """A training goes on with the table with which it began; another one is an error before the first step."""
    path = write_customers(tmp_path / "c.csv")
    state = module(path, "leaves").state_dict()
    module(path, "leaves").load_state_dict(state)
    write_customers(path, seed=1)
    with pytest.raises(DataError, match="is not the table with which the training began"):
        module(path, "leaves").load_state_dict(state)


@pytest.mark.parametrize("name", ["breast_cancer", "diabetes"])
def test_public_tables_are_learnt(name):
    """The perceptron beats the mean or the majority on public data, and so does the linear rule."""
    torch.manual_seed(0)
    data = TableDataModule.from_frame(public_frame(name), "target")
    model = MLP(**sizes_for(MLP, data), hidden_sizes=[32])
    optimizer = torch.optim.AdamW
    if data.task_name() == "classification":
        task = ClassificationTask(model, lambda parameters: optimizer(parameters, lr=0.01))
    else:
        task = RegressionTask(model, 1, lambda parameters: optimizer(parameters, lr=0.01))
    trainer = bare_trainer(max_epochs=8)
    trainer.fit(task, datamodule=data)
    *inputs, target = data._part("test")
    task.eval()
    with torch.no_grad():
        predicted = task.predict_step((*inputs, target), 0)
    rules = data.baselines()
    if name == "diabetes":
        assert (predicted[:, 0] - target).abs().mean() < 0.8 * rules["mean_mae"] and rules["linear_mae"] < 50
    else:
        assert (predicted.argmax(dim=1) == target).double().mean() > 0.93
        assert rules["majority_accuracy"] < 0.7 and rules["linear_accuracy"] > 0.9


def test_rules_of_tables_with_categories():
    """The linear rule reads categories: a target that a category decides is predicted without error."""
    pandas = pytest.importorskip("pandas")
    names = ["a", "b", "c"] * 40
    frame = pandas.DataFrame({"c": names, "y": [{"a": 1.25, "b": 7.5, "c": -3.0}[name] for name in names]})
    data = TableDataModule.from_frame(frame, "y")
    data.setup()
    rules = data.baselines()
    assert rules["linear_mae"] < 0.02 < rules["mean_mae"]


def test_a_test_part_is_needed_for_a_test(tmp_path):
    """Without test rows a training is possible, and a test is one line."""
    path = write_public(tmp_path / "iris.csv", "iris")
    data = module(path, "target", test_size=0, validation_size=0)
    assert len(data.train_dataloader().tensors[0]) == 150 and data.val_dataloader() == []
    with pytest.raises(DataError, match="test_size=0 leaves no rows for the test; test=false"):
        data.test_dataloader()


def test_a_frame_without_rows_is_an_error():
    """An empty frame has nothing to read."""
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="x has 0 rows and 2 columns"):
        frame_to_table(pandas.DataFrame({"a": [], "b": []}))
