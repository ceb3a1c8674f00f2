"""Restoring an untrusted checkpoint: the checkpoint can only make lightkit compute."""

from __future__ import annotations

import copy
import zipfile

import pytest
import torch
from PIL import Image
from side_effects import variables_read, watched

from lightkit import native
from lightkit.app import prediction, untrusted
from lightkit.app.console import print_table
from lightkit.app.evaluation import evaluate
from lightkit.app.restore import restore
from lightkit.checkpoints import CONFIG_KEY
from lightkit.errors import CheckpointError, DataError

ACCURACY = {"_target_": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 10, "average": "micro"}
CNN = {
    "data": {"_target_": "lightkit.data.MNIST5k", "layout": "image"},
    "model": {"_target_": "lightkit.models.CNN"},
    "task": {
        "_target_": "lightkit.tasks.ClassificationTask",
        "loss": {"_target_": "lightkit.nn.CrossEntropyLoss"},
        "metrics": {"accuracy": ACCURACY},
    },
    "trainer": {"_target_": "lightning.pytorch.Trainer", "precision": "32-true"},
}
TRANSFORMER = {
    "data": {"_target_": "lightkit.data.Text", "context": 8},
    "model": {
        "_target_": "lightkit.models.Transformer",
        **{"vocab_size": 256, "dim": 8, "num_layers": 1, "num_heads": 2, "context": 8},
    },
    "task": {"_target_": "lightkit.tasks.LanguageModelTask"},
}


def weights_of(config):
    """Returns the state dict of a configuration's task."""
    model = untrusted.build("model", config["model"])
    node = {key: value for key, value in config["task"].items() if key not in ("loss", "metrics")}
    return untrusted.build("task", node, model=model).state_dict()


@pytest.fixture
def save(tmp_path):
    """Returns a function that writes a checkpoint and returns its path.

    The function takes a configuration, optional weights, and changes of the configuration by dotted key, with ``__``
    for a dot.
    """

    def write(config, weights=None, /, **changes):
        config = copy.deepcopy(config)
        state = weights_of(config) if weights is None else weights
        for name, value in changes.items():
            *path, last = name.split("__")
            node = config
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        path = tmp_path / "stranger.ckpt"
        torch.save({"state_dict": state, CONFIG_KEY: config}, path)
        return path

    return write


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("L", (28, 28)).save(path)
    return path


def predict(path, **given):
    return prediction.predict(restore(path), prediction.PredictionRequest(**given))


def measure(path):
    return evaluate(path, download=False, accelerator="cpu")


PRIVATE = "lightning.fabric.plugins.precision.utils._ClassReplacementContextManager"
WRITER = "lightning.fabric.loggers.csv_logs._ExperimentWriter"
URL = "http://127.0.0.1:1/${oc.env:AWS_SECRET_ACCESS_KEY}"


@pytest.mark.parametrize(
    "parts",
    [
        {"scheduler": {"p": {"_target_": PRIVATE, "mapping": {"evilmod.X": None}}}},
        {"scheduler": {"_target_": PRIVATE, "mapping": {"evilmod.X": None}}},
        {"optim": {"_target_": "os.system", "command": "touch evil"}},
        {"callbacks": {"x": {"_target_": WRITER, "log_dir": URL}}},
        {"logger": {"x": {"_target_": WRITER, "log_dir": "."}}},
        {"strategy": {"_target_": "lightkit.parameter_server.Server", "host": "0.0.0.0"}},
        {"name": URL, "run_dir": "${oc.env:HOME}", "data__seed": 3},
        {"hydra": {"run": {"dir": "/tmp/${now:%s}"}}, "trainer__logger": {"_target_": WRITER, "log_dir": "."}},
    ],
    ids=lambda parts: "-".join(parts),
)
def test_parts_for_training_are_not_built(save, picture, tmp_path, monkeypatch, parts):
    """A prediction ignores all parts for training, and only reads the checkpoint and the image."""
    (tmp_path / "evilmod.py").write_text("open('evil', 'w')\nX = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = save(CNN, **parts)
    native.load()
    before = sorted(tmp_path.iterdir())
    names = variables_read(monkeypatch)
    with watched() as acts:
        assert predict(path, input=str(picture)).images[0].label in "0123456789"
    assert {act.partition("(")[0] for act in acts} <= {"open"}
    assert [act for act in acts if str(path) not in act and str(picture) not in act] == []
    assert "AWS_SECRET_ACCESS_KEY" not in names and "HOME" not in names
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"_target_": PRIVATE, "mapping": {"evilmod.X": None}}}, "model of the checkpoint: .* is not among"),
        ({"task": {"_target_": WRITER, "log_dir": "."}}, "task of the checkpoint: .* is not among"),
        ({"task": {"x": 1}}, "names no class in task._target_"),
        ({"task": 5}, "has no task"),
        ({"model": {}}, "names no class in model._target_"),
        ({"model__image_size": {"_target_": WRITER}}, "stands within another class"),
        ({"task__level": 0.5}, "takes no argument 'level'"),
    ],
    ids=str,
)
def test_only_listed_classes_are_built(save, changes, message):
    """The error names a class that its role does not allow, before anything is built."""
    with watched() as acts, pytest.raises(CheckpointError, match=message):
        restore(save(CNN, **changes))
    assert {act.partition("(")[0] for act in acts} <= {"open"}


def test_loss_and_metrics_are_for_evaluation_alone(save, picture):
    """A prediction ignores the loss, its class weights and the metrics; an evaluation rejects unlisted ones."""
    path = save(CNN, task__loss={"_target_": WRITER}, task__metrics={"x": {"_target_": WRITER}})
    assert predict(path, input=str(picture)).images
    with pytest.raises(CheckpointError, match="loss of the checkpoint"):
        restore(path, for_evaluation=True)
    with pytest.raises(CheckpointError, match="metric of the checkpoint"):
        restore(save(CNN, task__metrics={"x": {"_target_": WRITER}}), for_evaluation=True)
    weighted = {**weights_of(CNN), "loss.weight": torch.ones(10)}
    assert predict(save(CNN, weighted), input=str(picture)).images


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (TRANSFORMER, {"model__num_layers": 10**9}, "more parameters than the checkpoint"),
        (TRANSFORMER, {"model__dim": 2**24}, "is a checkpoint of another model"),
        # The checkpoint has no weights of positions.
        (TRANSFORMER, {"model__context": 10**10}, r"the model that the checkpoint describes takes [0-9,]+ bytes"),
        (TRANSFORMER, {"model__vocab_size": 10**12}, "is a checkpoint of another model"),
        (TRANSFORMER, {"model__dim": 2**62}, "model of the checkpoint"),
        (CNN, {"model__num_classes": 10**11}, "is a checkpoint of another model"),
    ],
    ids=str,
)
def test_sizes_are_compared_before_memory_is_taken(save, config, changes, message):
    """`restore` rejects a model of terabytes or of too many layers before it allocates memory."""
    with pytest.raises(CheckpointError, match=message):
        restore(save(config, **changes))


def test_metrics_of_terabytes(save):
    """`restore` limits the arguments and the tables of metrics."""
    for arguments in ({"num_classes": 10**6}, {"num_classes": 3, "validate_args": False}, {"num_classes": [3] * 2000}):
        confusion = {"_target_": "torchmetrics.classification.MulticlassConfusionMatrix", **arguments}
        with pytest.raises(CheckpointError, match="x must have numbers up to 1000 and no validate_args"):
            restore(save(CNN, task__metrics={"x": confusion}), for_evaluation=True)
    table = {"_target_": "torchmetrics.classification.MulticlassAUROC", "num_classes": 1000, "thresholds": 1000}
    with pytest.raises(CheckpointError, match=r"takes [0-9,]+ bytes"):
        restore(save(CNN, task__metrics={str(number): table for number in range(50)}), for_evaluation=True)
    with pytest.raises(CheckpointError, match="must be a mapping of 50 at most"):
        restore(save(CNN, task__metrics={str(number): ACCURACY for number in range(51)}), for_evaluation=True)
    with pytest.raises(CheckpointError, match=r"has the name 'a.*x1b'"):
        restore(save(CNN, task__metrics={"a\x1b": ACCURACY}), for_evaluation=True)


def test_one_number_that_stands_for_terabytes(save):
    """`restore` compares the model's memory with the file size; a weight of stride 0 takes little space in the file."""
    config = copy.deepcopy(TRANSFORMER)
    weights = weights_of(config)
    for name in ("model.embedding.weight", "model.head.weight"):
        weights[name] = torch.zeros(1, 1).expand(10**11, 8)
    with pytest.raises(CheckpointError, match=r"takes [0-9,]+ bytes, and a file of this size may describe"):
        restore(save(config, weights, model__vocab_size=10**11))


def test_containers_that_unpack_to_more(save, tmp_path):
    """`restore` rejects compressed and legacy files, which torch.save does not write, before it unpacks them."""
    path = save(CNN)
    packed = tmp_path / "packed.ckpt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    with pytest.raises(CheckpointError, match="its records are compressed"):
        restore(packed)
    (tmp_path / "legacy.ckpt").touch()
    torch.save(torch.load(path), tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        restore(tmp_path / "legacy.ckpt")


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(10, 64).to_sparse(),
        torch.zeros(10, 64, device="meta"),
        torch.quantize_per_tensor(torch.zeros(10, 64), 1.0, 0, torch.quint8),
        5,
    ],
    ids=["sparse", "meta", "quantized", "number"],
)
def test_weights_are_plain_tensors(save, value):
    """The error names a weight that is not a plain tensor."""
    weights = {**weights_of(CNN), "model.classifier.3.weight": value}
    with pytest.raises(
        CheckpointError, match=r"classifier\.3\.weight must be a plain tensor|damaged or not a checkpoint"
    ):
        restore(save(CNN, weights))


def test_parts_that_do_not_go_together(save, picture, tmp_path):
    """Valid parts that do not fit together raise a `CheckpointError`."""
    with pytest.raises(
        CheckpointError, match=r"of the checkpoint do not fit: the data has 10 classes but model\.num_classes is 7"
    ):
        seven = {**CNN, "model": {"_target_": "lightkit.models.CNN", "num_classes": 7}}
        predict(save(seven), input=str(picture))
    with pytest.raises(CheckpointError, match="do not work together: CNN takes images of shape"):
        coloured = {**CNN, "model": {"_target_": "lightkit.models.CNN", "in_channels": 3}}
        predict(save(coloured), input=str(picture))
    with pytest.raises(CheckpointError, match=r"trainer\.precision of the checkpoint is 'transformer-engine'"):
        measure(save(CNN, trainer__precision="transformer-engine"))


def test_names_of_a_stranger_are_escaped(save, capsys):
    """Tables and errors escape control sequences, markup and line breaks in names."""
    evil = "\x1b]0;owned\x07[bold]x[/bold]\n\u202eerror: fine"
    print_table(evil, {evil: evil})
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and "[bold]" in shown and r"\x1b" in shown
    with pytest.raises(CheckpointError) as error:
        restore(save(CNN, {**weights_of(CNN), evil: torch.zeros(1)}))
    assert str(error.value).isprintable()
    with pytest.raises(CheckpointError) as error:
        restore(save(CNN, model___target_=evil))
    assert str(error.value).isprintable()


def test_an_evaluation_says_what_it_reads_and_fetches_nothing(save, tmp_path, capsys, monkeypatch):
    """An evaluation prints the checkpoint's path of the data before it reads, and downloads only with download=true."""
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "values.csv").write_text("a,b\n")
    text = {**TRANSFORMER, "data": {"_target_": "lightkit.data.Text", "context": 8, "path": "/dev/zero"}}
    with pytest.raises(DataError, match="is a device, and must be a regular file"):
        measure(save(text))
    assert "reading /dev/zero, which the checkpoint names" in capsys.readouterr().out
    mnist = {"_target_": "lightkit.data.MNIST", "download": True}
    with watched() as acts, pytest.raises(DataError, match=r"is not on this machine .*; download=true downloads it"):
        measure(save(CNN, data=mnist))
    assert not [act for act in acts if act.startswith(("socket", "urllib"))]
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text("some text that is longer than a window " * 10)
    metrics = measure(save(text, data__path=str(folder), data__context=8))
    assert metrics["test/bits_per_byte"] > 0
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("text-*"))


@pytest.mark.parametrize("weight", ["balanced", list(range(1, 11))])
def test_class_weights_of_a_stranger(save, weight, picture):
    """A checkpoint with class weights is evaluated with the weights in it, and predicts without them."""
    weights = weights_of(CNN) | {"loss.weight": torch.arange(1.0, 11)}
    path = save(CNN, weights, task__loss__weight=weight)
    assert torch.equal(restore(path, for_evaluation=True).task.loss.weight, torch.arange(1.0, 11))
    predict(path, input=str(picture)).show()


@pytest.mark.parametrize("weight", ["all", [1, "x"], [[1.0]], {"a": 1}, [1.0] * 3])
def test_wrong_class_weights_of_a_stranger(save, weight):
    """Class weights that are no list of a number for each class are one error."""
    weights = weights_of(CNN) | {"loss.weight": torch.arange(1.0, 11)}
    with pytest.raises(CheckpointError):
        restore(save(CNN, weights, task__loss__weight=weight), for_evaluation=True)
