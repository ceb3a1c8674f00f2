"""Quantized models as exports: int8 weights and roundings that other runtimes know, and the labels of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightkit.compress import QUANTIZATION_KEY, QuantizationScheme, apply_quantization, calibrate
from lightkit.export import ExportedModel, InputSpec, export_model, open_export
from lightkit.models import CNN

IMAGES = InputSpec("images", "float32", ("batch", 1, 12, 12))


class Stranger(nn.Module):
    """A quantized convolution with a batch norm, whose output is added to its input, before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, images):
        x = self.first(images).relu()
        return self.head((self.norm(self.second(x)) + x).mean((2, 3)))


@pytest.fixture(params=["cnn", "stranger"])
def model(request):
    """A model with weights of 8 bits and rounded inputs, one of them with negative values."""
    torch.manual_seed(0)
    net = CNN(image_size=18) if request.param == "cnn" else Stranger()
    net.eval()
    x = torch.randn(32, 1, *size_of(net))
    spec = calibrate(net, QuantizationScheme(8), lambda: net(x))
    apply_quantization(net, {QUANTIZATION_KEY: spec})
    return net


def size_of(net):
    return (18, 18) if isinstance(net, CNN) else (12, 12)


def check(net, path, batch=5):
    inputs = [replace(IMAGES, shape=("batch", 1, *size_of(net)))]
    export_model(net, inputs, path)
    runtime, _ = open_export(path, trust=True)
    x = torch.randn(batch, 1, *size_of(net), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = net(x)
    actual = ExportedModel(runtime)(x)
    # A sum that another order of additions moves to the next level changes an output by about a hundredth of them.
    assert float((actual - expected).abs().max()) < 0.05 * float(expected.std())
    return expected


def test_onnx(tmp_path, model):
    """Every weight is int8 with a scale a channel, and each rounding a pair of operations that runtimes fuse."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    check(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    sizes = [list(tensor.dims) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert sum(len(dims) > 1 for dims in sizes) == len(layers)
    assert not [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    operations = [node.op_type for node in graph.node]
    assert operations.count("QuantizeLinear") == len(layers)
    assert operations.count("DequantizeLinear") == 2 * len(layers)


@pytest.mark.parametrize(
    ("instructions", "is_float"),
    [(("sse4_1", "avx2"), True), (("sse4_1", "avx512f", "avx512_vnni"), False), (("asimd",), False)],
)
def test_onnx_runtime_without_vnni(tmp_path, monkeypatch, model, instructions, is_float):
    """On x86 without VNNI, where ONNX Runtime's products of integers saturate, it computes in float."""
    pytest.importorskip("onnxscript")
    export_model(model, [replace(IMAGES, shape=("batch", 1, *size_of(model)))], tmp_path / "model.onnx")
    monkeypatch.setattr("lightkit.export.onnx_file.processor", lambda: frozenset(instructions))
    onnxruntime = pytest.importorskip("onnxruntime")
    entries = []

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key, value):
            entries.append((key, value))
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    open_export(tmp_path / "model.onnx", trust=True)
    assert (("session.disable_quant_qdq", "1") in entries) == is_float


def test_pt2(tmp_path, model):
    """A .pt2 file has operations of torch alone, which need no registration of others."""
    check(model, tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize(("package", "suffix"), [("openvino", ".xml"), ("executorch", ".pte")])
def test_other_runtimes(tmp_path, model, package, suffix):
    """OpenVINO and ExecuTorch compute what the model computes, too."""
    pytest.importorskip(package)
    pytest.importorskip("onnxscript")
    check(model, tmp_path / f"model{suffix}")


def test_the_model_stays_as_it_is(tmp_path, model):
    """The export works on a copy: the model keeps its weights and roundings."""
    x = torch.randn(3, 1, *size_of(model))
    with torch.no_grad():
        before = model(x)
    check(model, tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.equal(model(x), before)
    assert not hasattr(next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), "parametrizations")
