"""Any module as an export: the same outputs for each batch and length, and nothing of the run."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightkit.errors import CheckpointError, ConfigError
from lightkit.export import ExportedModel, InputSpec, export_model, format_of, open_export
from lightkit.models import CNN, MLP, RNN, Ensemble, RNNLanguageModel, Transformer
from lightkit.nn import FusedSequential

IMAGES = InputSpec("images", "float32", ("batch", 3, 9, 9))
SEQUENCES = InputSpec("sequences", "float32", ("batch", "length", 6))
TOKENS = InputSpec("tokens", "int64", ("batch", "length"), 12)


class Stranger(nn.Module):
    """A network with attributes, a residual connection, and batch norms after convolutions and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8, affine=False)
        self.head, self.head_norm = nn.Linear(8, 5), nn.BatchNorm1d(5)
        for norm in (self.first_norm, self.second_norm, self.head_norm):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(self.first_norm.weight)

    def forward(self, images):
        x = self.first_norm(self.first(images)).relu()
        x = self.second_norm(self.second(x)) + x
        return self.head_norm(self.head(x.mean((2, 3))))


def rnn(cell, **options):
    return RNN(6, 5, 4, cell=cell, **options)


MODELS = {
    "cnn": (CNN(in_channels=3, image_size=18), [InputSpec("images", "float32", ("batch", 3, 18, 18))]),
    "lstm": (rnn("lstm", num_layers=2, bidirectional=True), [SEQUENCES]),
    "gru": (rnn("gru", num_layers=2), [SEQUENCES]),
    "elman": (rnn("elman", bidirectional=True), [SEQUENCES]),
    "char_rnn": (RNNLanguageModel(16, 8, tie_weights=True), [TOKENS]),
    "transformer": (Transformer(16, 8, 2, 2, 12), [TOKENS]),
    "mlp": (
        MLP(4, 3, [5, 7], norm="batch"),
        [InputSpec("numbers", "float32", ("batch", 4)), InputSpec("categories", "int64", ("batch", 2))],
    ),
    "stranger": (Stranger(), [IMAGES]),
    "ensemble": (Ensemble([Stranger(), Stranger()]), [IMAGES]),
    "fused": (
        FusedSequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)),
        [IMAGES],
    ),
}

# An ONNX export takes seconds; these have all that is written by lightkit.
FAST = ("lstm", "stranger")


def samples(inputs, batch, length):
    sizes = {"batch": batch, "length": length}
    shapes = [[sizes.get(size, size) for size in spec.shape] for spec in inputs]
    return [
        torch.randint(0, 4, shape) if spec.dtype == "int64" else torch.randn(shape)
        for spec, shape in zip(inputs, shapes, strict=True)
    ]


def content_of(path: Path) -> bytes:
    """Returns all bytes of a file, of an archive those of its entries."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


def cases() -> list[Any]:
    found = []
    for name in MODELS:
        found.append(pytest.param(name, ".pt2", id=f"{name}-pt2"))
        marks = () if name in FAST else pytest.mark.slow
        found.append(pytest.param(name, ".onnx", marks=marks, id=f"{name}-onnx"))
    return found


@pytest.mark.parametrize(("name", "suffix"), cases())
def test_an_export_computes_what_the_model_computes(tmp_path, name, suffix):
    """Outputs agree for each batch and length, and the file has no path, no source line and no class of lightkit."""
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model, inputs = MODELS[name]
    path = tmp_path / f"model{suffix}"
    torch.manual_seed(0)
    export_model(model.eval(), inputs, path, metadata={"a": [1]})
    runtime, metadata = open_export(path, trust=True)
    assert metadata["a"] == [1] and runtime.inputs == tuple(inputs)
    exported = ExportedModel(runtime)
    for batch, length in ((1, 1), (3, 7), (2, 12)):
        values = samples(inputs, batch, length)
        torch.testing.assert_close(exported(*values), model(*values), rtol=1e-4, atol=1e-5)
    content = content_of(path)
    for word in (str(tmp_path), str(Path.home()), ".py", "torch.nn.modules", "lightkit.models", "tests"):
        assert word.encode() not in content
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn", "gru", "transformer", "stranger"])
def test_openvino(tmp_path, name):
    """The two files of OpenVINO give the outputs of the model, in float32 whatever the processor prefers."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    model, inputs = MODELS[name]
    path = tmp_path / "model.xml"
    export_model(model.eval(), inputs, path, metadata={"a": [1]})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    runtime, metadata = open_export(path, trust=True)
    assert metadata["a"] == [1] and runtime.inputs == tuple(inputs)
    for batch, length in ((1, 1), (3, 7), (2, 12)):
        values = samples(inputs, batch, length)
        torch.testing.assert_close(ExportedModel(runtime)(*values), model(*values), rtol=1e-4, atol=1e-5)
    assert str(tmp_path).encode() not in path.read_bytes()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"model\.xml is damaged or no model of OpenVINO"):
        open_export(path, trust=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gru", "stranger"])
def test_executorch(tmp_path, name):
    """The program of ExecuTorch gives the outputs of the model, sample by sample."""
    pytest.importorskip("executorch")
    model, inputs = MODELS[name]
    inputs = [replace(spec, shape=tuple(7 if size == "length" else size for size in spec.shape)) for spec in inputs]
    path = tmp_path / "model.pte"
    export_model(model.eval(), inputs, path, metadata={"a": [1]})
    runtime, metadata = open_export(path, trust=True)
    assert metadata["a"] == [1] and runtime.inputs == tuple(inputs)
    values = samples(inputs, 3, 7)
    torch.testing.assert_close(ExportedModel(runtime)(*values), model(*values), rtol=1e-4, atol=1e-5)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"model\.pte is damaged or no program of ExecuTorch"):
        open_export(path, trust=True)


def test_batch_norms_become_parts_of_other_layers(tmp_path):
    """The file of a network with batch norms has none of them, and keeps one whose input has two readers."""
    export_model(Stranger().eval(), [IMAGES], tmp_path / "a.pt2")
    operations = [str(node.target) for node in torch.export.load(tmp_path / "a.pt2").graph.nodes]
    assert "aten.conv2d.default" in operations and "aten.batch_norm.default" not in operations

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)

        def forward(self, images):
            x = self.layer(images)
            return self.norm(x) + x

    export_model(Shared().eval(), [IMAGES], tmp_path / "b.pt2")
    operations = [str(node.target) for node in torch.export.load(tmp_path / "b.pt2").graph.nodes]
    assert "aten.batch_norm.default" in operations


def test_a_pt2_export_needs_no_lightkit(tmp_path):
    """The file of fused and of recurrent layers has operations of torch alone."""
    for name in ("cnn", "lstm"):
        model, inputs = MODELS[name]
        export_model(model, inputs, tmp_path / "a.pt2")
        nodes = torch.export.load(tmp_path / "a.pt2").graph.nodes
        assert {str(node.target).partition(".")[0] for node in nodes if node.op == "call_function"} <= {
            *("aten", "<built-in function getitem>", "<built-in function mul>"),
        }


def test_the_model_stays_as_it_is(tmp_path):
    """An export changes neither the mode nor the dtype of the model."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(243, 2), nn.Dropout()).double()
    export_model(model, [IMAGES], tmp_path / "a.pt2")
    assert model.training and model[1].weight.dtype == torch.float64 and model[1].weight.requires_grad


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([np.zeros((2, 3, 9, 8))], r"takes images of shape \(batch, 3, 9, 9\), got \(2, 3, 9, 8\)"),
        ([np.zeros((0, 3, 9, 9))], "takes images of shape"),
        ([np.zeros((3, 9, 9))], "takes images of shape"),
        ([], "takes images, got 0 inputs"),
    ],
)
def test_inputs_of_another_shape(tmp_path, arrays, message):
    """A wrong input is an error that names it, before native code sees it."""
    export_model(MODELS["fused"][0], [IMAGES], tmp_path / "a.pt2")
    exported = ExportedModel(open_export(tmp_path / "a.pt2", trust=True)[0])
    with pytest.raises(ValueError, match=message):
        exported(*map(torch.from_numpy, arrays))


def test_a_length_beyond_the_context():
    """A text that is longer than the model reads is an error."""
    with pytest.raises(ValueError, match="length of at most 12"):
        TOKENS.check(np.zeros((1, 13), dtype=np.int64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "float16", ("batch", 3)), "dtype of the input 'x' must be float32 or int64, got 'float16'"),
        (("x", "float32", (2, 3)), "shape of the input 'x'"),
        (("x", "float32", ("batch", "width")), "shape of the input 'x'"),
    ],
)
def test_forms_that_no_export_has(arguments, message):
    """A form says which of its arguments is wrong."""
    with pytest.raises(ValueError, match=message):
        InputSpec(*arguments)


def test_models_that_cannot_be_recorded(tmp_path):
    """A model whose operations depend on values, or that returns several tensors, is one error, and writes no file."""

    class Asks(nn.Module):
        def forward(self, images):
            return images.flatten(1) if images.sum() > 0 else -images.flatten(1)

    class Pair(nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(ConfigError, match=r"torch\.export cannot record Asks: "):
        export_model(Asks(), [IMAGES], tmp_path / "a.pt2")
    with pytest.raises(ConfigError, match="cannot record Pair: the model returns a tuple, expected one tensor"):
        export_model(Pair(), [IMAGES], tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_names_of_formats(tmp_path, monkeypatch):
    """The suffix decides on the format, and a missing package is an error that names it."""
    assert format_of("a/b.ONNX") == "onnx" and format_of("a.ckpt") is None
    with pytest.raises(ConfigError, match=r"the name of an export must end in \.pte, \.onnx, \.xml, \.pt2"):
        export_model(Stranger(), [IMAGES], tmp_path / "a.bin")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"format=onnx needs onnx, onnxscript, onnxruntime: pip install .*\[export\]"):
        export_model(Stranger(), [IMAGES], tmp_path / "a.onnx")


def test_a_format_that_can_run_code_needs_trust(tmp_path):
    """A .pt2 is read only with trust=True: torch unpickles tensors of it."""
    export_model(MODELS["fused"][0], [IMAGES], tmp_path / "a.pt2")
    with pytest.raises(CheckpointError, match="can run code when it is loaded; trust=true loads"):
        open_export(tmp_path / "a.pt2")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"nothing"])
def test_damaged_pt2_files(tmp_path, content):
    """A file that is no .pt2 is one error with its name."""
    (tmp_path / "a.pt2").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt2 is damaged or no file of torch\.export"):
        open_export(tmp_path / "a.pt2", trust=True)
    with pytest.raises(CheckpointError, match="there is no export"):
        open_export(tmp_path / "b.pt2", trust=True)
