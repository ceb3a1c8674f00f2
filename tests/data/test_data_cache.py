"""Data in the cache directory count if they are intact and no other user could have written them."""

from __future__ import annotations

import os
import random
import warnings

import pytest
import torch

from lightkit.data import Text, mnist, mnist_5k

SOMEBODY_ELSE = 4242


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture(params=["digits", "text"])
def read(request, tmp_path, cache):
    """Returns a function that reads cached data as one tensor, after a first call."""
    if request.param == "text":
        (tmp_path / "texts").mkdir()
        for number in range(30):
            (tmp_path / "texts" / f"{number:02}.txt").write_bytes(bytes([number]) * 100)

    def read():
        if request.param == "digits":
            return mnist_5k.read_digits().images
        data = Text(str(tmp_path / "texts"), context=8)
        data.setup()
        return torch.cat([data.train, data.validation, data.test])

    read()
    return read


def quietly(read):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read()


def test_any_flipped_bit_is_noticed(read, cache):
    """The file is made again, with one warning that names it."""
    (kept,) = cache.iterdir()
    whole, expected, chance = kept.read_bytes(), quietly(read), random.Random(0)
    for _ in range(8):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        kept.write_bytes(damaged)
        with pytest.warns(UserWarning, match=rf"{kept.name} is not used, and made again: it is damaged$"):
            assert torch.equal(read(), expected)
        assert kept.read_bytes() == whole
    assert torch.equal(quietly(read), expected)


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_to(read, cache, mode):
    """The file is made again, with permissions for this user only."""
    (kept,) = cache.iterdir()
    expected = quietly(read)
    kept.chmod(mode)
    with pytest.warns(UserWarning, match=rf"{kept.name} is not used, and made again: can be written by other users$"):
        assert torch.equal(read(), expected)
    assert kept.stat().st_mode & 0o777 == 0o644
    assert torch.equal(quietly(read), expected)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user(read, cache):
    """The file is made again, whatever its content."""
    (kept,) = cache.iterdir()
    expected = quietly(read)
    os.chown(kept, SOMEBODY_ELSE, -1)
    with pytest.warns(UserWarning, match=rf"made again: belongs to another user \(uid {SOMEBODY_ELSE}\)"):
        assert torch.equal(read(), expected)
    assert kept.stat().st_uid == os.geteuid()


def test_a_folder_that_others_may_write_to(read, cache):
    """Nothing is read from the folder or written to it, since other users could replace files."""
    (kept,) = cache.iterdir()
    expected, content = quietly(read), kept.read_bytes()
    kept.write_bytes(b"anything")
    cache.chmod(0o777)
    with pytest.warns(UserWarning) as told:
        assert torch.equal(read(), expected)
    assert any("can be written by other users" in str(warning.message) for warning in told)
    assert any("chmod go-w it" in str(warning.message) for warning in told)
    assert kept.read_bytes() == b"anything"
    cache.chmod(0o700)
    with pytest.warns(UserWarning, match="it is damaged"):
        assert torch.equal(read(), expected)
    assert kept.read_bytes() == content


def test_a_liberal_umask(cache, monkeypatch):
    """Cached files are not writable by the group under any umask, and are used the next time."""
    before = os.umask(0o002)
    try:
        mnist_5k.read_digits()
    finally:
        os.umask(before)
    monkeypatch.setattr(mnist_5k, "_parse", lambda _: pytest.fail("parsed twice"))
    quietly(mnist_5k.read_digits)


def test_downloads_are_those_that_were_published(cache, monkeypatch):
    """A file that has changed since its download is downloaded again."""
    content = {name: name.encode() for name in mnist._FILES}
    monkeypatch.setattr(mnist.MNIST, "md5", {name: mnist._md5(data) for name, data in content.items()})
    monkeypatch.setattr(mnist.MNIST, "directory_name", "none-of-the-system")
    fetched = []

    def fetch(url, path, md5):
        fetched.append(path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(next(data for data in content.values() if mnist._md5(data) == md5))

    monkeypatch.setattr(mnist, "_fetch", fetch)
    data = mnist.MNIST()
    data.prepare_data()
    data.prepare_data()
    assert len(fetched) == 4
    (cache / "none-of-the-system" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    data.prepare_data()
    assert fetched[4:] == ["t10k-labels-idx1-ubyte.gz"]
