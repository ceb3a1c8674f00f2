"""A checkpoint with a changed bit is not loaded; an intact one is, whoever wrote it."""

from __future__ import annotations

import io
import random
import zipfile

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightkit.checkpoints import AtomicCheckpointIO, load_checkpoint
from lightkit.errors import CheckpointError

CONTENT = {
    "state_dict": {"a": torch.arange(300.0), "b": torch.arange(40)},
    "epoch": 3,
    "global_step": 7,
    "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(9.0)}}}],
    "pytorch-lightning_version": pl.__version__,
}


def same(one, other):
    """Returns True if both have the same tensors, numbers and strings at the same places."""
    if isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(other, dict):
        return isinstance(one, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in other)
    if isinstance(other, list):
        return isinstance(one, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture(params=["ours", "stock"])
def saved(request, tmp_path):
    """Returns a checkpoint, written by lightkit or by stock Lightning, and its content."""
    path = tmp_path / "x.ckpt"
    (AtomicCheckpointIO() if request.param == "ours" else TorchCheckpointIO()).save_checkpoint(CONTENT, path)
    return path


def test_any_flipped_bit_is_noticed(saved):
    """Each of 2,000 bits, 600 of them in headers, is detected, or the same content is loaded."""
    whole, chance, noticed = bytearray(saved.read_bytes()), random.Random(0), 0
    assert same(load_checkpoint(saved), CONTENT)
    everywhere = chance.sample(range(8 * len(whole)), 1400)
    at_the_end = chance.sample(range(8 * (len(whole) - 1200), 8 * len(whole)), 600)
    for bit in everywhere + at_the_end:
        damaged = whole.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        saved.write_bytes(damaged)
        try:
            assert same(load_checkpoint(saved), CONTENT), f"bit {bit}"
        except CheckpointError as error:
            noticed += 1
            assert str(saved) in str(error) and "\n" not in str(error)
    assert noticed > 300


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_the_trainer_notices_too(tmp_path, weights_only):
    """Both ways in which the plug-in loads detect damage."""
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert same(AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only), CONTENT)
    damaged = bytearray(path.read_bytes())
    # In the middle of the first tensor: torch loads other weights.
    damaged[damaged.index(CONTENT["state_dict"]["a"].numpy().tobytes()[400:500])] ^= 4
    path.write_bytes(damaged)
    assert not torch.equal(torch.load(path)["state_dict"]["a"], CONTENT["state_dict"]["a"])
    with pytest.raises(CheckpointError, match=r"x\.ckpt is damaged or not a checkpoint: its checksum is not that of"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=weights_only)


def test_others_load_ours(tmp_path):
    """Stock Lightning, torch, memory-mapped or not, and Python's zip module load the file."""
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert same(TorchCheckpointIO().load_checkpoint(path), CONTENT)
    assert same(torch.load(path, weights_only=True, mmap=True), CONTENT)
    assert same(torch.load(io.BytesIO(path.read_bytes())), CONTENT)
    assert zipfile.ZipFile(path).testzip() is None


def test_those_without_checksums_load(tmp_path):
    """torch's old format has no checksums, and its new one can be written without."""
    path = tmp_path / "x.ckpt"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    assert same(load_checkpoint(path), CONTENT)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(CONTENT, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(load_checkpoint(path), CONTENT)


def test_larger_than_what_is_read_at_once(tmp_path, monkeypatch):
    """The checksum does not depend on the size of the chunks."""
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    for chunk in (1, 7, 1 << 10):
        monkeypatch.setattr("lightkit._util.checksums._CHUNK", chunk)
        assert same(load_checkpoint(path), CONTENT)
