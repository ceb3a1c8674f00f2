"""Jobs on images of another size than 28: training, evaluation and prediction fit together."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from support.commands import run, the_error
from support.idx_files import write_idx_set

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("experiment", "size"), [("cnn", (20, 20)), ("cnn", (20, 26)), ("rnn", (30, 18))])
def test_training_evaluation_and_prediction(tmp_path, experiment, size):
    """A model of small or narrow images is trained, measured, and predicts pictures of any size."""
    write_idx_set(tmp_path / "set", 60, 20, size)
    write_idx_set(tmp_path / "other", 60, 20, (28, 28))
    arguments = ["data=mnist", f"data.data_dir={tmp_path / 'set'}", "data.validation_size=20", "hydra.run.dir=out"]
    run("train", f"+experiment={experiment}", "+debug=quick", *arguments, cwd=tmp_path, status=0)
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["MNIST"] == {"image_shape": list(size)}
    run("evaluate", f"ckpt_path={last}", "output=figures.json", "accelerator=cpu", cwd=tmp_path, status=0)
    assert "test/accuracy" in json.loads((tmp_path / "figures.json").read_text())
    message = "MNIST are 28 x 28 pixels, and the model of the checkpoint takes"
    assert message in the_error(run("evaluate", f"ckpt_path={last}", f"data_dir={tmp_path / 'other'}", cwd=tmp_path))
    # A prediction needs the checkpoint alone.
    (tmp_path / "set").rename(tmp_path / "gone")
    Image.effect_noise((90, 70), 90).save(tmp_path / "scan.png")
    run("predict", f"ckpt_path={last}", "input=scan.png", "output=out.csv", cwd=tmp_path, status=0)
    assert (tmp_path / "out.csv").read_text().startswith("path,label,probability,error\nscan.png,")
