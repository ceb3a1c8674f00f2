"""Files that would hang, end or fill the process that loads them are rejected before torch reads them."""

from __future__ import annotations

import collections
import io
import zipfile

import pytest
import torch

from lightkit.checkpoints import load_checkpoint
from lightkit.checkpoints.archives import find_unsafe_content
from lightkit.errors import CheckpointError


@pytest.fixture
def archive(tmp_path):
    """Returns a function that writes a checkpoint with a given pickle and returns its path."""

    def write(pickle, **records):
        path = tmp_path / "crafted.ckpt"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("crafted/data.pkl", pickle)
            file.writestr("crafted/version", "3\n")
            for name, content in records.items():
                file.writestr(f"crafted/{name}", content)
        return path

    return write


# Each tuple holds the one before twice: 2**60 hashes for the key of a dict.
DOUBLED = b"\x80\x02}(" + b")" + b"".join(b"q\x00h\x00\x86" for _ in range(60)) + b"K\x01u."
DEEP = b"\x80\x02}(" + b")" + b"\x85" * 100_000 + b"K\x01u."
LARGE = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (4 * 10**9).to_bytes(5, "little") + b"\x85R."


@pytest.mark.parametrize(
    ("pickle", "message"),
    [
        (DOUBLED, "it nests tuples too deep"),
        (DEEP, "it nests tuples too deep"),
        (LARGE, "it names 'builtins.bytearray', which is no plain data"),
        (b"\x80\x02ctorch\nTensor\nK\x05\x85R.", "it names 'torch.Tensor', which is no plain data"),
        (b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x85R.", "it names 'os.system', which is no plain data"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "has the operation"),
        (b"\x80\x02h\x05.", "its data.pkl is damaged"),
        (b"\x80\x02\x86.", "its data.pkl is damaged"),
        (b"\x80\x02u.", "its data.pkl is damaged"),
        (b"\x80\x02q\x00.", "its data.pkl is damaged"),
        (b"\x80\x02(t", "pickle exhausted"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_tricks_of_a_pickle(archive, pickle, message):
    """One line names what would hang or end the process or take any memory, and torch does not read the file."""
    with pytest.raises(CheckpointError, match=f"damaged or not a checkpoint: .*{message}"):
        load_checkpoint(archive(pickle), untrusted=True)


def test_tricks_of_an_archive(tmp_path):
    """Two directories, names that differ in case only and compressed records are rejected."""
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1000)}}, path)
    plain = path.read_bytes()
    assert load_checkpoint(path, untrusted=True)["state_dict"]["w"].shape == (1000,)

    def trick(content):
        path.write_bytes(content)
        with open(path, "rb") as file:
            return find_unsafe_content(file)

    directory = plain.index(b"PK\1\2")
    assert "more than one directory" in trick(plain[:-22] + plain[directory:-22] + plain[-22:])
    for packed, message in ((zipfile.ZIP_DEFLATED, "compressed"), (zipfile.ZIP_STORED, "same name")):
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(plain)) as old, zipfile.ZipFile(stream, "w", packed) as new:
            for part in old.infolist():
                new.writestr(part.filename, old.read(part))
                if packed == zipfile.ZIP_STORED:
                    new.writestr(part.filename.upper(), old.read(part))
        assert message in trick(stream.getvalue())
    assert trick(b"not an archive") is not None and trick(b"") is not None


def test_plain_data_of_all_kinds(tmp_path):
    """Everything that torch.save writes for plain data and tensors is accepted: states, dtypes, tied weights."""
    tied = torch.zeros(3)
    values = {
        "state_dict": collections.OrderedDict(
            a=tied, b=tied, c=torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        ),
        "numbers": [1, 2**40, -(2**70), 1.5, True, None, "x" * 300, 3j, (1, (2, 3)), torch.Size([1, 2])],
        "others": [
            torch.float16,
            torch.device("cpu"),
            {1, 2},
            collections.Counter("ab"),
            torch.zeros(2, dtype=torch.int8),
        ],
    }
    path = tmp_path / "plain.ckpt"
    torch.save(values, path)
    assert load_checkpoint(path, untrusted=True)["numbers"] == values["numbers"]
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    torch.save({"state_dict": {}, "optimizer_states": [optimizer.state_dict()]}, path)
    assert load_checkpoint(path, untrusted=True)["optimizer_states"]
