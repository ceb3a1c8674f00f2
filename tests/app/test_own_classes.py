"""A class of a user's in the place of lightkit's: which keys stay, and which parts are built."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from lightkit.app.factory import build_data, build_task, fill_class_counts
from lightkit.app.model_sizes import fill
from lightkit.app.own_classes import adapt
from lightkit.data import MNIST5k
from lightkit.errors import ConfigError


@pytest.fixture
def composed(monkeypatch):
    """Returns a function that composes a job and adapts it as the command does; it returns plain values."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "integration"))
    monkeypatch.setenv("LIGHTKIT_TARGETS", "strangers")
    before = HydraConfig.instance().cfg

    def run(*words, files=None):
        experiment = "rnn" if "experiment: rnn" in words else "cnn"
        words = [f"+experiment={experiment}", "run_dir=x", *(word for word in words if word != "experiment: rnn")]
        if files is not None:
            words.append(f"hydra.searchpath=[file://{files}]")
        with initialize_config_module("lightkit.conf", version_base="1.3"):
            config = compose("train", words, return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            with open_dict(config):
                del config["hydra"]
            adapt(config, "train")
        return config

    yield run
    HydraConfig.instance().cfg = before


def raw(config, key):
    node = OmegaConf.select(config, key)
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        (["model._target_=strangers.Net"], "model", {"_target_": "strangers.Net"}),
        (["model._target_=strangers.Net", "+model.width=3"], "model", {"_target_": "strangers.Net", "width": 3}),
        # The user's value stays, even if it is that of the file: the class says what it thinks of it.
        (
            ["model._target_=strangers.Net", "model.num_classes=10"],
            "model",
            {"_target_": "strangers.Net", "num_classes": 10},
        ),
        # A value of lightkit's own experiment goes with the class too.
        (["experiment: rnn", "model._target_=strangers.Net"], "model", {"_target_": "strangers.Net"}),
        (
            ["optim._target_=torch.optim.RMSprop", "optim.lr=0.1"],
            "optim",
            {"_target_": "torch.optim.RMSprop", "_partial_": True, "lr": 0.1},
        ),
        (
            ["scheduler=step", "scheduler._target_=torch.optim.lr_scheduler.ExponentialLR", "scheduler.gamma=0.9"],
            "scheduler",
            {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "_partial_": True, "gamma": 0.9},
        ),
        (["task.loss._target_=torch.nn.MultiMarginLoss"], "task.loss", {"_target_": "torch.nn.MultiMarginLoss"}),
        # The seed of the job is no setting of the replaced class.
        (["data._target_=strangers.Images"], "data", {"_target_": "strangers.Images", "seed": "${seed}"}),
        (
            ["callbacks.checkpoint._target_=lightning.pytorch.callbacks.ModelCheckpoint"],
            "callbacks.checkpoint",
            {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "${run_dir}/checkpoints"},
        ),
        (
            ["strategy=diloco", "strategy._target_=lightkit.strategies.LocalSGD"],
            "strategy",
            {"_target_": "lightkit.strategies.LocalSGD"},
        ),
        (["task._target_=strangers.Whole", "+task.lr=0.5"], "task", {"_target_": "strangers.Whole", "lr": 0.5}),
    ],
)
def test_the_keys_of_a_replaced_class_go(composed, words, key, expected):
    """A key that describes lightkit's class would be an argument that the user's class does not take."""
    assert raw(composed(*words), key) == expected


def test_a_metric_of_the_users_stays(composed):
    """Of a mapping with values of both, those of the user stay."""
    metric = {"_target_": "torchmetrics.classification.MulticlassF1Score", "num_classes": 10}
    words = [f"+task.metrics.f1.{key}={value}" for key, value in metric.items()]
    config = composed("task._target_=strangers.Whole", *words)
    assert raw(config, "task.metrics") == {"f1": metric}


def test_a_derived_class_keeps_the_keys(composed):
    """A class that derives from lightkit's takes its arguments, which the job has chosen."""
    config = composed("model._target_=strangers.Wider", "task._target_=strangers.Stricter")
    assert raw(config, "model") == {
        "_target_": "strangers.Wider",
        "in_channels": None,
        "num_classes": None,
        "image_size": None,
        "blocks": "fused",
    }
    assert set(raw(config, "task")) == {"_target_", "loss", "metrics"}


def test_values_of_a_users_file_stay(composed, tmp_path):
    """A file outside of lightkit is the user's: its values stay, also where they equal those of lightkit's file."""
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nmodel:\n  _target_: strangers.Net\n  width: 24\n  num_classes: 10\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    # The group of experiments is chosen already by the fixture.
    (tmp_path / "debug").mkdir()
    (tmp_path / "debug" / "mine.yaml").write_text(text)
    config = composed("+debug=mine", files=tmp_path)
    assert raw(config, "model") == {"_target_": "strangers.Net", "width": 24, "num_classes": 10}


def test_a_broken_reference_is_one_line(composed):
    """The error names the value, the word that has taken the key away, and both ways out."""
    expected = (
        r"trainer.max_epochs is \$\{model.num_classes\}, and model._target_=strangers.Net takes no model.num_classes: "
        r"set trainer.max_epochs=VALUE, or \+model.num_classes=VALUE"
    )
    with pytest.raises(ConfigError, match=expected):
        composed("model._target_=strangers.Net", "trainer.max_epochs='${model.num_classes}'")


def test_metrics_count_the_classes_of_the_data(composed):
    """The metric's number of classes came from a key of the replaced model."""
    config = composed("model._target_=strangers.Net")
    assert config.task.metrics.accuracy.num_classes is None
    fill_class_counts(config, MNIST5k())
    assert config.task.metrics.accuracy.num_classes == 10
    assert build_task(config).val_metrics["accuracy"].num_classes == 10


def test_data_without_a_number_of_classes(composed):
    """The error names the key of the metric, and how to leave the metric out."""
    from strangers import Images

    config = composed("model._target_=strangers.Net", "data._target_=strangers.Images")
    with pytest.raises(ConfigError, match=r"task.metrics.accuracy.num_classes has no value: .*=NUMBER, or task"):
        fill_class_counts(config, Images())


@pytest.mark.parametrize(
    ("task", "unused"),
    [
        ("Whole", {"model", "optim", "scheduler"}),
        ("NamedModel", {"model", "optim", "scheduler"}),
        ("Template", set()),
        ("Stricter", set()),
    ],
)
def test_parts_that_the_task_does_not_take(composed, task, unused):
    """The record of a run names no model and no optimizer that the run does not have."""
    config = composed(f"task._target_=strangers.{task}")
    assert {group for group in ("model", "optim", "scheduler") if config[group] is None} == unused
    assert type(build_task(fill(config, build_data(config)))).__name__ == task


@pytest.mark.parametrize("word", ["optim.lr=0.1", "optim=sgd", "+model.width=3"])
def test_a_setting_without_effect(composed, word):
    """A setting of a part that nobody builds is an error: else the user believes in it."""
    name = word.lstrip("+").partition("=")[0]
    with pytest.raises(ConfigError, match=f"{name}: strangers.Whole takes no argument .* has no effect"):
        composed("task._target_=strangers.Whole", word)


def test_a_part_under_another_name(composed):
    """A task may take the model under a name of its own, by an interpolation."""
    config = composed("task._target_=strangers.Whole", "+task.net='${model}'")
    assert config.model._target_ == "lightkit.models.CNN" and config.optim is None


def test_a_task_that_is_no_module(composed):
    """Lightning's own error would come later, and name no key."""
    with pytest.raises(ConfigError, match=r"task._target_ must be a LightningModule, got strangers.Net"):
        build_task(composed("task._target_=strangers.Net"))


def test_nothing_of_a_users(composed):
    """A job of lightkit's own classes keeps its configuration, however it is chosen."""
    config = composed("optim=sgd", "model=rnn", "data.layout=rows", "scheduler=cosine")
    assert set(raw(config, "optim")) > {"lr", "momentum", "nesterov"}
    assert set(raw(config, "model")) > {"num_outputs", "hidden_size", "cell"}
