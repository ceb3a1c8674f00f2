"""Jobs on a folder of images: training, resuming, evaluation and prediction need no key besides the folder."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
from support.pictures import write_classes

from lightkit.app.prediction import predict_from
from lightkit.app.restore import restore
from lightkit.data import ImageFolder
from lightkit.errors import CheckpointError

JOB = ["+experiment=cnn", "data=image_folder", "trainer=cpu", "data.batch_size=8", "logger.tensorboard=null"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    # The compiled kernels of the tests lie in the usual one.
    from lightkit.data import cache

    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(cache, "cache_root", lambda: directory)


def train(call, tmp_path, *words, out="out"):
    result = call("train", *JOB, f"hydra.run.dir={out}", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return json.loads((tmp_path / out / "metrics.json").read_text())


def test_two_classes_in_colour(call, tmp_path):
    """Pictures of 20 x 26 pixels are trained, measured elsewhere, and predicted as they were in the test."""
    write_classes(tmp_path / "pets", {"cat": 20, "dog": 20})
    metrics = train(call, tmp_path, "data.path=pets", "trainer.max_epochs=3")
    assert metrics["test/accuracy"] == 1
    record = (tmp_path / "out" / "config.yaml").read_text()
    assert "  in_channels: 3\n  num_classes: 2\n  image_size:\n  - 20\n  - 26\n" in record
    assert "  classes:\n  - cat\n  - dog\n" in record
    assert "dog" in (tmp_path / "out" / "report.html").read_text()
    shutil.move(tmp_path / "pets", tmp_path / "moved")
    best = "ckpt_path=out/checkpoints/best.ckpt"
    result = call("evaluate", best, "data_dir=moved", "accelerator=cpu", "output=again.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["test/loss"] == pytest.approx(metrics["test/loss"], rel=1e-6)
    result = call("predict", best, "input=[moved/cat,moved/d*]", "output=out.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert len(rows) == 40 and all(row["label"] in row["path"] for row in rows)
    (entry,) = predict_from("out/checkpoints/best.ckpt", input="moved/cat/000.png").entries()
    assert entry["label"] == "cat" and list(entry["probabilities"]) == ["cat", "dog"]
    # The probabilities are those of the batches that the test had.
    restored = restore(tmp_path / "out" / "checkpoints" / "best.ckpt")
    data = restored.build_data()
    data.path = str(tmp_path / "moved")
    data.setup("test")
    with torch.inference_mode():
        expected = restored.task.predict_step(data.to_input(data.test.images), 0).amax(dim=1)
    files = [labelled.file.name for labelled in data._read_tree().sets["test"]]
    found = {row["path"]: float(row["probability"]) for row in rows}
    for name, probability in zip(files, expected.tolist(), strict=True):
        assert found[f"moved/{name}"] == pytest.approx(probability, rel=1e-5)


def test_a_stream_trains_as_the_memory_does(call, tmp_path):
    """Images that do not fit give the same figures, and a training that stops within an epoch goes on exactly."""
    write_classes(tmp_path / "pets", {"cat": 20, "dog": 20})
    words = ["data.path=pets", "trainer.max_epochs=2"]
    held = train(call, tmp_path, *words, out="held")
    streamed = train(call, tmp_path, *words, "data.memory_limit=0", out="streamed")
    stopped = [*words, "data.memory_limit=0", "+callbacks.checkpoint.every_n_train_steps=1", "trainer.max_steps=6"]
    train(call, tmp_path, *stopped, out="stopped")
    last = "ckpt_path=stopped/checkpoints/last.ckpt"
    resumed = train(call, tmp_path, *words, "data.memory_limit=0", last, out="resumed")
    for metrics in (streamed, resumed):
        assert metrics["test/loss"] == held["test/loss"]
        assert metrics["steps"] == held["steps"]


FLIP = "data.transform={_target_:lightkit.data.augment.Flip,horizontal:0.5}"


@pytest.mark.parametrize(
    "transform", ["data.transform=strong", FLIP, f"data.transform=[light,{FLIP.partition('=')[2]}]"]
)
def test_random_changes(call, tmp_path, transform):
    """A job whose training images change goes on exactly after a stop; predictions do without the transform."""
    write_classes(tmp_path / "pets", {"cat": 20, "dog": 20})
    words = ["data.path=pets", "trainer.max_epochs=2"]
    whole = train(call, tmp_path, *words, transform, out="whole")
    train(
        call,
        tmp_path,
        *words,
        transform,
        "+callbacks.checkpoint.every_n_train_steps=1",
        "trainer.max_steps=6",
        out="stopped",
    )
    resumed = train(call, tmp_path, *words, transform, "ckpt_path=stopped/checkpoints/last.ckpt", out="resumed")
    assert resumed["test/loss"] == whole["test/loss"]
    if transform == "data.transform=strong":
        assert train(call, tmp_path, *words, out="plain")["test/loss"] != whole["test/loss"]
        return
    result = call("predict", "ckpt_path=whole/checkpoints/best.ckpt", "input=pets/cat", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_checkpoint_names_its_classes(tmp_path, monkeypatch):
    """A stranger's checkpoint cannot have a folder read by leaving the classes out."""
    from lightkit.app.restore import RestoredTask

    monkeypatch.setattr(ImageFolder, "_read_tree", lambda self: pytest.fail("the folder was read"))
    config = {"data": {"_target_": "lightkit.data.ImageFolder", "path": "/"}, "model": {}}
    with pytest.raises(CheckpointError, match="does not say the classes, the size or the channels"):
        RestoredTask(config, None, {}).build_data()
