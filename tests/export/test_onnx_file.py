"""ONNX files of strangers: the file makes ONNX Runtime compute, and nothing else, or is one error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from side_effects import watched  # noqa: E402

from lightkit.errors import CheckpointError  # noqa: E402
from lightkit.export import InputSpec, export_model, open_export  # noqa: E402

NUMBERS = InputSpec("numbers", "float32", ("batch", 4))


def model_of(*nodes, initializers=(), functions=(), opsets=(), inputs=None):
    """Returns an ONNX model that maps ``x`` to ``y``."""
    shape = ["batch", 4]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)] if inputs is None else inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        list(initializers),
    )
    imports = [helper.make_opsetid("", 20), *opsets]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=9)


def save(path: Path, model) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def weights(name="w", value=None):
    return numpy_helper.from_array(np.ones((4, 2), np.float32) if value is None else value, name)


ADD = helper.make_node("MatMul", ["x", "w"], ["y"])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Returns the bytes of an export of lightkit."""
    path = tmp_path_factory.mktemp("written") / "a.onnx"
    export_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), [NUMBERS], path, metadata={"a": 1})
    return path.read_bytes()


def test_a_plain_onnx_file_runs(tmp_path):
    """A file that lightkit did not write runs, too, with the forms of its own inputs."""
    runtime, metadata = open_export(save(tmp_path / "a.onnx", model_of(ADD, initializers=[weights()])))
    assert metadata == {} and runtime.inputs == (InputSpec("x", "float32", ("batch", 4)),)
    np.testing.assert_array_equal(runtime.run([np.ones((3, 4), np.float32)]), np.full((3, 2), 4.0))


@pytest.mark.parametrize("place", ["secret.bin", "../secret.bin", "/etc/hostname"])
@pytest.mark.parametrize("where", ["initializer", "constant", "sparse"])
def test_weights_in_other_files_are_not_read(tmp_path, monkeypatch, place, where):
    """A file that names another file, within its folder or outside, is an error, and nothing opens the other one."""
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for directory in (tmp_path, tmp_path / "inner"):
        (directory / "secret.bin").write_bytes(np.ones((4, 2), np.float32).tobytes())
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": place, "offset": "0", "length": "32"}.items():
        outside.external_data.add(key=key, value=value)
    if where == "initializer":
        model = model_of(ADD, initializers=[outside])
    elif where == "constant":
        constant = helper.make_node("Constant", [], ["w"])
        constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=outside)
        model = model_of(constant, ADD)
    else:
        model = model_of(ADD)
        sparse = model.graph.sparse_initializer.add(dims=[4, 2])
        sparse.values.CopyFrom(outside)
    path = save(tmp_path / "inner" / "a.onnx", model)
    with watched() as acts, pytest.raises(CheckpointError, match="has weights in another file"):
        open_export(path)
    assert [act for act in acts if act.startswith("open") and str(path) not in act] == []


def hostile_models():
    body = helper.make_graph([], "b", [], [])
    yield (
        "loop",
        model_of(helper.make_node("Loop", ["", ""], ["y"], body=body)),
        "the operator Loop with a graph within",
    )
    yield "domain", model_of(helper.make_node("Evil", ["x"], ["y"], domain="evil")), "the operator evil.Evil"
    node = helper.make_node("Identity", ["a"], ["b"])
    function = helper.make_function("own", "F", ["a"], ["b"], [node], [helper.make_opsetid("", 20)])
    yield "function", model_of(ADD, initializers=[weights()], functions=[function]), "has functions or training"
    short = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 2], raw_data=b"1234")
    yield "short", model_of(ADD, initializers=[short]), "w has not the size that it declares"
    huge = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 40, 1 << 40])
    yield "huge", model_of(ADD, initializers=[huge]), "w has not the size that it declares"
    negative = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[-4, -2], raw_data=bytes(32))
    yield "negative", model_of(ADD, initializers=[negative]), "w has not the size that it declares"
    unknown = TensorProto(name="w", data_type=99, dims=[4, 2], raw_data=bytes(32))
    yield "dtype", model_of(ADD, initializers=[unknown]), "w has not the size that it declares"
    yield "operator", model_of(helper.make_node("Nothing", ["x"], ["y"])), "cannot be run by ONNX Runtime"
    yield "dangling", model_of(ADD), "cannot be run by ONNX Runtime"
    texts = [helper.make_tensor_value_info("x", TensorProto.STRING, ["batch"])]
    identity = helper.make_node("StringNormalizer", ["x"], ["y"])
    yield "texts", model_of(identity, inputs=texts), "cannot be run by ONNX Runtime|is no export of lightkit"
    fixed = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])]
    yield "fixed", model_of(ADD, initializers=[weights()], inputs=fixed), "the batch of its input x is fixed"
    yield "empty", onnx.ModelProto(), "is damaged or no ONNX model"
    for name, text in {
        "json": "{",
        "list": "[1]",
        "deep": "[" * 100_000,
        "inputs": '{"inputs": [{"name": 1}]}',
    }.items():
        model = model_of(ADD, initializers=[weights()])
        model.metadata_props.add(key="lightkit", value=text)
        yield f"metadata-{name}", model, "its metadata is|does not say the form of its inputs"
    model = model_of(ADD, initializers=[weights()])
    other = {"inputs": [{"name": "z", "dtype": "float32", "shape": ["batch", 5]}]}
    model.metadata_props.add(key="lightkit", value=json.dumps(other))
    yield "metadata-other", model, "its metadata give other inputs than the model has"


@pytest.mark.parametrize(("model", "message"), [pytest.param(m, text, id=name) for name, m, text in hostile_models()])
def test_hostile_files(tmp_path, model, message):
    """Each is one printable error with the name of the file."""
    path = save(tmp_path / "a.onnx", model)
    with pytest.raises(CheckpointError, match=message) as error:
        open_export(path)
    assert str(path) in str(error.value) and str(error.value).isprintable()


def test_a_file_that_computes_too_much_memory(tmp_path):
    """An operation that asks for terabytes is an error of the run, and no crash."""
    shape = numpy_helper.from_array(np.array([1 << 20, 1 << 22, 4]), "s")
    path = save(tmp_path / "a.onnx", model_of(helper.make_node("Expand", ["x", "s"], ["y"]), initializers=[shape]))
    runtime, _ = open_export(path)
    with pytest.raises(RuntimeError, match="ONNX Runtime: "):
        runtime.run([np.ones((1, 4), np.float32)])


def test_truncated_and_changed_files(tmp_path, written):
    """A file that ends early or has other weights is an error, wherever it ends and whatever has changed."""
    path = tmp_path / "a.onnx"
    for length in range(0, len(written), 97):
        path.write_bytes(written[:length])
        with pytest.raises(CheckpointError):
            open_export(path)
    weight = next(tensor.raw_data for tensor in onnx.load_model_from_string(written).graph.initializer)
    place = written.index(weight)
    path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
    with pytest.raises(CheckpointError, match="its weights are not those that were written"):
        open_export(path)


def test_random_changes_never_crash(tmp_path, written):
    """A file with any changed byte runs or is one error."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        place = int(torch.randint(len(written), (), generator=generator))
        changed = bytearray(written)
        changed[place] = int(torch.randint(256, (), generator=generator))
        (tmp_path / "a.onnx").write_bytes(changed)
        try:
            runtime, _ = open_export(tmp_path / "a.onnx")
            runtime.run([spec.check(np.ones((2, 4), np.float32)) for spec in runtime.inputs])
        except (CheckpointError, RuntimeError, ValueError) as error:
            assert str(error)


def test_settings_of_a_session_in_a_file_have_no_effect(tmp_path, written, monkeypatch):
    """ONNX Runtime can take settings from a file, which lightkit removes before."""
    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    model = onnx.load_model_from_string(written)
    settings = {"session_options": {"enable_profiling": True, "optimized_model_filepath": str(tmp_path / "evil")}}
    model.metadata_props.add(key="ort_config", value=json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    open_export(save(tmp_path / "a.onnx", model))
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]
