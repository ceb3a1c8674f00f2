"""Files and checkpoints: the previous one survives any failure, and damage is an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightkit._util.atomic_write import write_atomically
from lightkit.checkpoints import AtomicCheckpointIO, check_weights, load_checkpoint
from lightkit.errors import CheckpointError


def test_replaces_all_at_once(tmp_path):
    """A failed write leaves the old content and no other file."""
    path = tmp_path / "deep" / "file"
    write_atomically(path, lambda f: f.write(b"old"))

    def fail(file):
        file.write(b"half of the new")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


def test_mode_follows_the_umask(tmp_path):
    """The permissions are those of the umask."""
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", lambda f: f.write(b"x"))
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


FULL_DISK = """
import resource, signal, sys, torch
from lightkit.checkpoints import AtomicCheckpointIO
io = AtomicCheckpointIO()
io.save_checkpoint({"state_dict": {"w": torch.zeros(10)}}, sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
io.save_checkpoint({"state_dict": {"w": torch.ones(100000)}}, sys.argv[1])
"""


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """The error names the full disk, and the previous checkpoint is intact."""
    path = tmp_path / "last.ckpt"
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True)
    assert result.returncode != 0
    assert "could not be written" in result.stderr and "the one before it is intact" in result.stderr
    assert torch.equal(load_checkpoint(path)["state_dict"]["w"], torch.zeros(10))
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or not a checkpoint"),
        (b"not a checkpoint", "damaged or not a checkpoint"),
        ("truncated", "damaged or not a checkpoint"),
        ({"weights": torch.zeros(1)}, "no state_dict"),
        ([1, 2], "not a Lightning checkpoint"),
    ],
)
def test_damaged_checkpoints(tmp_path, content, message):
    """The error names empty, foreign and truncated files."""
    path = tmp_path / "x.ckpt"
    if content == "truncated":
        torch.save({"state_dict": {"w": torch.zeros(10000)}}, path)
        path.write_bytes(path.read_bytes()[:20000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    """A checkpoint with code is rejected, and the code does not run."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Evil()}, "evil.ckpt")
    with pytest.raises(CheckpointError):
        load_checkpoint("evil.ckpt")
    with pytest.raises(CheckpointError):
        AtomicCheckpointIO().load_checkpoint("evil.ckpt")
    assert not (tmp_path / "evil").exists()


def test_checkpoint_of_another_model():
    """The error has the differences in shapes and names."""
    checkpoint = {"state_dict": nn.Linear(3, 4).state_dict()}
    with pytest.raises(CheckpointError, match=r"another model: .*weight is \(4, 3\), expected \(2, 3\)"):
        check_weights(nn.Linear(3, 2), checkpoint, "x.ckpt")
    with pytest.raises(CheckpointError, match="bias is unknown here"):
        check_weights(nn.Linear(3, 4, bias=False), checkpoint, "x.ckpt")
    check_weights(nn.Linear(3, 4), checkpoint, "x.ckpt")
