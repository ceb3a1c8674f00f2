"""Weights of another training are loaded whole, except for a new head; anything else is one error and no change."""

from __future__ import annotations

import json
import struct

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightkit.errors import CheckpointError, ConfigError
from lightkit.finetune import load_initial_weights
from lightkit.finetune.name_mapping import map_names
from lightkit.models import CNN, RNN, Transformer


class Net(nn.Module):
    """A body with a batch norm and a head."""

    def __init__(self, classes=3, width=4, head="head"):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
        setattr(self, head, nn.Linear(width, classes))


class Wrapped(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.fixture
def file(tmp_path):
    """Returns a function that saves an object and returns the path."""

    def save(content, name="a.pt", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


def is_equal(module, state, prefix=""):
    return all(torch.equal(value, state[prefix + name]) for name, value in module.state_dict().items())


def test_the_forms_of_files(file):
    """Programs save a state dict alone, under some key, in Lightning's form, wrapped by DDP or compiled, or in half."""
    source = Net()
    state = source.state_dict()
    forms = [
        state,
        {"model": state, "optimizer": {"state": {}}, "epoch": 3},
        {"model_state_dict": state, "loss": 0.5},
        {"anything": state},
        {"state_dict": {f"model.{name}": value for name, value in state.items()}, "epoch": 1, "loops": {}},
        {"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}},
        {f"module.{name}": value for name, value in state.items()},
        {"state_dict": {f"module.net.{name}": value for name, value in state.items()}},
        # The averages of a training with averaged weights are the state dict.
        {"state_dict": state, "current_model_state": Net().state_dict()},
        {name: nn.Parameter(value) for name, value in state.items() if value.is_floating_point()},
    ]
    for content in forms:
        module = Net()
        found = load_initial_weights(module, file(content))
        assert is_equal(module, state | {"body.1.num_batches_tracked": module.body[1].num_batches_tracked}), content
        assert found.new == () and found.left_out == ()
    module = Net()
    load_initial_weights(module, file(state, _use_new_zipfile_serialization=False))
    assert is_equal(module, state)
    load_initial_weights(module, file({name: value.half() for name, value in state.items()}))
    assert module.head.weight.dtype == torch.float32


def test_into_a_lightning_module(file):
    """The names of a module around the model are found, whichever of the two the file is of."""
    state = Net().state_dict()
    module = Wrapped(Net())
    load_initial_weights(module, file(state))
    assert is_equal(module.model, state)


def safetensors(tensors, path):
    """Writes the format of safetensors, as its documentation describes it."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors(tmp_path):
    """The format of safetensors needs no package."""
    state = Net().state_dict()
    module = Net()
    load_initial_weights(module, safetensors(state, tmp_path / "a.safetensors"))
    assert is_equal(module, state)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 300), value=st.integers(0, 255), length=st.integers(0, 700))
def test_damaged_safetensors(tmp_path_factory, place, value, length):
    """A damaged file is an error in one line, or other numbers: never another exception."""
    path = safetensors(
        {"weight": torch.ones(3, 4), "bias": torch.ones(3)}, tmp_path_factory.getbasetemp() / "b.safetensors"
    )
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content[: max(length, 1)])
    try:
        load_initial_weights(nn.Linear(4, 3), path)
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("source", "target", "new"),
    [
        (CNN(num_classes=10), CNN(num_classes=3), ["classifier.3.weight", "classifier.3.bias"]),
        (RNN(4, 8, 10), RNN(4, 8, 2), ["head.weight", "head.bias"]),
        (Net(3), Net(7), ["head.weight", "head.bias"]),
        # The file has no head, as that of a backbone.
        (Net().body, Net().body, []),
        (nn.Sequential(*Net().body, nn.ReLU()), nn.Sequential(*Net().body, nn.Linear(4, 2)), ["4.weight", "4.bias"]),
    ],
)
def test_another_head(file, source, target, new):
    """A head for other classes keeps its own values, everything else is the file's."""
    own = {name: value.clone() for name, value in target.state_dict().items()}
    state = source.state_dict()
    found = load_initial_weights(target, file(state))
    assert sorted(found.new) == sorted(new)
    for name, value in target.state_dict().items():
        assert torch.equal(value, own[name] if name in new else state[name])
    if new:
        assert str(found).startswith(f"{len(found.loaded)} tensors loaded; new: ")


def test_a_missing_and_a_replaced_head(file):
    """A backbone's file has no head, and another library calls the head otherwise."""
    module = Net()
    body = module.body.state_dict()
    found = load_initial_weights(module, file({f"body.{name}": value for name, value in body.items()}))
    assert found.new == ("head.weight", "head.bias")
    # The backbone alone, under the names that it has itself.
    assert load_initial_weights(module, file(Net().body.state_dict())).new == ("head.weight", "head.bias")
    found = load_initial_weights(module, file(Net(9, head="fc").state_dict()))
    assert found.new == ("head.weight", "head.bias") and found.left_out == ("fc.weight", "fc.bias")
    assert str(found) == "9 tensors loaded; new: head.weight, head.bias; not of the model: fc.weight, fc.bias"


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (Net(width=6), Net(width=4), r"body.0.weight is \(6, 5\), expected \(4, 5\)"),
        # A deeper model is another one, although its last layer is missing from the file.
        (
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
            nn.Sequential(*[nn.Linear(4, 4)] * 2, nn.Linear(4, 2)),
            "1.w",
        ),
        (Net().body, nn.Sequential(nn.Linear(5, 4)), r"1.weight is unknown here"),
        (nn.Sequential(nn.Linear(5, 4)), Net().body, r"1.weight is missing"),
        # Another vocabulary is no other head: the first layer has it, too.
        (Transformer(9, 8, 1, 2, 4), Transformer(7, 8, 1, 2, 4), r"is \(9, 8\), expected \(7, 8\)"),
        (nn.Embedding(9, 2), nn.Embedding(8, 2), "weight is"),
        (CNN(), RNN(4, 8, 2), "core.weight_ih_l0 is missing"),
    ],
)
def test_other_models(file, source, target, expected):
    """Any other difference is an error with the names, and the module keeps its weights."""
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"has the weights of another model: .*{expected}.*init_skip") as error:
        load_initial_weights(target, file(source.state_dict()))
    assert "\n" not in str(error.value)
    assert is_equal(target, before)


def test_skip(file):
    """Patterns leave tensors out, under the names of the model, of the module around it, or of the file."""
    state = Net(width=4).state_dict()
    for pattern in ("head", "head.*", "model.head", "*.weight", "head.weight"):
        module = Wrapped(Net())
        own = module.model.head.weight.clone()
        found = load_initial_weights(module, file(state), skip=[pattern])
        assert torch.equal(module.model.head.weight, own) and "model.head.weight" in found.new
    other = {**state, "extra.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"extra.weight is unknown here"):
        load_initial_weights(Net(), file(other))
    assert "extra.weight" not in load_initial_weights(Net(), file(other), skip="extra.*").left_out
    with pytest.raises(ConfigError, match=r"init_skip: 'haed.\*' matches no parameter or module; did you mean head"):
        load_initial_weights(Net(), file(state), skip=["haed.*"])
    with pytest.raises(ConfigError, match="init_skip must be a list of patterns of names"):
        load_initial_weights(Net(), file(state), skip=[3])


class Foreign:
    """An object that only its program can load."""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": 1}, "has no state dict"),
        (torch.ones(3), "has no state dict"),
        ({"encoder": {"w": torch.ones(1)}, "decoder": {"w": torch.ones(1)}}, "several state dicts, encoder, decoder"),
        ({"x": torch.ones(1)}, "has the weights of another model: .*body.0.weight is missing"),
        (
            {"state_dict": {"a": torch.ones(1)}, "hyper_parameters": Foreign()},
            r"is of type test_initial_weights.Foreign, which loads only by running code",
        ),
    ],
)
def test_files_without_weights(file, content, expected):
    """The error says what the file has instead."""
    with pytest.raises(CheckpointError, match=expected):
        load_initial_weights(Net(), file(content))


def test_no_file(tmp_path):
    """A missing file, a directory and a text are errors that name the path."""
    (tmp_path / "text.pt").write_text("hello")
    for name, expected in (("gone.pt", "there is no"), (".", "is a directory"), ("text.pt", "damaged or not a checkp")):
        with pytest.raises(CheckpointError, match=expected):
            load_initial_weights(Net(), tmp_path / name)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_initial_weights(Net(), tmp_path / "gone.safetensors")


NAMES = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join)


@settings(deadline=None)
@given(
    names=st.sets(NAMES, min_size=1),
    one=st.sampled_from(["", "model.", "module.net."]),
    other=st.sampled_from(["", "net."]),
)
def test_wrappers_are_found(names, one, other):
    """Whatever prefixes both sides have, each tensor gets the name of its own."""
    found = map_names([f"{one}{name}" for name in names], {f"{other}{name}": None for name in names})
    assert len(found) == len(names)
    assert set(found.values()) == {f"{other}{name}" for name in names}
