"""Continuation of a text with a checkpoint: the prompt, the options and the output."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from lightkit._util.printable import printable
from lightkit.app import prediction
from lightkit.app.factory import build_task
from lightkit.app.restore import RestoredTask
from lightkit.compress import QUANTIZATION_KEY, QuantizationScheme, apply_quantization, calibrate
from lightkit.errors import ConfigError, DataError
from lightkit.tasks import LanguageModelTask


@pytest.fixture
def restored():
    """Returns an untrained language model of bytes."""
    torch.manual_seed(0)
    config = OmegaConf.create(
        {
            "model": {"_target_": "lightkit.models.RNNLanguageModel", "vocab_size": 256, "hidden_size": 8},
            "task": {"_target_": "lightkit.tasks.LanguageModelTask"},
            "optim": {"_target_": "lightkit.optim.Adam", "_partial_": True},
            "data": {"_target_": "lightkit.data.Text"},
        }
    )
    return RestoredTask(OmegaConf.to_container(config), build_task(config).eval(), {})


def predict(restored, **given):
    """Predicts with the given keys of the command."""
    return prediction.predict(restored, prediction.PredictionRequest(**given))


def test_prompt_of_a_file_or_of_the_command_line(restored, tmp_path, capsys):
    """The same prompt and seed give the same text, and the output file has its unchanged bytes."""
    (tmp_path / "prompt").write_bytes("naïve ".encode() + b"\xff")
    first = predict(restored, input=str(tmp_path / "prompt"), length=50, seed=1)
    again = predict(restored, input=str(tmp_path / "prompt"), length=50, seed=1)
    other = predict(restored, input=str(tmp_path / "prompt"), length=50, seed=2)
    assert first == again != other
    first.write(tmp_path / "out")
    written = (tmp_path / "out").read_bytes()
    assert written.startswith("naïve ".encode() + b"\xff") and len(written) == 8 + 50
    first.show()
    shown = capsys.readouterr().out
    assert shown == printable(written.decode(errors="replace"), keep="\n\t") + "\n"
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)
    given = predict(restored, text="naïve", length=50, seed=1)
    assert given.prompt == "naïve".encode() and len(given.added) == 50


def test_weights_in_int8(restored):
    """int8 continues the text with the rounded weights."""
    rounded = predict(restored, text="a", length=200, seed=1, weights="int8")
    assert len(rounded.added) == 200 and rounded == predict(restored, text="a", length=200, seed=1, weights="int8")
    assert predict(restored, text="a", length=200, seed=1, weights="float32") == predict(
        restored, text="a", length=200, seed=1
    )


def test_empty_prompt(restored):
    """An empty prompt begins like a file, and without a seed each text differs."""
    first, second = predict(restored, text=""), predict(restored, text="")
    assert first.prompt == b"" and len(first.added) == 400
    assert first.added != second.added


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "input=FILE or text=TEXT .* give one of them, not 0"),
        ({"input": "x", "text": "y"}, "give one of them, not 2"),
        ({"text": "a", "length": 0}, "length must be at least 1, got 0"),
        ({"text": "a", "temperature": -1}, "temperature must be at least 0, got -1"),
        ({"text": "a", "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"text": "a", "seed": -1}, "seed must be from 0 to 18446744073709551615, got -1"),
        ({"text": "a", "seed": 2**64}, "seed must be from 0"),
        ({"text": "a", "weights": "int4"}, "weights must be one of 'float32', 'int8', got 'int4'"),
        ({"text": "a", "cache": "int8"}, "cache='int8' is for the keys and values of a Transformer"),
        ({"text": "a", "invert": True}, "invert: the checkpoint is of a model for text, these are for images"),
    ],
)
def test_wrong_keys(restored, given, named):
    """The error names a key that is out of range or for another kind of model."""
    with pytest.raises(ConfigError, match=named):
        predict(restored, **given)


def test_input_that_is_not_there(restored, tmp_path):
    """The error names a file that cannot be read."""
    with pytest.raises(DataError, match=r"input=.*nowhere cannot be read: No such file"):
        predict(restored, input=str(tmp_path / "nowhere"))


def test_a_checkpoint_of_eight_bits_is_decoded_by_its_integers(restored, monkeypatch):
    """A model of 8 bits takes the decoder's int8 weights by itself, one of 4 bits or in float does not."""
    taken = []
    generate = LanguageModelTask.generate

    def spy(self, *arguments, **options):
        taken.append(options.get("weights"))
        return generate(self, *arguments, **options)

    monkeypatch.setattr(LanguageModelTask, "generate", spy)
    task = restored.task
    for bits in (None, 4, 8):
        if bits is not None:
            apply_quantization(task, {QUANTIZATION_KEY: calibrate(task, QuantizationScheme(bits), lambda: None)})
        predict(restored, text="a", length=5, seed=1)
    predict(restored, text="a", length=5, seed=1, weights="float32")
    assert taken == [None, None, "int8", "float32"]
