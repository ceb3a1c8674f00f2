"""Exports of checkpoints: compared before they are kept, with nothing of the run, and used as the checkpoint is."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.series import write_wave

import lightkit
from lightkit import evaluate, predict
from lightkit.app import untrusted
from lightkit.app.exporting import export_checkpoints
from lightkit.app.prediction import predict_from
from lightkit.checkpoints import CONFIG_KEY
from lightkit.errors import CheckpointError, ConfigError
from lightkit.export import __main__ as export
from lightkit.export import open_export
from lightkit.export.agreement import Agreement
from lightkit.models import MLP, RNN, Transformer

ACCURACY = {"_target_": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 10, "average": "micro"}
CNN = {
    "data": {"_target_": "lightkit.data.MNIST5k", "validation_size": 400},
    "model": {"_target_": "lightkit.models.CNN"},
    "task": {
        "_target_": "lightkit.tasks.ClassificationTask",
        "loss": {"_target_": "lightkit.nn.CrossEntropyLoss", "weight": [1.0, 2.0, *[1.0] * 8]},
        "metrics": {"accuracy": ACCURACY},
    },
    "trainer": {"_target_": "lightning.pytorch.Trainer", "precision": "32-true"},
}
SERIES = {
    "data": {"_target_": "lightkit.data.Series", "path": "wave.csv", "column": "price", "history": 12, "horizon": 4},
    "model": {"_target_": "lightkit.models.RNN", "input_size": 1, "hidden_size": 4, "num_outputs": 4, "cell": "gru"},
    "task": {"_target_": "lightkit.tasks.ForecastTask", "horizon": 4, "loss": {"_target_": "lightkit.nn.MSELoss"}},
}
TEXT = {
    "data": {"_target_": "lightkit.data.Text", "path": "text.txt", "context": 16, "test_share": 0.3},
    "model": {
        "_target_": "lightkit.models.Transformer",
        **{"vocab_size": 256, "dim": 16, "num_layers": 1, "num_heads": 2, "context": 16},
    },
    "task": {"_target_": "lightkit.tasks.LanguageModelTask"},
}
PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def save(path, config, number=0):
    """Writes a checkpoint with random weights."""
    torch.manual_seed(number)
    node = {key: value for key, value in config["task"].items() if key not in ("metrics", "optimizer")}
    if "loss" in node:
        node["loss"] = None
        parts = {"loss": untrusted.build("loss", config["task"]["loss"])}
    else:
        parts = {}
    task = untrusted.build("task", node, model=untrusted.build("model", config["model"]), **parts)
    state = task.state_dict()
    if "half_width" in state:
        state["half_width"] = torch.tensor([1.0, 2.0, 3.0, torch.inf], dtype=torch.float64)
        state["center"] = torch.tensor(100.123456789012345, dtype=torch.float64)
    checkpoint = {"state_dict": state, CONFIG_KEY: copy.deepcopy(config)}
    if config is CNN:
        checkpoint["MNIST5k"] = {"image_shape": [28, 28]}
    torch.save(checkpoint, path)


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


def measure(command, path, *arguments):
    status, _, err = command(evaluate, f"ckpt_path={path}", "output=out.json", "accelerator=cpu", *arguments)
    assert status == 0, err
    return json.loads(Path("out.json").read_text())


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", [CNN, SERIES, TEXT], ids=["cnn", "series", "text"])
def test_evaluate_gives_the_report_of_the_checkpoint(command, config, format):
    """Each metric of the export is that of the checkpoint, and its test set is named again where it has a path."""
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    save("best.ckpt", config)
    write_wave(Path("wave.csv"))
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    status, out, err = command(export, "ckpt_path=best.ckpt", f"format={format}")
    assert status == 0, err
    assert "largest difference" in out and ("labels that differ" in out) == (config is not SERIES)
    place = config["data"].get("path")
    found = measure(command, f"best.{format}", "trust=true", *([f"data_dir={place}"] if place else []))
    assert found == pytest.approx(measure(command, "best.ckpt", *([f"data_dir={place}"] if place else [])), rel=1e-4)
    if place:
        status, _, err = command(evaluate, f"ckpt_path=best.{format}", "trust=true")
        assert status == 1 and "data_dir=PATH must say where the data lie: an export has no path" in err


def test_predictions_are_those_of_the_checkpoint(command):
    """A forecast of an export has the same values and bounds, and a text the same continuation."""
    write_wave(Path("wave.csv"))
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    requests = {"series": ["input=wave.csv"], "text": ["text=the quick", "length=30", "seed=1"]}
    for name, config in {"series": SERIES, "text": TEXT}.items():
        save(f"{name}.ckpt", config)
        export_checkpoints([Path(f"{name}.ckpt")], Path(f"{name}.pt2"))
        written = []
        for suffix in ("ckpt", "pt2"):
            status, _, err = command(
                predict, f"ckpt_path={name}.{suffix}", "trust=true", f"output={name}_{suffix}.json", *requests[name]
            )
            assert status == 0, err
            written.append(json.loads(Path(f"{name}_{suffix}.json").read_text()))
        if name == "text":
            assert written[0] == written[1]
        else:
            # JSON has null for an infinite bound.
            pairs = [[list(filter(None, step.values())) for step in steps] for steps in written]
            assert pairs[0] == [pytest.approx(values, rel=1e-6) for values in pairs[1]]


def test_an_export_has_nothing_of_the_run(tmp_path):
    """The metadata have classes, preprocessing and the data's settings, and no path, optimizer or trainer."""
    config = copy.deepcopy(SERIES)
    config["data"]["path"] = str(tmp_path / "wave.csv")
    config |= {"optim": {"lr": 0.1}, "run_dir": str(tmp_path)}
    config["task"]["optimizer"] = {"_target_": "torch.optim.SGD"}
    write_wave(tmp_path / "wave.csv")
    save("a.ckpt", config)
    export_checkpoints([Path("a.ckpt")], Path("a.pt2"))
    _, metadata = open_export("a.pt2", trust=True)
    text = json.dumps(metadata)
    assert str(tmp_path) not in text and "wave" not in text and "SGD" not in text and "trainer" not in text
    assert metadata["config"]["data"] == {**SERIES["data"], "path": ""}
    assert metadata["preprocessing"] == {"kind": "series", "history": 12, "horizon": 4, "relative": True}
    assert metadata["buffers"]["half_width"]["values"] == [1.0, 2.0, 3.0, "inf"]
    assert metadata["buffers"]["center"]["values"] == [100.123456789012345]


def test_a_file_that_computes_something_else_is_not_kept(monkeypatch):
    """The comparison refuses a wrong file, removes it, and leaves the file before it as it was."""
    save("a.ckpt", CNN)
    Path("a.pt2").write_bytes(b"before")
    run = "lightkit.export.pt2_file.Pt2Runtime.run"
    original = __import__("lightkit.export.pt2_file", fromlist=["x"]).Pt2Runtime.run
    monkeypatch.setattr(run, lambda self, arrays: original(self, arrays) * np.float32(1.001))
    with pytest.raises(CheckpointError, match=r"a\.pt2 is not kept, since it computes something else than the model"):
        export_checkpoints([Path("a.ckpt")], Path("a.pt2"))
    assert Path("a.pt2").read_bytes() == b"before"
    assert sorted(file.name for file in Path().iterdir()) == ["a.ckpt", "a.pt2"]


def test_agreement_of_rounding_and_of_labels():
    """Rounding is measured by float64; a label may differ where the logits are within it, and a NaN never agrees."""
    exact = torch.tensor([[1.0, 1.0 + 1e-8]], dtype=torch.float64)
    agreement = Agreement()
    agreement.update(torch.tensor([[1.0000001, 1.0]]), torch.tensor([[1.0, 1.0000001]]), exact, True)
    assert (agreement.differing, agreement.predictions, agreement.is_rounding) == (1, 1, True)
    agreement.update(torch.tensor([[1.0001, 1.0]]), torch.tensor([[1.0, 1.0]]), exact, True)
    assert not agreement.is_rounding
    unknown = Agreement()
    unknown.update(torch.tensor([[1.00001]]), torch.tensor([[1.0]]), None, False)
    assert unknown.is_rounding and unknown.predictions == 0
    unknown.update(torch.tensor([[torch.nan]]), torch.tensor([[1.0]]), None, False)
    assert not unknown.is_rounding
    with pytest.raises(ValueError, match="not finite"):
        unknown.update(torch.tensor([[1.0]]), torch.tensor([[torch.inf]]), None, False)


@pytest.mark.slow
def test_executorch():
    """A program of ExecuTorch gives the labels of the model, and continues a text as the model does."""
    pytest.importorskip("executorch")
    save("a.ckpt", TEXT)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    agreement = export_checkpoints([Path("a.ckpt")], Path("a.pte"))
    assert agreement.is_rounding and agreement.predictions > 0
    continued = [
        predict_from(path, text="the quick", length=20, seed=1, trust=True).added for path in ("a.ckpt", "a.pte")
    ]
    assert continued[0] == continued[1]
    Path("a.json").unlink()
    with pytest.raises(CheckpointError, match=r"a\.pte lacks a\.json beside it"):
        open_export("a.pte", trust=True)


def images_and_labels():
    generator = np.random.default_rng(0)
    return generator.integers(0, 255, (60, 20, 20), dtype=np.uint8), generator.choice(["cat", "dog"], 60)


@pytest.mark.parametrize("kind", ["images", "rows", "series", "table", "text"])
def test_results_of_fit(kind):
    """The export of a result predicts what the result predicts, with its classes, and evaluates the same."""
    options = {"epochs": 1, "verbose": False}
    numbers = np.random.default_rng(1).normal(size=(80, 3)).astype(np.float32)
    if kind == "images":
        samples, labels = images_and_labels()
        result = lightkit.fit("cnn", samples, labels, **options)
    elif kind == "rows":
        samples, labels = numbers, numbers[:, 0].astype(np.float64) * 100 + 1e6
        result = lightkit.fit(MLP(3, 1), samples, labels, **options)
    elif kind == "series":
        series = np.sin(np.arange(200) / 5)
        samples, labels = np.stack([series[:12], series[5:17]]), None
        result = lightkit.fit(RNN(1, 8, 4), series, history=12, **options)
    elif kind == "table":
        pandas = pytest.importorskip("pandas")
        samples = pandas.DataFrame({"a": numbers[:, 0], "b": np.where(numbers[:, 1] > 0, "u", "v"), "c": numbers[:, 2]})
        labels = "c"
        result = lightkit.fit("mlp", samples, labels, **options)
    else:
        text = "the quick brown fox jumps over the lazy dog. " * 60
        result = lightkit.fit(Transformer(256, 16, 1, 2, 16), text, history=16, **options)
        agreement = result.export("a.pt2")
        # The norms of the model in float64 have the epsilon of float32: the error is one of rounding alone.
        assert agreement.differing == 0 and agreement.model_error < 1e-5
        again = lightkit.load("a.pt2", trust=True)
        prompt = torch.tensor([1, 2, 3])
        assert again.task.generate(prompt, 20, 0).tolist() == result.task.generate(prompt, 20, 0).tolist()
        return
    agreement = result.export("a.pt2", samples)
    assert agreement.is_rounding and agreement.samples == len(samples)
    again = lightkit.load("a.pt2", trust=True)
    np.testing.assert_allclose(again.predict(samples), result.predict(samples), rtol=1e-5, atol=1e-6)
    assert again.classes == result.classes
    if labels is not None:
        assert again.evaluate(samples, labels) == pytest.approx(result.evaluate(samples, labels), rel=1e-4)


def test_a_module_of_the_users_own():
    """A class of which lightkit knows nothing is in the file with its operations, and loads without the class."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = torch.nn.Conv2d(1, 4, 3, bias=False), torch.nn.BatchNorm2d(4)
            self.head = torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.norm(self.layer(x)).relu().mean((2, 3)))

    samples, labels = images_and_labels()
    result = lightkit.fit(Net(), samples, labels, epochs=1, verbose=False)
    result.export("a.pt2", samples)
    again = lightkit.load("a.pt2", trust=True)
    np.testing.assert_allclose(again.predict(samples), result.predict(samples), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"a\.pt2 is an export, which has its own"):
        lightkit.load("a.pt2", Net(), trust=True)


@pytest.mark.slow
def test_ensembles(command):
    """Several checkpoints become one file, and exports are members of an ensemble."""
    for number in range(2):
        save(f"{number}.ckpt", CNN, number)
    assert command(export, "ckpt_path=[0.ckpt,1.ckpt]", "format=pt2")[2].startswith("error: output=FILE.pt2 must name")
    status, _, err = command(export, "ckpt_path=[0.ckpt,1.ckpt]", "format=pt2", "output=both.pt2")
    assert status == 0, err
    expected = measure(command, "[0.ckpt,1.ckpt]")
    assert measure(command, "both.pt2", "trust=true")["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-5)
    export_checkpoints([Path("1.ckpt")], Path("1.pt2"))
    mixed = measure(command, "[1.pt2,1.ckpt]", "trust=true")
    assert mixed["test/loss"] == pytest.approx(expected["members"][1]["test/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["format=onxx"], "format must be executorch, onnx, openvino, pt2, got 'onxx'"),
        (["format=pt2", "output=a.onnx"], "output=a.onnx must end in .pt2 for format=pt2"),
        (["format=pt2", "output=nowhere/a.pt2"], "there is no directory"),
        (["format=pt2", "data_dir=nowhere"], "data_dir: MNIST5k does not read from a directory"),
    ],
)
def test_wrong_options(command, arguments, message):
    """Each wrong option is one line of error, before the work."""
    save("a.ckpt", CNN)
    status, _, err = command(export, "ckpt_path=a.ckpt", *arguments)
    assert status == 1 and message in err and err.count("error: ") == 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Returns an export of a CNN."""
    directory = tmp_path_factory.mktemp("exported")
    save(directory / "a.ckpt", CNN)
    export_checkpoints([directory / "a.ckpt"], directory / "a.pt2")
    return directory / "a.pt2"


@pytest.fixture
def changed(exported, monkeypatch):
    """Returns a function after whose call the export has other entries in its metadata."""
    runtime, metadata = open_export(exported, trust=True)

    def change(entries):
        monkeypatch.setattr("lightkit.app.exported.open_export", lambda *_: (runtime, {**metadata, **entries}))

    return change


def test_images_of_another_size(command, exported, changed):
    """An export that takes other images than the data have is one line of error."""
    changed({"config": {"task": CNN["task"], "data": {"_target_": "lightkit.data.MNIST5k", "layout": "rows"}}})
    status, _, err = command(evaluate, f"ckpt_path={exported}", "trust=true", "accelerator=cpu")
    assert (
        status == 1 and "the images of MNIST5k are 28 x 28 pixels, and the model of the checkpoint takes 1 x 28" in err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "has no configuration: lightkit.export did not write it"),
        ({"config": {"task": {"_target_": "os.system"}}}, "is not among the classes"),
        ({"config": {"task": CNN["task"], "data": {"_target_": "os.system"}}}, "is not among the classes"),
        ({"state": []}, "lack the state of the data"),
        ({"buffers": {"x": {"dtype": "float32", "shape": [2**62], "values": [1]}}}, "x of its metadata is no tensor"),
        ({"buffers": {"x": {"dtype": "object", "shape": [1], "values": [1]}}}, "x of its metadata is no tensor"),
        ({"buffers": {}}, "is a checkpoint of another model: loss.weight is missing"),
        ({"config": {"task": {"_target_": "lightkit.tasks.LanguageModelTask"}, "data": None}}, "is no language model"),
    ],
)
def test_metadata_of_strangers(exported, changed, change, message):
    """Metadata that name other classes or hold no tensors are one error, and build nothing."""
    changed(change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        lightkit.load(exported, trust=True)


def test_the_program_of_the_documentation(tmp_path):
    """The program without lightkit prints the class that lightkit predicts."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    save("a.ckpt", CNN, 3)
    export_checkpoints([Path("a.ckpt")], Path("digits.onnx"))
    Image.effect_noise((28, 28), 90).save("seven.png")
    program = re.search(r"## Without lightkit.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert len([line for line in program.splitlines() if line.strip()]) <= 11
    expected = predict_from("digits.onnx", input="seven.png").images[0].label
    blocked = "import sys; sys.modules['lightkit'] = sys.modules['torch'] = None\n"
    result = subprocess.run([sys.executable, "-c", blocked + program], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == expected, result.stderr
