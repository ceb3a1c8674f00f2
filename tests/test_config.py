"""Construction of objects from a configuration: allowed classes and error messages."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf
from support.rows import write_rows

from lightkit.app.factory import build_data, build_task
from lightkit.app.model_sizes import fill
from lightkit.app.schema import set_tags
from lightkit.config import allow_targets, build
from lightkit.data import MNIST5k, with_sizes
from lightkit.errors import ConfigError
from lightkit.models import CNN

CONF = Path(__file__).parent.parent / "conf"


def test_builds_from_the_inside_out():
    """Targets nest, a partial accepts the missing arguments, a null target builds None, and containers stay."""
    config = OmegaConf.create(
        {
            "model": {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": "${size}"},
            "optim": {"_target_": "lightkit.optim.SGD", "_partial_": True, "lr": 0.5},
            "nothing": {"_target_": None},
            "list": [{"_target_": "lightkit.models.CNN"}, 1, "x"],
            "size": 2,
        }
    )
    built = build(config)
    assert built["model"].out_features == 2
    assert isinstance(built["optim"], partial)
    assert built["optim"](built["model"].parameters()).param_groups[0]["lr"] == 0.5
    assert built["nothing"] is None
    assert isinstance(built["list"][0], CNN) and built["list"][1:] == [1, "x"]


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        # Paths through an allowed package to a module that it imports.
        "lightning.pytorch.trainer.trainer.os.system",
        "lightkit.native.background.subprocess.Popen",
        "lightkit.native.builder.os.system",
        "torch.nn.modules.module.functools.partial",
        "lightkit._util.atomic_write.tempfile.NamedTemporaryFile",
        # Names in an allowed package that are not classes.
        "lightkit._util.atomic_write.write_atomically",
        "torch.nn.functional.relu",
        "lightkit",
        "",
        "..",
    ],
)
def test_refuses_what_is_not_a_class_of_a_trusted_package(target):
    """A configuration cannot call functions or reach other packages, even through allowed ones."""
    with pytest.raises(ConfigError, match="_target_"):
        build({"_target_": target, "command": "true"})


def test_own_packages_can_be_allowed(monkeypatch):
    """`build` builds a user's class after `allow_targets` or LIGHTKIT_TARGETS names its package."""
    target = {"_target_": "collections.OrderedDict"}
    with pytest.raises(ConfigError, match="LIGHTKIT_TARGETS"):
        build(target)
    monkeypatch.setenv("LIGHTKIT_TARGETS", "somewhere, collections")
    assert build(target) == {}
    monkeypatch.delenv("LIGHTKIT_TARGETS")
    monkeypatch.setattr("lightkit.targets._user_packages", [])
    allow_targets("collections")
    assert build(target) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": "lightkit.models.CN"}, "did you mean lightkit.models.CNN"),
        ({"_target_": "lightkit.model.CNN"}, "did you mean lightkit.models.CNN"),
        ({"_target_": "torch.optim.SDG"}, "did you mean torch.optim.SGD"),
        ({"_target_": "lightkit.models.CNN", "num_clases": 3}, "no argument 'num_clases'; did you mean num_classes"),
        ({"_target_": "lightkit.data.MNIST", "batchsize": 3}, "no argument 'batchsize'; did you mean batch_size"),
        ({"_target_": "lightkit.models.CNN", "num_classes": "ten"}, "num_classes must be int, got 'ten'"),
        ({"_target_": "lightning.pytorch.Trainer", "max_epochs": "x"}, "max_epochs must be int or null, got 'x'"),
        ({"_target_": "torch.nn.Linear", "in_features": 3}, "needs the argument 'out_features'"),
        ({"_target_": "lightkit.models.CNN", "image_size": 3}, "could not be built: image_size must be at least 18"),
    ],
)
def test_errors_name_what_is_right(config, message):
    """The error for a misspelt name has the nearest known ones, and the error for a wrong type the expected types."""
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_keys_that_the_program_sets_are_refused():
    """`build` rejects a value that the program would overwrite."""
    with pytest.raises(ConfigError, match="in_features cannot be set here"):
        build({"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}, in_features=2)


def test_partials_fail_in_the_same_words():
    """A wrong value raises a `ConfigError` also when a partial is called later."""
    optimizer = build({"_target_": "torch.optim.Adam", "_partial_": True, "lr": -1})
    with pytest.raises(ConfigError, match=r"torch\.optim\.Adam could not be built: Invalid learning rate"):
        optimizer([torch.zeros(1, requires_grad=True)])


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


OVERRIDES = [
    f"{'+' if group in ('experiment', 'debug') else ''}{group}={choice}"
    for group in sorted(p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_"))
    for choice in choices(group)
]


# For choices that do not classify images: the experiment and the overrides that they need.
BELONGS_TO = {
    "data=co2": ["+experiment=forecast"],
    "data=csv": ["+experiment=table", "data.path=TABLE", "data.target=target"],
    "data=image_folder": ["data.path=images", "data.classes=[a,b]", "data.image_size=28", "data.channels=1"],
    "data=series": ["+experiment=forecast", "data.path=values.csv"],
    "data=sunspots": ["+experiment=forecast"],
    "data=text": ["+experiment=language_model"],
    "model=char_rnn": ["+experiment=char_rnn"],
    "experiment=table": ["data.path=TABLE", "data.target=target"],
    "model=forecaster": ["+experiment=forecast"],
    "model=mlp": ["+experiment=table", "data.path=TABLE", "data.target=target"],
    "model=rnn": ["+experiment=rnn"],
    "model=transformer": ["+experiment=language_model"],
    "task=forecast": ["+experiment=forecast"],
    "task=language_model": ["+experiment=language_model"],
    "task=regression": ["+experiment=table", "data.path=TABLE", "data.target=target", "data.kind=regression"],
    "task=table": ["+experiment=table", "data.path=TABLE", "data.target=target"],
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_every_choice_composes_and_builds(override, tmp_path):
    """Every choice of every group composes and builds within its job."""
    table = write_rows(tmp_path / "t.csv", "a,target", [f"{row % 7},{row % 2}" for row in range(60)])
    needed = [word.replace("TABLE", str(table)) for word in BELONGS_TO.get(override.lstrip("+"), [])]
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose("train", [*needed, override, f"run_dir={tmp_path}"])
    data = build_data(config)
    config = fill(config, data)
    task = build_task(config)
    build(config.get("callbacks") or {})
    # Lightning rejects a Trainer for a missing device.
    if config.trainer.accelerator in ("auto", "cpu") or (
        config.trainer.accelerator == "gpu" and torch.cuda.is_available()
    ):
        build(config.trainer)
    # The length of a schedule is that of the training.
    limits = {"max_epochs": 3, "max_steps": -1, "estimated_stepping_batches": 12, "accumulate_grad_batches": 1}
    task._trainer = SimpleNamespace(**limits, num_training_batches=4)
    task.configure_optimizers()
    outputs = config.model.get("num_classes", config.model.get("num_outputs"))
    # A regression has one value.
    targets = getattr(task, "num_targets", None)
    assert outputs in (None, getattr(data, "num_classes", None), getattr(data, "horizon", None), targets)


@pytest.mark.parametrize(
    ("override", "experiments"), [("data=text", "language_model, char_rnn"), ("data=co2", "forecast")]
)
def test_data_of_another_kind(override, experiments):
    """The error for data without classes and a classifier has the experiments for the data."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose("train", [override, "run_dir=."])
    with pytest.raises(ConfigError, match=f"no classes .* experiments for it: {experiments}"):
        build_data(config)


def test_help_lists_every_experiment():
    """The hand-written --help lists every experiment."""
    text = (CONF / "train.yaml").read_text()
    for name in choices("experiment"):
        assert f"+experiment={name} " in text


def test_documented_job():
    """experiment=cnn trains 5 epochs with batches of 32 and Adam, on data that need no network."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose("train", ["+experiment=cnn", "run_dir=."])
        other = compose("train", ["+experiment=cnn", "run_dir=.", "data=fashion_mnist", "optim=sgd"])
    assert (config.trainer.max_epochs, config.data.batch_size) == (5, 32)
    assert config.optim._target_ == "lightkit.optim.Adam"
    assert config.data._target_ == "lightkit.data.MNIST5k"
    assert (other.data._target_, other.optim._target_) == ("lightkit.data.FashionMNIST", "lightkit.optim.SGD")


@pytest.mark.parametrize(
    ("overrides", "norm"),
    [
        (["optim=adam"], None),
        (["optim=adam", "optim.max_grad_norm=0.5"], 0.5),
        (["optim=adamw", "optim.max_grad_norm=1"], 1),
        (["optim=sgd", "optim.max_grad_norm=2.0"], 2.0),
    ],
)
def test_gradient_clipping(overrides, norm):
    """`optim.max_grad_norm` is a key of every optimizer, and null leaves torch's classes without it."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose("train", [*overrides, "run_dir=."])
        plain = compose("train", ["optim=sgd", "optim._target_=torch.optim.SGD", "run_dir=."])
    data = build_data(config)
    assert build_task(fill(config, data)).configure_optimizers().max_grad_norm == norm
    assert type(build_task(fill(plain, data)).configure_optimizers()) is torch.optim.SGD


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("default", ["checkpoint", "throughput", "progress", "lean_loop"]),
        ("none", []),
        ("[]", []),
        ("early_stopping", ["early_stopping"]),
        ("[default,early_stopping]", ["checkpoint", "throughput", "progress", "lean_loop", "early_stopping"]),
        ("[none,swa,lr_monitor]", ["swa", "lr_monitor"]),
        ("[ema]", []),
    ],
)
def test_several_callbacks(choice, names):
    """A list of choices has the callbacks of all of them; early stopping reads the metric of the checkpoints."""
    monitor = ["callbacks.checkpoint.monitor=val/accuracy", "callbacks.checkpoint.mode=max"]
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose("train", [f"callbacks={choice}", "run_dir=.", *(monitor if "default" in choice else [])])
    assert list(config.get("callbacks") or {}) == names
    assert config.optim.ema_decay == (0.999 if "ema" in choice else None)
    for stopping in (c for c in build(config.get("callbacks") or {}).values() if isinstance(c, EarlyStopping)):
        expected = ("val/accuracy", "max") if "default" in choice else ("val/loss", "min")
        assert (stopping.monitor, stopping.mode) == expected


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("default", ["csv", "tensorboard"]),
        ("tensorboard", ["tensorboard"]),
        ("[csv,wandb]", ["csv", "wandb"]),
        ("all", ["csv", "tensorboard", "wandb", "mlflow"]),
    ],
)
def test_several_loggers(choice, names):
    """The loggers take the run directory, the name and the tags of the job."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose("train", [f"logger={choice}", "run_dir=here", "name=job", "tags=[a,b]"])
    nodes = OmegaConf.to_container(config.logger, resolve=True)
    assert list(nodes) == names and all(node["save_dir"] == "here" for node in nodes.values())
    for name in {"wandb", "mlflow"} & set(names):
        assert nodes[name]["tags"] == ["a", "b"]
        assert nodes[name]["project" if name == "wandb" else "experiment_name"] == "job"


@pytest.mark.parametrize(
    ("given", "tags"), [("[a,b]", ["a", "b"]), ("[1,x]", ["1", "x"]), ("one", ["one"]), ("null", []), ("[]", [])]
)
def test_tags(given, tags):
    """Tags are texts; one tag needs no brackets."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose("train", [f"tags={given}", "run_dir=."])
    set_tags(config)
    assert config.tags == tags


@pytest.mark.parametrize("override", ["scheduler=none", "~scheduler"])
def test_no_scheduler(override):
    """Without a scheduler the task has an optimizer alone."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        task = build_task(fill(compose("train", ["+experiment=cnn", "run_dir=.", override]), MNIST5k()))
    assert isinstance(task.configure_optimizers(), torch.optim.Optimizer)


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_every_key_of_a_command_has_a_type(name):
    """The class `Keys` of a command has a type for exactly the keys of its configuration."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose(name)
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    keys = import_module(f"lightkit.{name}").Keys
    assert get_type_hints(keys).keys() == set(map(str, config)) - groups


def test_groups_serve_a_hydra_application_of_the_user(tmp_path):
    """A user's own application finds the groups through hydra.searchpath."""
    from hydra import initialize_config_dir

    groups = ["model: cnn", "optim: sgd", "data: mnist_5k", "trainer: cpu", "strategy: parameter_server"]
    groups += ["callbacks: default", "logger: csv"]
    (tmp_path / "mine.yaml").write_text(
        f"defaults: [{', '.join(groups)}, _self_]\nhydra: {{searchpath: ['pkg://lightkit.conf']}}\n"
        # The keys that the groups need according to the README.
        "run_dir: out\nseed: 3\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = compose("mine", ["optim.lr=0.5"])
    assert isinstance(build(with_sizes(config.model, build(config.data))), CNN)
    assert config.optim.lr == 0.5
    OmegaConf.resolve(config)
    assert (config.trainer.default_root_dir, build(config.data).seed) == ("out", 3)
