"""The command compress: a finished run becomes a smaller checkpoint, and a comparison that says what it cost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lightkit import load
from lightkit.app.compressing import compress_checkpoint
from lightkit.app.compression_job import CompressionJob
from lightkit.app.compression_request import CompressionRequest
from lightkit.app.deployment import bytes_of, write_deployed
from lightkit.app.model_measurements import accuracy_interval, multiply_adds
from lightkit.app.restore import restore
from lightkit.app.runtime_comparison import measure_runtimes
from lightkit.checkpoints import CONFIG_KEY, load_checkpoint
from lightkit.compress import QUANTIZATION_KEY, WIDTHS_KEY, QuantizationScheme, apply_quantization
from lightkit.errors import CheckpointError, ConfigError
from lightkit.models import CNN, Transformer
from lightkit.nn.int8_layers import int8_chain_of
from lightkit.tasks import ClassificationTask, LanguageModelTask

ACCURACY = {"_target_": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 10, "average": "micro"}
CONFIG = {
    "data": {
        "_target_": "lightkit.data.MNIST5k",
        "layout": "image",
        "batch_size": 256,
        "validation_size": 400,
        "seed": 0,
    },
    "model": {"_target_": "lightkit.models.CNN"},
    "task": {
        "_target_": "lightkit.tasks.ClassificationTask",
        "loss": {"_target_": "lightkit.nn.CrossEntropyLoss"},
        "metrics": {"accuracy": ACCURACY},
    },
    "trainer": {"max_epochs": 1},
}

LAYERS = ("features.0", "features.3", "features.6", "classifier.1", "classifier.3")
LAYERS = tuple(f"model.{name}.weight" for name in LAYERS)


@pytest.fixture
def dense(tmp_path):
    """The path of a checkpoint of a model that has learnt nothing."""
    torch.manual_seed(0)
    path = tmp_path / "dense.ckpt"
    state = ClassificationTask(CNN()).state_dict()
    torch.save({"state_dict": state, CONFIG_KEY: CONFIG, "pytorch-lightning_version": "2.6.0"}, path)
    return path


@pytest.mark.slow
def test_compressed(dense, call, tmp_path):
    """The command writes a checkpoint that the others take, and compares three models."""
    words = ["ckpt_path=dense.ckpt", "keep_macs=0.4", "zeros=0.5", "epochs=1", "accelerator=cpu", "distil=0.5"]
    result = call("compress.__main__", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "dense-compressed"
    path = directory / "checkpoints" / "best.ckpt"
    assert load_checkpoint(path)[WIDTHS_KEY]
    content = json.loads((directory / "compression.json").read_text())
    models = content["models"]
    assert list(models) == ["dense", "dense, trained on", "compressed"]
    assert models["compressed"]["multiply-adds"] <= 0.4 * models["dense"]["multiply-adds"]
    assert models["compressed"]["bytes zipped"] < 0.6 * models["dense"]["bytes zipped"]
    low, high = models["compressed"]["interval"]
    assert low < models["compressed"]["test/accuracy"] < high and content["epochs"] == 1
    assert models["dense"]["ms at batch 32"] > 0
    page = (directory / "report.html").read_text()
    assert "dense, trained on" in page and "multiply-adds" in page
    # The runtime has the same labels as lightkit.
    measured = content["runtimes"]["onnx"]
    assert list(measured) == ["dense", "compressed"] and measured["dense"]["ms at batch 32"] > 0
    assert measured["compressed"]["labels that differ"] == 0 and measured["compressed"]["labels"] == 1000
    assert measured["compressed"]["bytes"] < measured["dense"]["bytes"]
    assert "0 of 1,000 labels differ" in page and "in onnx" in result.stdout
    # The loaded model is the compressed one.
    net = load(path).task.model
    assert multiply_adds(net, [torch.zeros(1, 1, 28, 28)]) == models["compressed"]["multiply-adds"]
    result = call("evaluate", f"ckpt_path={path}", "output=x.json", cwd=tmp_path)
    assert json.loads((tmp_path / "x.json").read_text())["test/accuracy"] == models["compressed"]["test/accuracy"]
    result = call("compress.__main__", *words, cwd=tmp_path)
    assert result.returncode == 1 and "holds files already" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 1])
def test_few_bits(dense, call, tmp_path, epochs):
    """With or without a training, the small checkpoint gives the figures of the comparison in few bytes."""
    words = ["keep_macs=null", "bits=4", f"epochs={epochs}", "accelerator=cpu", "compare=false", "runtimes=false"]
    words = ["ckpt_path=dense.ckpt", *words]
    result = call("compress.__main__", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "dense-compressed"
    models = json.loads((directory / "compression.json").read_text())["models"]
    assert models["compressed"]["bytes raw"] < models["dense"]["bytes raw"] / 6
    assert (directory / "deploy.ckpt").stat().st_size < dense.stat().st_size / 4
    layers = json.loads((directory / "compression.json").read_text())["layers"]
    assert layers["model.features.3.weight"]["bits"] == 4 and 0.02 < layers["model.features.3.weight"]["error"] < 0.3
    assert layers["model.classifier.3.weight"]["error"] < 0.01
    assert "Rounded weights" in (directory / "report.html").read_text()
    checkpoint = load_checkpoint(directory / "deploy.ckpt")
    assert "optimizer_states" not in checkpoint and "model.features.3.weight" not in checkpoint["state_dict"]
    for path in (directory / "deploy.ckpt", directory / "checkpoints" / "best.ckpt"):
        result = call("evaluate", f"ckpt_path={path}", "output=x.json", cwd=tmp_path)
        found = json.loads((tmp_path / "x.json").read_text())
        assert found["test/accuracy"] == models["compressed"]["test/accuracy"], path
    # A loaded model computes with integers.
    net = load(directory / "deploy.ckpt").task.model
    with torch.no_grad():
        assert int8_chain_of((net.features, net.classifier), torch.zeros(1, 1, 28, 28)) is not None
    again = call("compress.__main__", f"ckpt_path={directory}/deploy.ckpt", *words[1:], cwd=tmp_path)
    assert again.returncode == 1 and "is of a quantized model" in again.stderr


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"limit_train_batches": 3, "limit_val_batches": 0.5}, (3, 0.5)),
        ({"limit_train_batches": "all", "limit_val_batches": -1}, (1.0, 1.0)),
        ({"limit_train_batches": None, "limit_val_batches": True}, (1.0, 1.0)),
    ],
)
def test_epochs_are_those_of_the_dense_run(dense, limits, expected):
    """An epoch has as many batches as one of the dense run: that of a language model is a part of a long text."""
    content = torch.load(dense)
    content[CONFIG_KEY] = {**CONFIG, "trainer": {"max_epochs": 1, **limits}}
    torch.save(content, dense)
    trainer = CompressionJob(dense, CompressionRequest(accelerator="cpu"), dense.parent)._trainer([])
    assert (trainer.limit_train_batches, trainer.limit_val_batches) == expected


@pytest.mark.slow
def test_max_drop(dense, monkeypatch):
    """The search keeps the smallest model that passes, and says what each trial has lost; no model is one line."""
    monkeypatch.setattr("lightkit.app.compression_search._SHARES", (0.7, 0.4, 0.2))
    request = CompressionRequest(max_drop=0.9, epochs=1, compare=False, accelerator="cpu", runtimes=False)
    comparison = compress_checkpoint(dense, request)
    assert [trial["keep_macs"] for trial in comparison.trials] == [0.4, 0.2]
    assert comparison.columns["compressed"]["multiply-adds"] <= 0.2 * comparison.columns["dense"]["multiply-adds"]
    assert load_checkpoint(comparison.directory / "checkpoints" / "best.ckpt")[WIDTHS_KEY]


@pytest.mark.slow
def test_bits_by_layer(dense, monkeypatch):
    """Without a training the search takes as many bits as the accuracy allows; the checkpoint has the bits of each."""
    options = {"keep_macs": None, "bits": "auto", "epochs": 0, "compare": False, "accelerator": "cpu"}
    # A model that has learnt nothing loses nothing: all weights get 2 bits.
    comparison = compress_checkpoint(dense, CompressionRequest(max_drop=0.99, runtimes=False, **options))
    assert {layer["bits"] for layer in comparison.outcome.layers.values()} == {2}
    assert comparison.trials[-1]["bits"] == 2 and {trial["trained"] for trial in comparison.trials} == {"no"}
    assert "mean bits of a weight" in (comparison.directory / "report.html").read_text()
    # The search stops at the first weight whose bits cost too much.
    wanted = {"model.features.3.weight", "model.features.6.weight"}

    def fits(self, task):
        levels = {name: len(values.unique()) for name, values, _ in weights(task)}
        return {"val/accuracy": 1.0 if all(count > 4 for name, count in levels.items() if name not in wanted) else 0.5}

    def weights(task):
        return [(name, p.flatten(1)[0], p) for name, p in task.named_parameters() if p.dim() > 1]

    order = [dict.fromkeys(LAYERS, 8), dict.fromkeys(LAYERS, 8) | dict.fromkeys(wanted, 2), dict.fromkeys(LAYERS, 2)]
    monkeypatch.setattr("lightkit.app.compression_search.order_of_bits", lambda losses, sizes: order)
    monkeypatch.setattr("lightkit.app.compression_job.CompressionJob.validate", fits)
    request = CompressionRequest(max_drop=0.1, runtimes=False, output=str(dense.parent / "second"), **options)
    comparison = compress_checkpoint(dense, request)
    assert {name for name, layer in comparison.outcome.layers.items() if layer["bits"] == 2} == wanted
    assert load_checkpoint(comparison.directory / "deploy.ckpt")[QUANTIZATION_KEY]["weights"][min(wanted)] == [2, 0]


@pytest.mark.slow
def test_bits_by_layer_with_a_training(dense, monkeypatch):
    """Where rounding alone loses too much, a training with these bits follows, and the better model is kept."""
    order = [dict.fromkeys(LAYERS, 8), dict.fromkeys(LAYERS, 2)]
    monkeypatch.setattr("lightkit.app.compression_search.order_of_bits", lambda losses, sizes: order)
    rounded = CompressionJob.round

    def round(self, spec):
        trained = rounded(self, spec)
        few = [2, 0] in spec["weights"].values()
        return replace(trained, validation={"val/accuracy": 0.0 if few else 1.0})

    monkeypatch.setattr(CompressionJob, "round", round)
    options = {"keep_macs": None, "bits": "auto", "epochs": 1, "compare": False, "accelerator": "cpu"}
    comparison = compress_checkpoint(dense, CompressionRequest(max_drop=0.01, runtimes=False, **options))
    assert [trial["trained"] for trial in comparison.trials] == ["no", "no", "yes"]
    assert {layer["bits"] for layer in comparison.outcome.layers.values()} == {2}
    assert comparison.columns["compressed"]["test/accuracy"] > comparison.columns["dense"]["test/accuracy"]


def test_a_runtime_that_cannot_take_a_model():
    """The table has the reason in one line, and the other runtimes are measured."""

    class Odd(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1) if images.sum() > 0 else images.flatten(1) * 2

    calls = [((torch.zeros(40, 1, 4, 4),), torch.zeros(40, 16))]
    found = measure_runtimes({"dense": Odd(), "compressed": torch.nn.Flatten().eval()}, calls, True, (1, 32))["onnx"]
    assert list(found["dense"]) == ["reason"] and "\n" not in found["dense"]["reason"]
    assert found["compressed"]["labels that differ"] == 0 and found["compressed"]["ms at batch 1"] > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": "auto"}, "bits must be 8, 4, 3, 2 or null, or with max_drop auto"),
        ({"bits": "all", "max_drop": 0.1}, "bits must be 8, 4, 3, 2 or null"),
        ({"bits": "auto", "max_drop": 0.1, "zeros": 0.5}, "bits=auto may choose 2 bits, which have no zero"),
        ({"keep_macs": None}, "keep_macs, zeros, bits and max_drop are all null"),
        ({"max_drop": 1.5}, "max_drop must be a share"),
        ({"distil": -1}, "distil must be a number from 0 to 1"),
        ({"epochs": 0}, "epochs=0 rounds the weights without a training"),
        ({"lr": 0}, "lr must be positive"),
        ({"keep_macs": 25}, "keep_macs must be a number above 0 to 1, got 25"),
        ({"zeros": -0.5}, "zeros must be a number .*got -0.5"),
        ({"zeros": 0.5, "bits": 2}, "zeros do not go with bits=2"),
        ({"epochs": 0, "bits": 8, "keep_macs": None, "distil": 0.5}, "distil=0.5 needs a training"),
    ],
)
def test_wrong_options(tmp_path, options, expected):
    """A wrong option is one line before the checkpoint is read."""
    with pytest.raises(ConfigError, match=expected):
        compress_checkpoint(tmp_path / "gone.ckpt", CompressionRequest(**options))


def test_output_is_a_file(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match=r"output=.*out is a file"):
        compress_checkpoint(tmp_path / "gone.ckpt", CompressionRequest(output=str(tmp_path / "out")))


def test_accuracy_is_checked_before_the_dense_model_is_trained(dense, monkeypatch):
    """A task without accuracy cannot be searched, which takes no training to see."""
    content = torch.load(dense)
    content[CONFIG_KEY] = {**CONFIG, "task": {**CONFIG["task"], "metrics": {}}}
    torch.save(content, dense)
    monkeypatch.setattr(CompressionJob, "train", None)
    with pytest.raises(ConfigError, match="max_drop needs a task with the metric accuracy"):
        compress_checkpoint(dense, CompressionRequest(max_drop=0.1, accelerator="cpu"))


def test_calibration_has_its_own_batches(dense):
    """A share of the validation set, to which the dense run was limited, does not limit the samples of a rounding."""
    content = torch.load(dense)
    content[CONFIG_KEY] = {**CONFIG, "trainer": {"max_epochs": 1, "limit_val_batches": 0.05}}
    torch.save(content, dense)
    job = CompressionJob(dense, CompressionRequest(accelerator="cpu"), dense.parent)
    _, calibration = job.calibrate(QuantizationScheme(8), 8)
    assert len(calibration.spec({})["inputs"]) == 5


def test_a_stranger_s_packed_weights_take_no_memory(dense):
    """A small file whose packed weights say to be large is rejected by the model's sizes, before it takes memory."""
    checkpoint = torch.load(dense)
    levels = torch.zeros(1, dtype=torch.uint8).expand(1 << 40)
    entry = {"shape": [1 << 20, 1 << 20], "levels": levels, "scales": torch.ones(1).expand(1 << 20)}
    name = LAYERS[1]
    del checkpoint["state_dict"][name]
    checkpoint[QUANTIZATION_KEY] = {"weights": {name: [8, 0]}, "inputs": {}, "packed": {name: entry}}
    torch.save(checkpoint, dense)
    with pytest.raises(CheckpointError, match=r"features\.3"):
        restore(dense)


@pytest.fixture
def tied(tmp_path):
    """The path of a deployed language model, whose head has the weight of its embedding; and its task and sizes."""
    model = {"vocab_size": 256, "dim": 32, "num_layers": 1, "num_heads": 2, "context": 8}
    config = {
        "data": {"_target_": "lightkit.data.Text", "context": 8},
        "model": {"_target_": "lightkit.models.Transformer", **model},
        "task": {"_target_": "lightkit.tasks.LanguageModelTask"},
    }
    torch.manual_seed(0)
    task = LanguageModelTask(Transformer(**model))
    formats = {name: [value.bits, 0] for name, value in QuantizationScheme(4, group_size=0).formats(task).items()}
    checkpoint = {"state_dict": task.state_dict(), CONFIG_KEY: config, "pytorch-lightning_version": "2.6.0"}
    checkpoint[QUANTIZATION_KEY] = {"weights": formats, "inputs": {}}
    sizes = write_deployed(checkpoint, apply_quantization(task, checkpoint), tmp_path / "deploy.ckpt")
    return tmp_path / "deploy.ckpt", task, sizes


def test_tied_weights_are_packed_once(tied):
    """The file of a model with tied weights has no float copy under the second name, and loading fills both in."""
    path, task, sizes = tied
    checkpoint = torch.load(path, weights_only=True)
    names = {name for name, value in checkpoint["state_dict"].items() if value.dim() > 1}
    assert not names & {"model.embedding.weight", "model.head.weight"}
    assert sizes["raw"] < sum(p.numel() for p in task.parameters()) * 1.2
    restored = restore(path).task
    assert restored.model.head.weight is restored.model.embedding.weight
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in task.state_dict().items())
    assert bytes_of(task.state_dict())["raw"] == 4 * sum(p.numel() for p in task.parameters())


@pytest.mark.parametrize(
    "names",
    ["model.head.weight", [3], [[]], ["model.head.weight"] * 2, ["model.norm.weight"], ["model.embedding.weight"]],
)
def test_wrong_names_of_tied_weights(tied, monkeypatch, names):
    """Names that are none, or those of other weights, are one error before a weight takes memory."""
    path, _, _ = tied
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["model.norm.weight"] = torch.ones(32)
    checkpoint[QUANTIZATION_KEY]["packed"]["model.embedding.weight"]["tied"] = names
    torch.save(checkpoint, path)
    monkeypatch.setattr("lightkit.compress.packing.unpack_levels", pytest.fail)
    with pytest.raises(CheckpointError, match=r"packed weights of the checkpoint .*: model\.embedding\.weight"):
        restore(path)


@pytest.mark.parametrize("names", [[], ["model.other.weight"], ["model.body.norm.weight"]])
def test_names_of_tied_weights_that_do_not_fit(tied, monkeypatch, names):
    """Names that the model does not have, or of weights of other shapes, are one error before a weight takes memory."""
    path, _, _ = tied
    checkpoint = torch.load(path, weights_only=True)
    for name in names:
        checkpoint["state_dict"].pop(name, None)
    checkpoint[QUANTIZATION_KEY]["packed"]["model.embedding.weight"]["tied"] = names
    torch.save(checkpoint, path)
    monkeypatch.setattr("lightkit.compress.packing.unpack_levels", pytest.fail)
    with pytest.raises(CheckpointError, match="is a checkpoint of another model"):
        restore(path)


def test_measurements():
    """The multiply-adds are those of the layers, zeros make an archive small, and the interval is Wilson's."""
    model = CNN().eval()
    by_hand = 9 * 32 * 676 + 9 * 32 * 64 * 121 + 9 * 64 * 64 * 9 + 576 * 64 + 640
    assert multiply_adds(model, [torch.zeros(4, 1, 28, 28)]) == by_hand
    before = bytes_of(model.state_dict())
    assert before["raw"] == 4 * 93_322 and before["zipped"] > 0.8 * before["raw"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert bytes_of(model.state_dict())["zipped"] < 5_000
    assert accuracy_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
