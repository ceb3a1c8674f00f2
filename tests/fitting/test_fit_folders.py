"""`lightkit.fit` on folders of images: the same data module as `data=image_folder`, and files for predictions."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pictures import write_classes, write_picture
from torch import nn

import lightkit
from lightkit.data import ImageFolder, MNIST5k, image_store
from lightkit.errors import ConfigError, DataError, LightkitError
from lightkit.models import RNNLanguageModel

COUNTS = {"cat": 12, "dog": 12, "owl": 12}


def fit(model, x, y=None, **options):
    optimizer = partial(torch.optim.Adam, lr=0.003)
    return lightkit.fit(model, x, y, **{"epochs": 6, "verbose": False, "optimizer": optimizer, **options})


def net(channels=3, height=20, width=26, classes=3):
    """Returns a small classifier of images of one size."""
    torch.manual_seed(0)
    features = 4 * (height - 2) * (width - 2)
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(features, classes))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keeps the decoded images of a test out of the user's cache, and the test in its directory."""
    # The directory of the environment would hold the compiled kernels, too.
    monkeypatch.setattr(image_store, "cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pets(tmp_path):
    return write_classes(tmp_path / "pets", COUNTS)


@pytest.mark.parametrize("model", ["cnn", "mlp", None])
def test_a_folder_is_learnt_saved_and_loaded(pets, tmp_path, model):
    """Classes are the folders; files, lists and folders are predicted, and the saved file does the same."""
    result = fit(net() if model is None else model, pets if model is None else str(pets))
    assert result.classes == ("cat", "dog", "owl") and result.history["val_accuracy"][-1] == 1
    assert result.evaluate(pets)["accuracy"] == 1 == result.evaluate()["accuracy"]
    files = [str(pets / "owl" / "003.png"), pets / "cat" / "001.png"]
    probabilities = result.predict(files)
    assert probabilities.shape == (2, 3) and probabilities.argmax(axis=1).tolist() == [2, 0]
    assert result.predict(pets).argmax(axis=1).tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert np.allclose(result.predict(files[1], batch_size=1), probabilities[1:], atol=1e-6)
    result.save(tmp_path / "pets.ckpt")
    loaded = lightkit.load(tmp_path / "pets.ckpt")
    assert loaded.classes == result.classes
    assert np.array_equal(loaded.predict(files), probabilities) and loaded.evaluate(pets) == result.evaluate(pets)
    with pytest.raises(ConfigError, match=r"evaluate\(\) needs x: a loaded model has no samples"):
        loaded.evaluate()


def test_it_is_the_data_module_of_the_command_line(pets):
    """The images and their split are those of `lightkit.data.ImageFolder`."""
    data = ImageFolder(str(pets), validation_share=0.25, test_share=0)
    data.setup("fit")
    served = fit(net(), pets, validation=0.25, epochs=1).data
    assert isinstance(served, ImageFolder)
    assert torch.equal(served.train.images, data.train.images)
    assert torch.equal(served.validation.labels, data.validation.labels) and len(served.validation) == 9


def test_sets_that_have_folders(tmp_path):
    """Folders of the sets are taken; another folder and 0 replace that of the validation."""
    for name, count in {"train": 6, "val": 2, "test": 3}.items():
        write_classes(tmp_path / "a" / name, {"cat": count, "dog": count})
    result = fit(net(classes=2), tmp_path / "a", run_dir=tmp_path / "run")
    assert [len(part) for part in (result.data.train, result.data.validation, result.data.test)] == [12, 4, 6]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "cat" in page and "Confusion matrix" in page
    assert "test/accuracy" in (tmp_path / "run" / "metrics.json").read_text()
    other = write_classes(tmp_path / "b", {"cat": 5, "dog": 1})
    assert len(fit(net(classes=2), tmp_path / "a", validation=other, epochs=1).data.validation) == 6
    none = fit(net(classes=2), tmp_path / "a", validation=0, epochs=1)
    with pytest.raises(ConfigError, match=r"evaluate\(\) needs x: the training held out no samples"):
        none.evaluate()
    assert len(none.data.validation) == 0 and "val_loss" not in none.history
    # The test set of another folder with sets is evaluated.
    assert len(next(iter(result._loader(tmp_path / "a", None, 100)))[1]) == 6


def test_the_held_out_images_are_those_of_a_later_evaluation(pets, tmp_path):
    """`evaluate` measures a saved model on the images that the training has not seen."""
    result = fit(net(), pets, validation=0.25, epochs=1, run_dir=tmp_path / "run")
    rebuilt = lightkit.load(tmp_path / "run" / "model.ckpt").data
    rebuilt.setup("test")
    assert torch.equal(rebuilt.test.images, result.data.validation.images)


def test_the_channels_that_the_model_takes(pets, tmp_path):
    """A model of grey images gets colours as grey, one of colours grey files as colours; a name follows the files."""
    assert fit(net(channels=1), pets, epochs=1).data.channels == 1
    grey = tmp_path / "grey"
    for name, value in {"dark": 40, "light": 200}.items():
        for index in range(6):
            write_picture(grey / name / f"{index}.png", (value,))
    assert fit(net(classes=2), grey, epochs=1).data.channels == 3
    assert fit("cnn", grey, epochs=1).model.image_shape == (1, 20, 26)
    with pytest.raises(ConfigError, match=r"takes? the images .* as \(2, 3, 20, 26\): .*; as \(2, 1, 20, 26\): "):
        fit(net(height=9), pets)


def test_a_data_module_of_images():
    """A data module takes the place of a folder, which gives a name its sizes; files come in its format."""
    result = lightkit.fit("cnn", MNIST5k(validation_size=500), epochs=1, verbose=False)
    assert result.model.image_shape == (1, 28, 28) and result.evaluate()["accuracy"] > 0.8
    assert result.predict(result.data.test.images[:5].numpy()).shape == (5, 10)


def test_class_weight(pets):
    """Balanced weights follow the images of the training."""
    shutil.rmtree(pets / "owl")
    for index in range(6, 12):
        (pets / "dog" / f"{index:03}.png").unlink()
    result = fit(net(classes=2), pets, validation=0, class_weight="balanced", epochs=1)
    assert result.task.loss.weight.tolist() == pytest.approx([18 / 24, 18 / 12])


def test_damaged_images(pets):
    """Damaged files are left out of a training and an evaluation, and end a prediction, whose rows would shift."""
    (pets / "cat" / "000.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped 1 image"):
        result = fit(net(), pets, epochs=1, validation=0)
    assert len(result.data.train) == 35
    with pytest.warns(UserWarning, match="skipped 1 of 36 images"):
        result.evaluate(pets)
    with pytest.raises(DataError, match=r"x has images that cannot be read: .*000\.png"):
        result.predict(pets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [0, 1]}, "y must be None for the folder x=.*pets, whose folders are the classes, got list"),
        ({"y": "target"}, "y must be None for the folder x=.*pets, .* got the text 'target'"),
        ({"validation": 1}, "validation must be a share from 0 to below 1, or a folder with the classes of x, got 1"),
        ({"validation": "nowhere"}, "validation must be .* got 'nowhere'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"x": "pets/cat"}, "pets/cat holds 12 images and no folders: expected a folder for each class"),
        ({"x": "pets/cat/000.png"}, r"x=pets/cat/000\.png is a file: expected a folder of images with a folder for"),
        ({"x": "nowhere"}, "x=nowhere does not exist: expected a folder of images.*; a text without labels takes a"),
        ({"x": "empty"}, "empty holds no folders: expected a folder for each class"),
        ({"x": "hollow"}, "hollow holds no images .* in its folders a, b"),
        ({"x": "alone"}, r"alone has images of one class alone, pets: two .*; its folders .* path=alone/pets"),
        ({"x": "damaged"}, "damaged: none of the 4 images can be read"),
        ({"model": "rnn"}, r"model='rnn' takes sequences \(N, T, F\) or grey images, got samples of shape \(3, 20, 26"),
        ({"model": net(classes=2)}, "the model returns 2 logits, and y has 3 classes"),
        (
            {"x": "notes.md", "model": RNNLanguageModel(256, 4)},
            r"notes\.md is a file: expected the text itself, such as",
        ),
    ],
)
def test_folders_and_arguments_that_do_not_fit(pets, tmp_path, change, message):
    """Each is one line that says what was expected."""
    (tmp_path / "notes.md").write_text("a text")
    (tmp_path / "empty").mkdir()
    for name in "ab":
        (tmp_path / "hollow" / name).mkdir(parents=True)
        for index in range(2):
            (tmp_path / "damaged" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "damaged" / name / f"{index}.png").write_bytes(b"no image")
    write_classes(tmp_path / "alone" / "pets", {"cat": 2, "dog": 2})
    with pytest.raises(LightkitError, match=message) as error:
        fit(**{"model": net(), "x": pets, **change})
    assert isinstance(error.value, (ConfigError, DataError)) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "x", "message"),
    [
        ("predict", [], "x must have at least one image file, got an empty list"),
        ("predict", ["pets/cat/000.png", "nowhere.png"], "x has files that do not exist: nowhere.png"),
        ("predict", "empty", "empty holds no images"),
        ("evaluate", "pets/cat", "pets/cat has no images of the classes cat, dog, owl"),
        ("evaluate", "nowhere", "x=nowhere must be a folder with a folder for each class"),
        ("evaluate", "sets", "x=sets has no images of the classes cat, dog, owl in a test set"),
    ],
)
def test_samples_that_the_result_cannot_use(pets, tmp_path, method, x, message):
    """Each is one line that names the path."""
    (tmp_path / "empty").mkdir()
    for name in ("train", "val"):
        write_classes(tmp_path / "sets" / name, {"cat": 2, "dog": 2})
    result = fit(net(), pets, epochs=1)
    with pytest.raises(DataError, match=message):
        getattr(result, method)(x)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        getattr(result, method)(pets, batch_size=0)
    with pytest.raises(ConfigError, match=r"evaluate\(\) of a folder takes y from the names"):
        result.evaluate(pets, np.zeros(36))


def test_the_examples_of_the_documentation_run(tmp_path):
    """The programs in docs/fit.md about folders and several models run as they stand there."""
    for name in ("photos", "more_photos"):
        write_classes(tmp_path / name, {"cat": 6, "dog": 6})
    for name in ("a.jpg", "b.jpg"):
        write_picture(tmp_path / "new" / name)
    page = (Path(__file__).parents[2] / "docs" / "fit.md").read_text()
    part = page.partition("## Folders of images")[2].partition("## The data module alone")[0]
    names: dict = {"lightkit": lightkit}
    blocks = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("epochs=20", "epochs=1").replace("seed=seed", "seed=seed, epochs=1"), names)
    assert names["result"].classes == ("cat", "dog") and len(names["together"].model.models) == 3
    assert names["probabilities"].shape == (2, 2)
