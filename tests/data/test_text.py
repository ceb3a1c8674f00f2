"""Text as bytes: every target once, no text in two parts, and no file that stops the reader."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightkit.data import Text, bigram
from lightkit.data.advice import settings_named
from lightkit.data.text import library_files, text_files
from lightkit.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Gives each test a cache of its own."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(directory))
    return directory


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with forty files of random bytes in two subfolders."""
    generator = torch.Generator().manual_seed(0)
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    for index in range(40):
        content = torch.randint(1, 256, (100 + index,), generator=generator).tolist()
        (root / ("sub" if index % 2 else ".") / f"{index:02d}.txt").write_bytes(bytes(content))
    return root


def served(loader, data):
    """Returns the targets of a loader's batches in order."""
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return bytes(torch.cat([targets.flatten() for _, targets in batches]).tolist())


def test_every_target_once(tmp_path):
    """Inputs and targets are the text and the text one byte on, in order, except a rest shorter than a window."""
    content = bytes(torch.randint(0, 256, (1000,)).tolist())
    (tmp_path / "a").write_bytes(content)
    data = Text(str(tmp_path / "a"), context=16, eval_batch_size=3, validation_share=0.2, test_share=0.3)
    data.setup()
    parts = [content[:500], content[500:700], content[700:]]
    for windows, part in zip((data.train, data.validation, data.test), parts, strict=True):
        assert len(windows) == (len(part) - 1) // 16
    for loader, part in ((data.val_dataloader(), parts[1]), (data.test_dataloader(), parts[2])):
        assert served(loader, data) == part[1 : (len(part) - 1) // 16 * 16 + 1]
    for batch in data.train_dataloader():
        inputs, targets = data.on_after_batch_transfer(batch, 0)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert data.count((inputs, targets)) == 16 * len(inputs)


def test_batches_are_copies_of_what_was_chosen(tmp_path):
    """Windows overlap in memory; a batch is a copy of its own, and writing to it changes no text."""
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40)
    data = Text(str(tmp_path / "a"), context=16, batch_size=4)
    data.setup()
    assert data.train.untyped_storage().nbytes() == 256 * 40
    before = data.train.clone()
    for (batch,) in data.train_dataloader():
        assert batch.untyped_storage().nbytes() == batch.numel()
        batch.zero_()
    assert torch.equal(data.train, before)


def test_a_folder_is_split_by_file(folder):
    """Each file is in one part as a whole, a zero byte separates two, and a new file moves no other."""

    def parts():
        data = Text(str(folder), context=8, validation_share=0.2, test_share=0.2)
        data.setup()
        return [part.split(b"\0") for part in map(bytes_of, data._parts())]

    contents = {path.read_bytes() for path in folder.rglob("*.txt")}
    before = parts()
    assert all(len(part) > 1 for part in before)
    assert sorted(text for part in before for text in part) == sorted(contents)
    (folder / "another.txt").write_bytes(b"more")
    after = parts()
    assert all(set(old) <= set(new) for old, new in zip(before, after, strict=True))


def bytes_of(tensor):
    return bytes(tensor.tolist())


def test_the_split_is_that_of_every_machine():
    """The part of a file depends on its path and the shares only; the values here are fixed."""
    data = Text(validation_share=0.25, test_share=0.25)
    parts = [data._part_of(f"json/file{index}.py") for index in range(12)]
    assert parts == [
        "test",
        "test",
        "test",
        "train",
        "test",
        "train",
        "train",
        "validation",
        "train",
        "train",
        "train",
        "train",
    ]
    assert [
        Text(validation_share=0.25, test_share=0.25, seed=7)._part_of(f"json/file{i}.py") for i in range(12)
    ] == parts


def test_joined_once_per_content(folder, cache, monkeypatch):
    """The cached text is named by its content: a changed file makes another, a damaged one is written again."""
    first = Text(str(folder), context=8)
    first.setup()
    (cached,) = (cache / "data").iterdir()
    stamp = cached.stat().st_mtime_ns
    second = Text(str(folder), context=8)
    second.setup()
    assert torch.equal(first.train, second.train) and cached.stat().st_mtime_ns == stamp
    whole = cached.read_bytes()
    cached.write_bytes(whole[:-1])
    Text(str(folder), context=8).setup()
    assert cached.read_bytes() == whole
    (folder / "00.txt").write_bytes(bytes(100))
    Text(str(folder), context=8).setup()
    assert len(list((cache / "data").iterdir())) == 2


def test_without_a_cache(folder, monkeypatch):
    """Without a writable cache the text is held in memory, with a warning."""
    kept = Text(str(folder), context=8)
    kept.setup()
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(folder / "00.txt"))
    held = Text(str(folder), context=8)
    with pytest.warns(UserWarning, match="held in memory"):
        held.setup()
    assert torch.equal(kept.train, held.train) and torch.equal(kept.test, held.test)


def test_the_standard_library_is_the_default():
    """Its sources, without tests and installed packages, are enough for every part."""
    data = Text()
    data.setup()
    names = {file.name for file in library_files(data._root())}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any("site-packages" in name or "/test/" in name or not name.endswith(".py") for name in names)
    assert len(data.train) * 128 > 5e6 and len(data.validation) * 128 > 1e5 and len(data.test) * 128 > 1e5


def test_odd_files(folder):
    """Cyclic links, links to files of the folder, pipes, hidden and empty files add nothing."""
    plain = [file.name for file in text_files(folder)]
    assert len(plain) == 40 and plain == sorted(plain)
    (folder / "circle").symlink_to(folder)
    (folder / "zz_again.txt").symlink_to(folder / "00.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "empty.txt").touch()
    (folder / ".hidden.txt").write_text("x")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.txt").write_text("x")
    assert [file.name for file in text_files(folder)] == plain
    (folder / "linked.txt").symlink_to(__file__)
    assert [file.name for file in text_files(folder)] == sorted([*plain, "linked.txt"])


def test_bytes_are_taken_as_they_are(tmp_path):
    """Bytes that are no UTF-8 stay unchanged, and any text can be encoded and decoded."""
    content = bytes(range(256)) * 2
    (tmp_path / "binary").write_bytes(content)
    data = Text(str(tmp_path / "binary"), context=8, validation_share=0, test_share=0.5)
    data.setup()
    assert data.val_dataloader() == []
    assert served(data.test_dataloader(), data) == content[257 : 257 + 248]
    assert data.decode(data.encode(content)) == content
    assert data.decode(data.encode("naïve")) == "naïve".encode()
    assert len(data.encode("")) == 0


def test_large_file_is_not_read_at_once(tmp_path):
    """A file larger than the memory is mapped: 8 TB of holes take no time."""
    with open(tmp_path / "huge", "wb") as file:
        try:
            file.truncate(8 << 40)
        except OSError:
            pytest.skip("the file system has no files of that size")
    data = Text(str(tmp_path / "huge"), context=128)
    data.setup()
    assert len(data.train) > 5e10
    assert not data.test[-1].any()


def windows(text, context=4):
    return torch.tensor(list(text), dtype=torch.uint8).unfold(0, context + 1, context)


def test_bigram_by_hand():
    """The baselines of a text of two different bytes equal those computed by hand."""
    train, test = windows(b"abababaab"), windows(b"abbab")
    # Targets of training: b a b a b a a b; pairs: ab 4, ba 3, aa 1.
    total = 8 + 256
    unigram = {"a": 5 / total, "b": 5 / total}
    # After a: 5 seen, 2 kinds; after b: 3 seen, 1 kind.
    after_a_b = (4 + 2 * unigram["b"]) / (5 + 2)
    after_b_b = (0 + 1 * unigram["b"]) / (3 + 1)
    after_b_a = (3 + 1 * unigram["a"]) / (3 + 1)
    expected = -(2 * math.log2(after_a_b) + math.log2(after_b_b) + math.log2(after_b_a)) / 4
    bits = bigram.bits_per_byte(train, test)
    assert bits["bigram"] == pytest.approx(expected, rel=1e-9)
    assert bits["unigram"] == pytest.approx(-math.log2(5 / total), rel=1e-9)


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_large_text_of_a_checkpoint(tmp_path, monkeypatch, is_folder):
    """A text that a checkpoint chose is rejected above the limit, before it is read; a user's own has no limit."""
    path = tmp_path / "text"
    if is_folder:
        path.mkdir()
    (path / "a.txt" if is_folder else path).write_bytes(b"some text " * 10)
    monkeypatch.setattr("lightkit.data.text_bytes._MAX_IN_MEMORY", 99)
    data = Text(str(path), context=2, validation_share=0, test_share=0.1)
    data.is_own = False
    with pytest.raises(DataError, match="has 100 bytes; a text that a checkpoint chose may have 99"):
        data.setup()
    if not is_folder:
        data.is_own = True
        data.setup()


@given(text=st.binary(min_size=30, max_size=300), context=st.integers(1, 9))
def test_bigram_is_a_distribution(text, context):
    """No byte has probability 0, and pairs are counted within windows, once each, for any chunks."""
    chunk, bigram._CHUNK = bigram._CHUNK, 20
    try:
        part = windows(text, context)
        counts = bigram.count_pairs(part)
    finally:
        bigram._CHUNK = chunk
    assert counts.sum() == len(part) * context
    assert all(counts[a, b] > 0 for a, b in itertools.pairwise(text[: len(part) * context + 1]))
    everything = windows(bytes(range(256)) * 2, 1)
    assert all(math.isfinite(bits) for bits in bigram.bits_per_byte(part, everything).values())


def test_baselines_are_of_the_test(folder):
    """Both baselines have their names, and random bytes take 8 bits."""
    data = Text(str(folder), context=8)
    data.setup()
    found = data.baselines()
    assert found.keys() == {"unigram_bits_per_byte", "bigram_bits_per_byte"}
    assert all(7.5 < bits < 9 for bits in found.values())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"eval_batch_size": -3}, "eval_batch_size must be at least 1"),
        ({"test_share": 0.0}, "test_share more, and both together below 1, got 0.05 and 0.0"),
        ({"validation_share": 0.5, "test_share": 0.5}, "both together below 1"),
        ({"validation_share": -0.1}, "validation_share must be at least 0"),
        ({"test_share": math.nan}, "got 0.05 and nan"),
    ],
)
def test_wrong_arguments(options, named):
    """The constructor rejects impossible sizes and shares."""
    with pytest.raises(DataError, match=named):
        Text(**options)


def test_nothing_there(tmp_path):
    """The error names a path without text: missing, an empty folder or a device."""
    for path, message in (
        (tmp_path / "nowhere", "there is no text at"),
        (tmp_path, "holds no text"),
        ("/dev/zero", "is a device, and must be a regular file"),
    ):
        with pytest.raises(DataError, match=message):
            Text(str(path)).setup()


def test_too_short(tmp_path, folder):
    """The error of a part shorter than a window has the sizes of all parts and of a window."""
    (tmp_path / "short").write_bytes(b"x" * 1000)
    short = (
        r"the validation part of .*short has 50 bytes, .* = 129; .* test 50; a larger "
        r"validation_share \(0\.05\) or a smaller context \(128\) helps; validation_share=0 trains"
    )
    with pytest.raises(DataError, match=short):
        Text(str(tmp_path / "short")).setup()
    with pytest.raises(DataError, match=r"the train part of .* has 0 bytes"):
        (tmp_path / "empty").touch()
        Text(str(tmp_path / "empty")).setup()
    with pytest.raises(DataError, match=r"train [0-9,]+, validation [0-9,]+, test [0-9,]+; of a folder each file goes"):
        Text(str(folder), context=10_000).setup()


def test_few_small_files(tmp_path):
    """Where no file of a folder falls into the validation part, the error names the keys that help, and they do."""
    for index in range(12):
        (tmp_path / f"{index}.txt").write_bytes(b"a short text " * 20)
    with pytest.raises(DataError) as error:
        Text(str(tmp_path), context=16, validation_share=0.02).setup()
    assert "\n" not in str(error.value) and "the validation part" in str(error.value)
    helps = ("validation_share (0.02)", "context (16)", "a single file", "validation_share=0 trains")
    assert all(text in str(error.value) for text in helps) and "data." not in str(error.value)
    # The commands have the same settings below data.
    with pytest.raises(DataError) as error, settings_named("data."):
        Text(str(tmp_path), context=16, validation_share=0.02).setup()
    assert all(f"data.{text}" in str(error.value) for text in helps if text != "a single file")
    Text(str(tmp_path), context=16, validation_share=0.3, test_share=0.2).setup()
    Text(str(tmp_path), context=16, validation_share=0, test_share=0.2).setup()
    with pytest.raises(DataError, match=r"the test part .* a larger test_share \(0\.01\)"):
        Text(str(tmp_path), context=16, validation_share=0.3, test_share=0.01).setup()


def test_litter_is_no_text(folder):
    """What systems and editors leave behind is left out, in any spelling, and one line counts and names it."""
    plain = [file.name for file in text_files(folder)]
    (folder / "__MACOSX").mkdir()
    for name in ("Thumbs.db", "sub/THUMBS.DB", "desktop.ini", "__MACOSX/00.txt", "~$a.doc", "00.txt~", ".DS_Store"):
        (folder / name).write_bytes(b"litter " * 10)
    with pytest.warns(UserWarning) as caught:
        assert [file.name for file in text_files(folder)] == plain
    (line,) = (str(warning.message) for warning in caught)
    assert line == f"{folder}: skipped 6 entries that no user has made: 00.txt~, Thumbs.db, __MACOSX and 3 more"


def test_links_that_lead_nowhere(folder):
    """One warning names dangling and cyclic links and links to pipes and devices; other files are read."""
    plain = [file.name for file in text_files(folder)]
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.txt")
    with pytest.warns(
        UserWarning, match=r"^skipped.*circle\.txt \(.*dangling\.txt \(.*pipe\.txt \(a pipe\) and 1 more$"
    ) as warned:
        assert [file.name for file in text_files(folder)] == plain
    assert len(warned) == 1


def test_unreadable_file(folder):
    """The error names a file that cannot be read."""
    if os.geteuid() != 0:
        (folder / "00.txt").chmod(0)
        with pytest.raises(DataError, match=r"00\.txt cannot be read: Permission denied"):
            Text(str(folder), context=8).setup()
