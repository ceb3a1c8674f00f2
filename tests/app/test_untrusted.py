"""The classes that a checkpoint's configuration may build, and the proof that their constructors only compute."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from side_effects import watched

import lightkit.app.restore  # noqa: F401  The imports of restoring must precede the watch.
from lightkit.app.untrusted import ALLOWED_CLASSES, build, check_plain
from lightkit.config import build as build_own
from lightkit.errors import CheckpointError, ConfigError
from lightkit.targets import _PUBLIC_PACKAGES, exported_classes, find_class

# Required arguments of each class, besides the caller's.
ARGUMENTS = {
    "lightkit.models.MLP": {"input_size": 3, "num_outputs": 2},
    "lightkit.models.RNN": {"input_size": 3, "hidden_size": 4, "num_outputs": 2},
    "lightkit.models.RNNLanguageModel": {"vocab_size": 8, "hidden_size": 4},
    "lightkit.models.Transformer": {"vocab_size": 8, "dim": 8, "num_layers": 1, "num_heads": 2, "context": 4},
    "lightkit.tasks.ForecastTask": {"horizon": 2},
    "lightkit.data.CO2": {"history": 4, "horizon": 2},
    "lightkit.data.Sunspots": {"history": 4, "horizon": 2},
    "lightkit.data.Series": {"history": 4, "horizon": 2, "path": "/nowhere/values.csv"},
    "lightkit.data.Text": {"path": "/nowhere/text"},
    "lightkit.data.DataModule": {"format": {"shape": [8, 8], "dtype": "uint8", "layout": "image"}},
    "lightkit.tasks.RegressionTask": {"num_targets": 2},
    "lightkit.data.ImageFolder": {"path": "/nowhere"},
    "lightkit.data.MNIST": {"data_dir": "/nowhere"},
    "torchmetrics.classification.MulticlassFBetaScore": {"beta": 1.0, "num_classes": 3},
}


def arguments_of(target):
    given = dict(ARGUMENTS.get(target, {}))
    if ".Multiclass" in target:
        given.setdefault("num_classes", 3)
    return given


@pytest.mark.parametrize(
    ("role", "target"), [(role, target) for role in ALLOWED_CLASSES for target in ALLOWED_CLASSES[role]]
)
def test_building_an_admitted_class_does_nothing_but_compute(role, target):
    """The constructor opens no file and no socket, starts no process, and imports only known packages."""
    cls, extra = find_class(target), {}
    if role == "task":
        model = "lightkit.models.RNNLanguageModel" if "Language" in target else "lightkit.models.CNN"
        extra["model"] = build("model", {"_target_": model, **arguments_of(model)})
    with watched() as acts:
        built = build(role, {"_target_": target, **arguments_of(target)}, **extra)
    assert type(built) is cls
    assert acts == []


def test_the_watch_sees():
    """The watch records each kind of act, so that an empty list proves something."""
    with watched() as acts:
        open("/dev/null").close()
        subprocess.run([sys.executable, "-c", ""], check=True)
        __import__("hypothesis.version")
        torch.zeros(2).sum()
    assert {act.partition("(")[0] for act in acts} >= {"open", "subprocess.Popen"}


@pytest.mark.parametrize(
    ("role", "target"),
    [
        ("model", "lightning.fabric.plugins.precision.utils._ClassReplacementContextManager"),
        ("model", "lightning.fabric.loggers.csv_logs._ExperimentWriter"),
        ("model", "lightkit.parameter_server.write_ahead_log.WriteAheadLog"),
        ("model", "lightkit.parameter_server.Server"),
        ("model", "lightkit.parameter_server.local_servers.LocalServers"),
        ("model", "lightkit.data.Text"),
        ("model", "torch.nn.ModuleList"),
        ("model", "lightkit.models.cnn.CNN"),
        ("task", "lightning.pytorch.Trainer"),
        ("loss", "lightkit.models.CNN"),
        ("metric", "torchmetrics.text.BERTScore"),
        ("metric", "torchmetrics.wrappers.Running"),
        ("data", "lightkit.tasks.ClassificationTask"),
        ("data", "lightning.pytorch.loggers.CSVLogger"),
        ("data", "os.system"),
        ("data", "\x1b[2J"),
    ],
)
def test_a_role_allows_its_own_classes_alone(role, target):
    """The error names a class that is unlisted, private, of another role, or given by another path."""
    with pytest.raises(CheckpointError, match=f"^{role} of the checkpoint: .* is not among the classes") as error:
        build(role, {"_target_": target, "num_classes": 3})
    assert str(error.value).isprintable()


@pytest.mark.parametrize("bury", [lambda node: node, lambda node: [node], lambda node: {"a": [{"b": node}]}])
def test_no_class_within_a_class(bury):
    """`build` rejects an argument that names a class at any depth, before it builds anything."""
    inner = {"_target_": "lightkit.models.CNN"}
    with pytest.raises(CheckpointError, match="stands within another class"):
        build("loss", {"_target_": "torch.nn.CrossEntropyLoss", "weight": bury(inner)})


@pytest.mark.parametrize(
    "layers",
    [
        None,
        [],
        {"0": {"_target_": "torch.nn.ModuleList"}},
        {"0": {"_target_": "torch.nn.Linear", "in_features": 2}},
        {"0": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": {"_target_": "os.system"}}},
        {"0": {"_target_": "torch.nn.Flatten", "start_dim": 1, "device": "cpu", "other": 1}},
        {"a.b": {"_target_": "torch.nn.ReLU"}},
        {str(number): {"_target_": "torch.nn.ReLU"} for number in range(1001)},
        {"0": {"_target_": "lightkit.models.CNN", "image_size": 3}},
    ],
)
def test_layers_of_a_described_model(layers):
    """A description names layers of torch with plain arguments, or one error says what is wrong."""
    with pytest.raises(CheckpointError, match=r"^model of the checkpoint: "):
        build("model", {"_target_": "torch.nn.Sequential", "layers": layers})


def test_a_described_model_that_is_nested_too_deep():
    """The nesting of a description is bounded."""
    node = {"_target_": "torch.nn.ReLU"}
    for _ in range(30):
        node = {"_target_": "torch.nn.Sequential", "layers": {"0": node}}
    with pytest.raises(CheckpointError, match="nested at most 20 deep"):
        build("model", node)


def test_interpolations_are_texts():
    """`build` resolves no interpolation, so that a checkpoint cannot read the environment."""
    data = build("data", {"_target_": "lightkit.data.Series", "path": "${oc.env:HOME}", "history": 4, "horizon": 2})
    assert data.path == "${oc.env:HOME}"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (None, "names no class in model._target_"),
        ("lightkit.models.CNN", "names no class in model._target_"),
        ({"_target_": 5}, "names no class in model._target_"),
        ({"_target_": "lightkit.models.CNN", "image_size": 3}, "image_size must be at least 18"),
        (
            {"_target_": "lightkit.models.CNN", "image_size": "x"},
            "image_size must be int, or .* two int, got 'x'",
        ),
        (
            {"_target_": "lightkit.models.CNN", "image_size": [1]},
            "image_size must be int, or .* two int",
        ),
        ({"_target_": "lightkit.models.CNN", "nothing": 1}, "takes no argument 'nothing'"),
        ({"_target_": "lightkit.models.CNN", 3: 1}, "takes no argument 3"),
        ({"_target_": "lightkit.models.CNN", "num_classes": 2**62}, "model of the checkpoint"),
    ],
)
def test_arguments_that_a_class_refuses(node, message):
    """Each wrong argument raises a `CheckpointError` with the reason."""
    with pytest.raises(CheckpointError, match=message):
        build("model", node)


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def itself():
    value = []
    value.append(value)
    return value


def shared(levels):
    value = [1]
    for _ in range(levels):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (nested(13), "nested too deep or too large"),
        (itself(), "nested too deep or too large"),
        (shared(8), "nested too deep or too large"),
        ({"a": torch.zeros(1)}, "holds a Tensor"),
        ({"a": (1, 2)}, "holds a tuple"),
        ({(1, 2): 1}, "a key that is no text"),
        ({"a": 2**63}, "a number beyond 64 bits"),
        ({"a": "x" * 5000}, "a text of 5,000 characters"),
    ],
)
def test_only_a_bounded_tree_of_plain_values(config, message):
    """`check_plain` rejects objects, cycles, and shared lists that expand to millions of values."""
    with pytest.raises(CheckpointError, match=message):
        check_plain(config)
    check_plain({"a": nested(8), "b": [1, 1.5, True, None, "x" * 4000], 4: -(2**63)})


def test_packages_of_the_users_own(monkeypatch, tmp_path):
    """Every role allows the public classes of LIGHTKIT_TARGETS, also within each other, and no private ones."""
    (tmp_path / "own_models.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self, inner):\n        super().__init__()\n"
        "        self.inner = inner\nclass _Hidden(Net):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "own_models.Net", "inner": {"_target_": "lightkit.models.CNN"}}
    with pytest.raises(CheckpointError, match="LIGHTKIT_TARGETS"):
        build("model", node)
    monkeypatch.setenv("LIGHTKIT_TARGETS", "own_models")
    assert type(build("model", node).inner).__name__ == "CNN"
    assert type(build("model", {**node, "inner": {**node, "inner": None}}).inner).__name__ == "Net"
    for target in ("own_models._Hidden", "own_models.torch.nn.Linear"):
        with pytest.raises(CheckpointError, match="model of the checkpoint"):
            build("model", {**node, "_target_": target})
    with pytest.raises(CheckpointError, match="is not among the classes"):
        build("model", {**node, "inner": {"_target_": "lightkit.data.Text"}})


@pytest.mark.parametrize(
    "target",
    [
        "lightning.fabric.plugins.precision.utils._ClassReplacementContextManager",
        "lightning.fabric.loggers.csv_logs._ExperimentWriter",
        "lightning.pytorch.loggers.csv_logs.ExperimentWriter",
        "lightning.pytorch.cli.LightningCLI",
        "lightkit.parameter_server.write_ahead_log.WriteAheadLog",
        "lightkit.parameter_server.Server",
        "lightkit.parameter_server.local_servers.LocalServers",
        "torchmetrics.text.BERTScore",
        "torch.nn.modules._functions.SyncBatchNorm",
        "torch.nn.parallel.DistributedDataParallel",
    ],
)
def test_private_names_and_acting_constructors_are_not_for_the_command_line_either(target):
    """A user's configuration may not build private classes or classes whose constructors touch files or processes."""
    with pytest.raises(ConfigError, match="_target_"):
        build_own({"_target_": target})


def test_public_classes_by_the_path_that_defines_them():
    """A target may name the module that defines a class instead of the package that exports it."""
    assert find_class("torch.optim.adam.Adam") is torch.optim.Adam
    assert find_class("lightning.pytorch.loggers.tensorboard.TensorBoardLogger").__name__ == "TensorBoardLogger"
    with pytest.raises(ConfigError, match=r"has no class 'Adam'; did you mean torch\.optim\.Adam"):
        find_class("torch.optim.sgd.Adam")


# What constructors may do: read files and import modules. A torch that is built for CUDA counts the GPUs by loading
# NVIDIA's library, which `Trainer` and `PyTorchProfiler` ask for.
HARMLESS = ("open", "import", "os.listdir", "ctypes.dlopen('libnvidia-ml.so.1',)")


@pytest.mark.parametrize("package", _PUBLIC_PACKAGES)
def test_constructors_of_the_command_line_do_nothing_to_files_or_processes(package):
    """The test builds every exported class that needs no arguments, and no constructor touches files or processes."""
    acted = {}
    for name, cls in exported_classes(package).items():
        with watched() as acts:
            try:
                cls()
            except Exception:
                # The class needs arguments, a device or a package.
                pass
        acts = [act for act in acts if not act.startswith(HARMLESS)]
        if acts:
            acted[name] = acts
    assert acted == {}
