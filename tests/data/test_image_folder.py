"""Folders of images as people have them: classes, sets, litter, sizes, colours, the cache and the stream."""

from __future__ import annotations

import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import COLOURS, write_classes, write_picture

from lightkit.data import ImageFolder, image_store
from lightkit.data.image_files import ImageFormat, read_images
from lightkit.data.image_tree import read_tree
from lightkit.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LIGHTKIT_CACHE_DIR", str(directory))
    return directory / "data"


def ready(path, **arguments):
    data = ImageFolder(str(path), **arguments)
    data.setup()
    return data


def names(tree, part):
    return [labelled.file.name for labelled in tree.sets[part]]


def lines(caught):
    return [str(warning.message) for warning in caught]


def test_classes_without_sets(tmp_path):
    """Each class gives its share to each set, no image is in two, and labels follow the sorted names."""
    write_classes(tmp_path, {"dog": 20, "cat": 10, "owl": 3})
    data = ready(tmp_path, validation_share=0.2, test_share=0.1)
    assert data.classes == ("cat", "dog", "owl") and data.num_classes == 3
    assert [part.labels.bincount().tolist() for part in (data.train, data.validation, data.test)] == [
        *([7, 14, 1], [2, 4, 1], [1, 2, 1]),
    ]
    assert data.train.images.shape == (22, 3, 20, 26) and data.train.images.dtype == torch.uint8
    for name, label in zip(data.classes, range(3), strict=True):
        shown = data.train.images[data.train.labels == label].float().mean(dim=(0, 2, 3))
        assert (shown - torch.tensor(COLOURS[name])).abs().max() < 15
    tree = read_tree(tmp_path, 0.2, 0.1)
    every = [name for part in tree.sets for name in names(tree, part)]
    assert len(set(every)) == len(every) == 33


def test_the_split_is_that_of_the_names(tmp_path):
    """A copy elsewhere, written in another order, has the same split; a new image moves few others."""
    write_classes(tmp_path / "a", {"cat": 40, "dog": 40})
    first = read_tree(tmp_path / "a", 0.15, 0.15)
    for name in reversed(sorted(path.name for path in (tmp_path / "a" / "cat").iterdir())):
        (tmp_path / "b" / "cat").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "a" / "cat" / name, tmp_path / "b" / "cat" / name)
    shutil.copytree(tmp_path / "a" / "dog", tmp_path / "b" / "dog")
    second = read_tree(tmp_path / "b", 0.15, 0.15)
    assert {part: names(first, part) for part in first.sets} == {part: names(second, part) for part in second.sets}
    write_picture(tmp_path / "b" / "cat" / "new.png")
    third = read_tree(tmp_path / "b", 0.15, 0.15)
    assert len(set(names(first, "test")) - set(names(third, "test"))) <= 1


@pytest.mark.parametrize(
    "folders", [("train", "val", "test"), ("training", "valid", "testing"), ("Train", "Validation", "TEST")]
)
def test_folders_for_the_sets(tmp_path, folders):
    """The three sets are those of the folders, whatever people call them."""
    for index, folder in enumerate(folders):
        write_classes(tmp_path / folder, {"cat": 3 + index, "dog": 2})
    data = ready(tmp_path)
    assert data.classes == ("cat", "dog")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [5, 6, 7]


def test_sets_that_are_missing(tmp_path):
    """A set without a folder, or without classes as in a competition, is split off the training set."""
    write_classes(tmp_path / "train", {"cat": 10, "dog": 10})
    write_classes(tmp_path / "val", {"cat": 2, "dog": 1})
    write_picture(tmp_path / "test" / "unknown.png")
    write_picture(tmp_path / "sample" / "a.png")
    with pytest.warns(UserWarning) as caught:
        data = ready(tmp_path, test_share=0.2)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [16, 3, 4]
    told = lines(caught)
    assert any(line.startswith("left out ") and "test, which has no folder for each class" in line for line in told)
    assert any(line.endswith("left out folders beside train, validation, test: sample") for line in told)


def test_a_class_may_be_called_train(tmp_path):
    """One folder with the name of a set beside others is a class."""
    write_classes(tmp_path, {"bus": 4, "train": 4})
    assert ready(tmp_path).classes == ("bus", "train")


def test_what_lies_around(tmp_path):
    """Subfolders and links are taken; hidden folders, litter, other files and second links are not, in two lines."""
    write_classes(tmp_path / "set", {"cat": 3, "dog": 3})
    write_picture(tmp_path / "set" / "cat" / "deep" / "deeper" / "a.JPG")
    write_picture(tmp_path / "outside" / "b.png")
    write_picture(tmp_path / "outside" / "more" / "c.png")
    (tmp_path / "set" / "dog" / "b.png").symlink_to(tmp_path / "outside" / "b.png")
    (tmp_path / "set" / "dog" / "again.png").symlink_to(tmp_path / "outside" / "b.png")
    (tmp_path / "set" / "dog" / "more").symlink_to(tmp_path / "outside" / "more")
    (tmp_path / "set" / "dog" / "circle").symlink_to(tmp_path / "set" / "dog")
    (tmp_path / "set" / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "set" / "dog" / "pipe.png")
    write_picture(tmp_path / "set" / ".ipynb_checkpoints" / "d.png")
    write_picture(tmp_path / "set" / "cat" / "__MACOSX" / "e.png")
    for name in ("cat/Thumbs.db", "cat/._000.png", "labels.csv"):
        (tmp_path / "set" / name).write_bytes(b"x")
    with pytest.warns(UserWarning) as caught:
        tree = read_tree(tmp_path / "set", 0, 0)
    assert names(tree, "train") == [
        *("cat/000.png", "cat/001.png", "cat/002.png", "cat/deep/deeper/a.JPG"),
        *("dog/000.png", "dog/001.png", "dog/002.png", "dog/again.png", "dog/more/c.png"),
    ]
    broken, others = sorted(lines(caught), reverse=True)
    assert "gone.png (a broken link)" in broken and "pipe.png (a pipe)" in broken
    assert others.startswith(
        f"{tmp_path / 'set'}: skipped 5 entries that are no images: .ipynb_checkpoints/, labels.csv"
    )


def test_damaged_images(tmp_path):
    """One line counts those that cannot be read; a class that loses all of its training images is an error."""
    write_classes(tmp_path, {"cat": 5, "dog": 5})
    for index in range(2):
        (tmp_path / "cat" / f"00{index}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"skipped 2 images: cat/00\d\.png is empty \(0 bytes\); cat/00"):
        data = ready(tmp_path, validation_share=0, test_share=0)
    assert data.train.labels.tolist() == [0] * 3 + [1] * 5
    for index in range(5):
        (tmp_path / "cat" / f"00{index}.png").write_bytes(b"x")
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r"no training image of cat can be read$"):
        ready(tmp_path, validation_share=0, test_share=0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"holds no folders: expected a folder for each class$"),
        (["a.png", "b.png"], r"holds 2 images and no folders: expected a folder for each class$"),
        (["cat/a.png", "cat/b.png"], r"has images of one class alone, cat: two or more are needed$"),
        (
            ["pets/cat/a.png", "pets/dog/b.png"],
            r"one class alone, pets: .*; its folders may be the classes: path=\S+pets$",
        ),
        (["train/a.png", "val/b.png"], r"train has no folders: expected a folder for each class$"),
        (["train/cat/a.png", "train/dog/b.png", "val/owl/c.png"], r"val/owl is no class of train$"),
        (["train/Cat/a.png", "train/dog/b.png", "val/cat/c.png"], r"val/cat is no class of train; did you mean Cat\?$"),
        (["train/cat/a.png", "Train/dog/b.png", "val/cat/c.png"], r"has both Train and train: merge them$"),
        (["cat/a.txt", "dog/b.txt"], r"holds no images \(PNG, .*\) in its folders cat, dog$"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_folders_that_are_no_classes(tmp_path, files, message):
    """One line says what a folder has instead of classes, and no other line distracts from it."""
    for name in files:
        write_picture((tmp_path / name).with_suffix(".png")).rename(tmp_path / name)
    with pytest.raises(DataError, match=message):
        ImageFolder(str(tmp_path)).setup()


def test_nothing_there(tmp_path):
    """A path that is missing, or no folder, is named."""
    with pytest.raises(DataError, match=r"^path=\S*gone does not exist$"):
        ImageFolder(str(tmp_path / "gone")).setup()
    with pytest.raises(DataError, match=r"^path=\S*a\.png must be a folder with a folder for each class$"):
        ImageFolder(str(write_picture(tmp_path / "a.png"))).setup()


def test_classes_that_look_wrong(tmp_path):
    """A folder without images is left out, and two names that differ in case stay two classes; each has a line."""
    write_classes(tmp_path, {"A": 3, "a": 3})
    (tmp_path / "empty").mkdir()
    with pytest.warns(UserWarning) as caught:
        tree = read_tree(tmp_path, 0, 0)
    assert tree.classes == ("A", "a")
    told = lines(caught)
    assert any(line.endswith("left out folders without images: empty") for line in told)
    assert any(line.endswith("A and a differ in case alone and are two classes") for line in told)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(40, 50)], (40, 50)),
        ([(8, 8)], (32, 32)),
        ([(300, 300)], (128, 128)),
        ([(40, 50), (50, 40)], (32, 32)),
        ([(70, 90), (100, 80), (400, 300)], (64, 64)),
    ],
)
def test_the_size_follows_the_files(tmp_path, sizes, expected):
    """One size is kept if models can take it; several become a square that enlarges half of the files at most."""
    for index, size in enumerate(sizes):
        for name in COLOURS:
            write_picture(tmp_path / name / f"{index}.png", COLOURS[name], size)
    data = ImageFolder(str(tmp_path))
    assert data.image_shape() == expected and data.stored_shape() == (3, *expected)
    assert ImageFolder(str(tmp_path), image_size=[30, 20], channels=1).stored_shape() == (30, 20)


def test_upright_size_and_grey(tmp_path):
    """The size is that of the upright image. Files of grey alone, also with a palette, give one channel."""
    exif = Image.Exif()
    exif[274] = 6
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((30, 40), 90, np.uint8)).save(tmp_path / name / "a.jpg", exif=exif)
        Image.fromarray(np.full((40, 30), 9, np.uint8)).convert("P").save(tmp_path / name / "b.gif")
        Image.fromarray(np.full((40, 30), 25_000, np.uint16)).save(tmp_path / name / "c.png")
        Image.fromarray(np.full((40, 30, 2), 255, np.uint8)).save(tmp_path / name / "d.png")
    data = ready(tmp_path, validation_share=0, test_share=0)
    assert data.found_arguments() == {"image_size": [40, 30], "channels": 1, "classes": ["cat", "dog"]}
    assert data.train.images.shape == (8, 40, 30)
    assert sorted(data.train.images[:4, 0, 0].tolist()) == [9, 90, 97, 255]
    write_picture(tmp_path / "cat" / "colour.png", size=(40, 30))
    assert ImageFolder(str(tmp_path)).channels == 3


def test_colours_by_the_rules_of_grey(tmp_path):
    """Transparent pixels lie on white, bright ones on black; 16 bits lose the lower 8; grey has equal channels."""
    red = np.zeros((2, 2, 4), np.uint8)
    red[0] = (255, 0, 0, 255)
    Image.fromarray(red).save(tmp_path / "red.png")
    yellow = np.zeros((2, 2, 4), np.uint8)
    yellow[0] = (255, 255, 180, 255)
    Image.fromarray(yellow).save(tmp_path / "yellow.png")
    Image.fromarray(np.array([[0x1234, 0xFFFF]] * 2, np.uint16)).save(tmp_path / "deep.png")
    paths = [tmp_path / f"{name}.png" for name in ("red", "yellow", "deep")]
    _, (one, other, deep), _ = read_images(paths, ImageFormat((2, 2), 3, invert=False))
    assert one[:, 0, 0].tolist() == [255, 0, 0] and one[:, 1, 0].tolist() == [255, 255, 255]
    assert other[:, 0, 0].tolist() == [255, 255, 180] and other[:, 1, 0].tolist() == [0, 0, 0]
    assert deep[:, 0].tolist() == [[0x12, 0xFF]] * 3


def test_fits(tmp_path):
    """A wide image of three parts: crop keeps the middle, pad keeps all, stretch squeezes all."""
    parts = np.repeat(np.array([[10] * 40 + [120] * 40 + [250] * 40], np.uint8), 40, axis=0)
    Image.fromarray(parts).save(tmp_path / "wide.png")
    crop, pad, stretch = (
        read_images([tmp_path / "wide.png"], ImageFormat((12, 12), 1, fit, False))[1][0]
        for fit in ("crop", "pad", "stretch")
    )
    assert crop.float().sub(120).abs().max() < 25
    assert pad[0].unique().tolist() == [120] and pad[6, 0] < 30 and pad[6, -1] > 230
    assert (stretch == stretch[0]).all() and stretch[0, 0] < 30 and stretch[0, -1] > 230


def test_decoded_once(tmp_path, cache, monkeypatch):
    """A second run reads the cache; a file that has changed, or another format, is decoded again; damage is told."""
    write_classes(tmp_path, {"cat": 4, "dog": 4})
    first = ready(tmp_path)
    read = image_store.read_picture
    with monkeypatch.context() as patch:
        patch.setattr(image_store, "read_picture", lambda *_: pytest.fail("decoded twice"))
        patch.setattr(image_store, "read_header", lambda *_: pytest.fail("read twice"))
        again = ready(tmp_path)
    assert torch.equal(again.train.images, first.train.images)
    # The pixels are the process's own: a write changes no file.
    again.train.images.zero_()
    assert torch.equal(ready(tmp_path).train.images, first.train.images)
    write_picture(tmp_path / "cat" / "000.png", (0, 0, 255))
    os.utime(tmp_path / "cat" / "000.png", ns=(1, 1))
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(image_store, "read_picture", lambda path, form: seen.append(path.name) or read(path, form))
        ready(tmp_path)
        assert "000.png" in seen
        ready(tmp_path, image_size=18)
        assert len(seen) >= 8
    for path in cache.iterdir():
        whole = bytearray(path.read_bytes())
        whole[-1] ^= 1
        path.write_bytes(whole)
    with pytest.warns(UserWarning, match="is not used, and made again: it is damaged"):
        ready(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(tmp_path)


def test_a_stream_serves_what_the_memory_serves(tmp_path):
    """Images beyond the limit are decoded on the fly: the same batches in the same order, also after a resume."""
    write_classes(tmp_path, {"cat": 12, "dog": 12})
    (tmp_path / "dog" / "damaged.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped 1 image"):
        held, streamed = (ready(tmp_path, batch_size=4, seed=3, memory_limit=limit) for limit in (10**9, 0))
    for method in ("train_dataloader", "val_dataloader", "test_dataloader"):
        one, other = (getattr(data, method)() for data in (held, streamed))
        assert len(one) == len(other)
        for _ in range(2):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    loader = streamed.train_dataloader()
    batches = list(loader)
    resumed = streamed.train_dataloader()
    resumed.load_state_dict({"epoch": 0, "batch": 2, "batch_size": 4, "world_size": 1})
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, batches[2:], strict=True))
    assert torch.equal(streamed.test.images[1], held.test.images[1])
    # An epoch that is left in the middle leaves no thread at work.
    next(iter(loader))


def test_shards(tmp_path):
    """Of several processes each gets its share of a stream, as of tensors."""
    write_classes(tmp_path, {"cat": 10, "dog": 10})
    streamed = ready(tmp_path, memory_limit=0, validation_share=0, test_share=0)
    held = ready(tmp_path, validation_share=0, test_share=0)
    from lightkit.data import TensorBatches
    from lightkit.data.image_stream import StreamedBatches

    for rank in range(3):
        options = {"shuffle": True, "rank": rank, "world_size": 3}
        one = TensorBatches((held.train.images, held.train.labels), 4, **options)
        other = StreamedBatches(streamed.train.images, streamed.train.labels, 4, **options)
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_the_test_needs_no_training_set(tmp_path):
    """An evaluation reads the test set alone, and names the classes of the model."""
    write_classes(tmp_path / "test", {"dog": 3, "zebra": 2})
    data = ImageFolder(str(tmp_path), image_size=20, channels=3, classes=["cat", "dog"])
    with pytest.warns(UserWarning, match="left out folders that are no class: zebra"):
        data.setup("test")
    assert data.test.labels.tolist() == [1, 1, 1] and data.train is None
    with pytest.raises(DataError, match="has no training images"):
        data.setup("fit")


@pytest.mark.parametrize(
    "arguments",
    [
        *({"image_size": size} for size in (0, [20], [20, 20, 20], "20", 5000)),
        *({"channels": 2}, {"fit": "zoom"}, {"classes": []}, {"classes": ["a", "a"]}),
        *({"validation_share": 1.0}, {"test_share": -0.1}, {"validation_share": 0.5, "test_share": 0.5}),
    ],
)
def test_wrong_arguments(arguments):
    """The error names the argument, before the folder is read."""
    with pytest.raises(DataError, match=next(iter(arguments))):
        ImageFolder("nowhere", **arguments)


def test_folds(tmp_path):
    """A fold divides the images of training and validation anew; the test set stays."""
    write_classes(tmp_path, {"cat": 20, "dog": 20})

    class Fold:
        """The images with even indices for validation."""

        def split(self, labels, seed):
            """Returns the odd and the even indices."""
            return torch.arange(1, len(labels), 2), torch.arange(0, len(labels), 2)

    plain, folded = ImageFolder(str(tmp_path)), ImageFolder(str(tmp_path))
    folded.fold = Fold()
    for data in (plain, folded):
        data.setup()
    assert [len(part) for part in (plain.train, plain.validation, plain.test)] == [28, 6, 6]
    assert [len(part) for part in (folded.train, folded.validation, folded.test)] == [17, 17, 6]
    assert torch.equal(folded.test.images, plain.test.images)
    before, after = (
        {image.numpy().tobytes() for part in (data.train, data.validation) for image in part.images}
        for data in (plain, folded)
    )
    assert before == after


def test_pixels_that_nobody_uses_are_removed(tmp_path, cache):
    """Decoding removes what no run has read for a month, and nothing else; a read counts as a use."""
    write_classes(tmp_path, {"cat": 3, "dog": 3})
    ready(tmp_path)
    (cache / "mnist_5k-0.bin").write_bytes(b"x")
    before = set(cache.iterdir())
    for path in before:
        os.utime(path, (1, 1))
    ready(tmp_path)
    assert set(cache.iterdir()) == before
    ready(tmp_path, image_size=18)
    assert before < set(cache.iterdir())
    for path in cache.iterdir():
        os.utime(path, (1, 1))
    ready(tmp_path, image_size=19, channels=3)
    assert len(set(cache.iterdir())) == 4 and (cache / "mnist_5k-0.bin").exists()
