"""Several checkpoints in evaluate and predict: how they are named, what must agree, and what comes out."""

from __future__ import annotations

import copy
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.series import write_wave

from lightkit import evaluate, predict
from lightkit.app import untrusted
from lightkit.app.ensembles import combine, find_members, restore_members
from lightkit.checkpoints import CONFIG_KEY
from lightkit.errors import CheckpointError, ConfigError

CNN = {
    "data": {"_target_": "lightkit.data.MNIST5k", "layout": "image", "validation_size": 400},
    "model": {"_target_": "lightkit.models.CNN"},
    "task": {
        "_target_": "lightkit.tasks.ClassificationTask",
        "loss": {"_target_": "lightkit.nn.CrossEntropyLoss"},
        "metrics": {
            "accuracy": {
                "_target_": "torchmetrics.classification.MulticlassAccuracy",
                "num_classes": 10,
                "average": "micro",
            }
        },
    },
    "trainer": {"_target_": "lightning.pytorch.Trainer", "precision": "32-true"},
}
SERIES = {
    "data": {"_target_": "lightkit.data.Series", "path": "wave.csv", "column": "price", "history": 12, "horizon": 4},
    "model": {"_target_": "lightkit.models.RNN", "input_size": 1, "hidden_size": 4, "num_outputs": 4},
    "task": {"_target_": "lightkit.tasks.ForecastTask", "horizon": 4, "loss": {"_target_": "lightkit.nn.MSELoss"}},
}


def save(place, config, number, /, **data):
    """Writes a checkpoint with random weights."""
    config = copy.deepcopy(config)
    config["data"] |= data
    torch.manual_seed(number)
    model = untrusted.build("model", config["model"])
    node = {key: value for key, value in config["task"].items() if key not in ("loss", "metrics")}
    state = untrusted.build("task", node, model=model).state_dict()
    if "half_width" in state:
        state["half_width"] = torch.full((4,), 1.0 + number, dtype=torch.float64)
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, CONFIG_KEY: config}, place)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.fixture
def command(monkeypatch, capsys):
    """Returns a function that runs a command in this process and returns status, standard output and error."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        capsys.readouterr()
        return module.main(), *capsys.readouterr()

    return run


def touch(*paths):
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.ckpt", ["a.ckpt"]),
        ("[a.ckpt,b.ckpt]", ["a.ckpt", "b.ckpt"]),
        (" [ a.ckpt , 'b.ckpt' ] ", ["a.ckpt", "b.ckpt"]),
        ("a.ckpt,b.ckpt", ["a.ckpt", "b.ckpt"]),
        ("[a.ckpt]", ["a.ckpt"]),
        # A name may have commas and brackets: a path that exists is a path.
        ("[with,comma.ckpt,a.ckpt]", ["with,comma.ckpt", "a.ckpt"]),
        ("[x].ckpt", ["[x].ckpt"]),
        ("[a.ckpt,[x].ckpt]", ["a.ckpt", "[x].ckpt"]),
        # What is missing is named as it was typed; its own error follows.
        ("[a.ckpt,nowhere.ckpt]", ["a.ckpt", "nowhere.ckpt"]),
        ("nowhere,b.ckpt", ["nowhere,b.ckpt"]),
        ("run", ["run/checkpoints/best.ckpt"]),
        ("[run,a.ckpt]", ["run/checkpoints/best.ckpt", "a.ckpt"]),
        ("folds", [*(f"folds/fold_{n}/checkpoints/best.ckpt" for n in (0, 1, 2, 10))]),
        ("sweep", ["sweep/0/checkpoints/last.ckpt", "sweep/1/fold_0/checkpoints/best.ckpt"]),
    ],
)
def test_names_of_members(text, expected):
    """A value of ckpt_path names one file, a list of files, or the best checkpoints of a run, its folds or jobs."""
    touch("a.ckpt", "b.ckpt", "with,comma.ckpt", "[x].ckpt", "run/checkpoints/best.ckpt", "run/checkpoints/last.ckpt")
    touch(*(f"folds/fold_{n}/checkpoints/best.ckpt" for n in (0, 1, 2, 10)))
    touch("sweep/0/checkpoints/last.ckpt", "sweep/1/fold_0/checkpoints/best.ckpt")
    assert [str(path) for path in find_members(text)] == expected


def test_home_directory_within_a_list(monkeypatch, tmp_path):
    """The shell and Hydra leave ~ within brackets alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    touch("a.ckpt", "b.ckpt")
    assert find_members("[~/a.ckpt,~/b.ckpt]") == [tmp_path / "a.ckpt", tmp_path / "b.ckpt"]


def test_directories_without_members():
    """An empty directory, an unfinished sweep and an empty list are one line each."""
    Path("empty").mkdir()
    touch("s/0/checkpoints/best.ckpt")
    Path("s/sweep.json").write_text(json.dumps({"is_finished": False}))
    with pytest.raises(CheckpointError, match=r"empty is a directory without checkpoints/best\.ckpt"):
        find_members("empty")
    with pytest.raises(CheckpointError, match="s is unfinished: ckpt_path=last goes on"):
        find_members("s")
    with pytest.raises(ConfigError, match="empty list"):
        find_members("[]")


def test_evaluate_prints_each_and_the_ensemble(command):
    """The table has a row for each member, and the file has the metrics of the ensemble and of each member."""
    for seed in range(2):
        save(f"{seed}.ckpt", CNN, seed)
    status, out, err = command(evaluate, "ckpt_path=[0.ckpt,1.ckpt]", "output=out.json", "accelerator=cpu")
    assert status == 0, err
    content = json.loads(Path("out.json").read_text())
    assert [member["ckpt_path"] for member in content["members"]] == ["0.ckpt", "1.ckpt"]
    for number, member in enumerate(content["members"]):
        assert command(evaluate, f"ckpt_path={number}.ckpt", "output=one.json", "accelerator=cpu")[0] == 0
        alone = json.loads(Path("one.json").read_text())
        assert alone == {name: value for name, value in member.items() if name != "ckpt_path"}
    # By convexity the loss of the mean is below the mean of the losses.
    assert content["test/loss"] < sum(member["test/loss"] for member in content["members"]) / 2
    assert "members" in out and "ensemble of 2" in out and "1.ckpt" in out


def test_predict_writes_the_mean_of_probabilities(command):
    """The probability of the class in the file is the mean over the members."""
    for seed in range(3):
        save(f"{seed}.ckpt", CNN, seed)
    Image.effect_noise((28, 28), 90).save("picture.png")
    assert command(predict, "ckpt_path=[0.ckpt,1.ckpt,2.ckpt]", "input=picture.png", "output=out.csv")[0] == 0
    with open("out.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    pixels = torch.from_numpy(np.array(Image.open("picture.png"))).view(1, 1, 28, 28) / 255
    members = restore_members([Path(f"{seed}.ckpt") for seed in range(3)])
    mean = torch.stack([member.task.predict_step(pixels, 0) for member in members]).mean(dim=0)[0]
    assert (row["label"], float(row["probability"])) == (
        str(int(mean.argmax())),
        pytest.approx(mean.max().item(), rel=1e-4),
    )


def test_predict_writes_the_mean_of_forecasts_and_bounds(command):
    """Each bound in the file is the mean of the members' bounds; paths of the training may differ."""
    write_wave(Path("wave.csv"))
    for seed in range(2):
        save(f"{seed}.ckpt", SERIES, seed, path=f"{seed}.csv")
    forecasts = {}
    for name, value in {"0": "0.ckpt", "1": "1.ckpt", "both": "[0.ckpt,1.ckpt]"}.items():
        status, _, err = command(predict, f"ckpt_path={value}", "input=wave.csv", f"output={name}.csv")
        assert status == 0, err
        with open(f"{name}.csv", newline="") as file:
            forecasts[name] = [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]
    mean = (torch.tensor(forecasts["0"]) + torch.tensor(forecasts["1"])) / 2
    assert torch.allclose(torch.tensor(forecasts["both"]), mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ((CNN, {}), (SERIES, {}), "the task is ClassificationTask in the first and ForecastTask in the second"),
        ((SERIES, {}), (SERIES, {"history": 13}), "data.history is 12 in the first and 13 in the second"),
        ((SERIES, {}), (SERIES, {"column": "\x1b[31m"}), r"data.column is price in the first and \\x1b\[31m"),
        ((CNN, {}), (CNN, {"_target_": "lightkit.data.FashionMNIST"}), "data._target_ is lightkit.data.MNIST5k in the"),
    ],
)
def test_members_that_do_not_go_together(one, other, message):
    """Members of other tasks or data are refused in one line, which is safe to print."""
    for path, (config, data) in {"a.ckpt": one, "b.ckpt": other}.items():
        save(path, config, 0, **data)
    with pytest.raises(CheckpointError, match=message):
        restore_members([Path("a.ckpt"), Path("b.ckpt")])


def test_settings_that_change_no_test_set_may_differ():
    """Members of other batch sizes, seeds and validations make an ensemble."""
    save("a.ckpt", CNN, 0)
    save("b.ckpt", CNN, 1, batch_size=7, seed=3, validation_size=10)
    members = restore_members([Path("a.ckpt"), Path("b.ckpt")])
    assert len(combine(members).task.model.models) == 2
    assert combine(members[:1]) is members[0]


def test_a_missing_member(command):
    """The error names the file that is missing."""
    save("a.ckpt", CNN, 0)
    status, _, err = command(evaluate, "ckpt_path=[a.ckpt,nowhere.ckpt]")
    assert status == 1 and "nowhere.ckpt" in err.splitlines()[-1] and "a.ckpt,nowhere" not in err
