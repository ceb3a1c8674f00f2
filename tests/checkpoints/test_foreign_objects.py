"""A checkpoint with an object that is no plain data is not called damaged: the error has the object's key and type."""

from __future__ import annotations

import argparse
import datetime
import enum
import functools
import io
import os
import pathlib
import pickle
import zipfile

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.trainers import bare_trainer
from torch.utils.data import DataLoader

from lightkit._util.printable import printable
from lightkit.checkpoints import AtomicCheckpointIO, load_checkpoint
from lightkit.checkpoints.foreign_objects import find_foreign_object
from lightkit.errors import CheckpointError


class Kind(enum.Enum):
    ONE = 1


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


OBJECTS = {
    "path": (pathlib.PurePosixPath("data"), "root is of type pathlib.PurePosixPath"),
    "configuration": (OmegaConf.create({"a": 1}), "root is of type omegaconf.dictconfig.DictConfig"),
    "NumPy scalar": (np.float64(0.1), "root is a NumPy scalar"),
    "NumPy array": (np.arange(3), "root is a NumPy array"),
    "namespace": (argparse.Namespace(a=1), "root is of type argparse.Namespace"),
    "enum": (Kind.ONE, f"root is of type {__name__}.Kind"),
    "time": (datetime.timedelta(1), "root is of type datetime.timedelta"),
    "class": (torch.optim.Adam, "root is the class or function torch.optim.adam.Adam"),
    "partial": (functools.partial(max), "root is of type functools.partial"),
    "range": (range(3), "root is of type range"),
    "module": (torch.nn.ReLU(), "root is of type torch.nn.modules.activation.ReLU"),
    "within": ([1, {"a": (2, np.int64(3))}], "root[1].a[1] is a NumPy scalar"),
    "code": (Evil(), "root is of type posix.system"),
    "escape": ({"\x1b[2J": Kind.ONE}, r"root.\x1b[2J is of type"),
}


def saved(value, **options):
    """Returns a checkpoint, as Lightning saves the hyperparameters of a module, as bytes."""
    buffer = io.BytesIO()
    content = {"state_dict": {"w": torch.zeros(3)}, "hyper_parameters": {"lr": 0.1, "root": value}}
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", OBJECTS)
def test_key_and_type(tmp_path, monkeypatch, name, protocol):
    """The error has both, for a Trainer's own file and for a stranger's, and no code runs."""
    monkeypatch.chdir(tmp_path)
    value, expected = OBJECTS[name]
    path = tmp_path / "x.ckpt"
    path.write_bytes(saved(value, pickle_protocol=protocol))
    loads = [AtomicCheckpointIO().load_checkpoint, load_checkpoint, functools.partial(load_checkpoint, untrusted=True)]
    for load in loads:
        with pytest.raises(CheckpointError) as error:
            load(path)
        assert f"hyper_parameters.{expected}" in str(error.value) and "\n" not in str(error.value)
        assert "damaged" not in str(error.value) and "loads only by running code" in str(error.value)
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_a_trainer_says_how_to_load(tmp_path):
    """A training of a module with such hyperparameters resumes as the error says."""

    class Module(pl.LightningModule):
        def __init__(self, root):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, data = Module(pathlib.Path("data")), DataLoader(torch.ones(2, 1))
    trainer = bare_trainer(plugins=[AtomicCheckpointIO()])
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = bare_trainer(plugins=[AtomicCheckpointIO()], max_epochs=2)
    with pytest.raises(CheckpointError, match=r"root is of type pathlib\.\w+, .* with weights_only=False"):
        again.fit(module, data, ckpt_path=tmp_path / "x.ckpt")
    again.fit(module, data, ckpt_path=tmp_path / "x.ckpt", weights_only=False)
    assert again.global_step == 4


def test_plain_data_is_not_foreign():
    """Tensors, parameters and plain values are no objects to report."""
    plain = [torch.nn.Parameter(torch.ones(2)), {1, 2}, 1 + 2j, torch.float16, torch.Size([2]), torch.device("cpu")]
    assert find_foreign_object(io.BytesIO(saved(plain))) is None


def test_endless_structures():
    """An object that contains itself, and tuples that hold each other twice, end the search at once."""
    loop: list = [1]
    loop.append(loop)
    doubled: tuple = ()
    for _ in range(200):
        doubled = (doubled, doubled)
    found = find_foreign_object(io.BytesIO(saved([loop, doubled, np.int8(1)])))
    assert found == "hyper_parameters.root[2] is a NumPy scalar"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400), st.booleans())
def test_any_bytes(noise, place, whole):
    """A damaged or crafted pickle never raises another error, imports nothing and runs nothing."""
    good = pickle.dumps({"state_dict": {}, "hyper_parameters": {"root": Evil(), "b": [1, (2, {"c": 3})]}}, 2)
    crafted = noise if whole else good[:place] + noise + good[place + len(noise) :]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", crafted)
    found = find_foreign_object(buffer)
    assert found is None or printable(found) == found
