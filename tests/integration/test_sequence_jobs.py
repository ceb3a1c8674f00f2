"""Shortened jobs on sequences and on text."""

from __future__ import annotations

import csv
import json
import math
import re

import pytest
from PIL import Image
from support.commands import run, run_python, the_error

from lightkit.checkpoints import load_checkpoint
from lightkit.data import MNIST5k

pytestmark = pytest.mark.slow

SMALL = ["model.dim=32", "model.num_layers=1", "data.context=32", "data.batch_size=8", "data.eval_batch_size=64"]
LIMITS = ["trainer.limit_train_batches=20", "trainer.limit_val_batches=2", "trainer.limit_test_batches=8"]
# A small transformer on the text of the fixture `text`.
TEXT = ["+experiment=language_model", "data.path=text.txt", "data.test_share=0.2", "data.validation_share=0.2", *SMALL]


def assert_fails(result, *expected):
    """Asserts that the command failed with one error that has all expected texts, and without a traceback."""
    error = the_error(result)
    for text in expected:
        assert text in error


def train(directory, *arguments):
    """Runs a job in a directory and returns its output."""
    return run("train", *arguments, "hydra.run.dir=out", cwd=directory, status=0).stdout


def figures(directory):
    return json.loads((directory / "out" / "metrics.json").read_text())


@pytest.fixture
def text(tmp_path):
    """Returns a directory with a text that is easy to learn."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog <&>\n" * 400)
    return tmp_path


@pytest.fixture(scope="module")
def rnn(tmp_path_factory):
    """Returns the directory and the output of a third of the experiment."""
    directory = tmp_path_factory.mktemp("rnn")
    return directory, train(directory, "+experiment=rnn", "trainer.max_epochs=5")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Returns the directory and the output of a small and short experiment on the default text."""
    directory = tmp_path_factory.mktemp("language_model")
    small = ["model.dim=64", "model.num_layers=2", "data.context=64", "trainer.max_epochs=2"]
    limits = ["trainer.limit_train_batches=100", "trainer.limit_val_batches=4", "trainer.limit_test_batches=8"]
    return directory, train(directory, "+experiment=language_model", *small, *limits)


def test_rnn(rnn):
    """An LSTM learns to read digits row by row, and its report is that of a classification."""
    directory, output = rnn
    # The accuracy is 0.95 after 15 epochs and 0.91 after these 5.
    assert figures(directory)["test/accuracy"] > 0.8
    assert "val/accuracy" in output
    assert "Confusion matrix" in (directory / "out" / "report.html").read_text()


def test_rnn_predicts_pictures(rnn, tmp_path):
    """The checkpoint of the LSTM classifies image files, which become rows like the training images."""
    data = MNIST5k()
    data.setup()
    (tmp_path / "pictures").mkdir()
    for index, (image, label) in enumerate(zip(data.test.images[:200], data.test.labels[:200].tolist(), strict=True)):
        Image.fromarray(image.numpy()).save(tmp_path / "pictures" / f"{index:03d}-{label}.png")
    best = rnn[0] / "out" / "checkpoints" / "best.ckpt"
    run("predict", f"ckpt_path={best}", "input=pictures", "output=out.csv", cwd=tmp_path, status=0)
    rows = list(csv.DictReader(open(tmp_path / "out.csv", newline="")))
    assert sum(f"-{row['label']}.png" in row["path"] for row in rows) > 0.75 * 200


def test_language_model(language_model):
    """The model beats the unigram baseline on Python's sources within 200 steps; its metrics are consistent."""
    directory, output = language_model
    metrics = figures(directory)
    assert metrics["test/bits_per_byte"] < metrics["baseline/unigram_bits_per_byte"] - 0.5
    assert 2.5 < metrics["baseline/bigram_bits_per_byte"] < 4 < metrics["baseline/unigram_bits_per_byte"] < 5
    assert metrics["test/bits_per_byte"] == pytest.approx(metrics["test/loss"] / math.log(2), rel=1e-5)
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-5)
    assert metrics["train/tokens_per_second"] > 0 and metrics["steps"] == 200
    assert "val/bits_per_byte" in output and "baseline/bigram_bits_per_byte" in output


def test_report_of_a_language_model(language_model):
    """The page embeds figures, generated texts with their prompts, and a passage coloured by bits."""
    page = (language_model[0] / "out" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    # Links lead to files beside the page; nothing is loaded from elsewhere.
    assert not re.search(r'src="(?!data:)|href="(\w+:|//)', page)
    for title in ("Learning curves", "Bits a byte of the test", "By place in the window", "What it writes"):
        assert f"<h2>{title}</h2>" in page
    assert page.count('<span style="color: #64748b">') == 3
    assert page.count("rgba(234, 88, 12,") > 100
    assert "bits a byte of the test</span>" in page


def test_evaluate_gives_the_same_figures(text):
    """`lightkit.evaluate` computes the training's test metrics from the checkpoint and a moved text."""
    train(text, *TEXT, *LIMITS[:2], "trainer.max_epochs=1")
    (text / "text.txt").rename(text / "moved.txt")
    arguments = ["ckpt_path=out/checkpoints/best.ckpt", "data_dir=moved.txt", "output=figures.json"]
    run("evaluate", *arguments, cwd=text, status=0)
    found = json.loads((text / "figures.json").read_text())
    assert found == {name: figures(text)[name] for name in ("test/bits_per_byte", "test/loss", "test/perplexity")}


def test_char_rnn(text):
    """The recurrent language model learns a text by heart, and the page escapes the markup in the text."""
    sizes = ["data.context=32", "data.batch_size=8", "model.hidden_size=96", "optim.lr=0.01"]
    shares = ["data.test_share=0.2", "data.validation_share=0.2"]
    train(text, "+experiment=char_rnn", "data.path=text.txt", *sizes, *shares, "trainer.max_epochs=4")
    metrics = figures(text)
    # Only the first bytes of a window are unpredictable.
    assert metrics["test/bits_per_byte"] < min(0.6, metrics["baseline/bigram_bits_per_byte"])
    page = (text / "out" / "report.html").read_text()
    assert "dog &lt;&amp;&gt;" in page and "<&>" not in page
    predict = ["ckpt_path=out/checkpoints/best.ckpt", "text='the quick br'", "length=120", "temperature=0.1", "seed=0"]
    result = run("predict", *predict, cwd=text, status=0)
    assert result.stdout.startswith("the quick brown fox jumps over the lazy dog <&>\nthe quick")


def test_compiled_and_in_mixed_precision(text):
    """compile=true compiles training in bfloat16 too and writes a checkpoint with the same names as any other run."""
    arguments = ["-m", "lightkit.train", *TEXT, "compile=true", "trainer.precision=bf16-mixed", "hydra.run.dir=out"]
    # All batches have one size, so that torch compiles once.
    short = ["data.eval_batch_size=8", "trainer.max_epochs=1", "trainer.limit_train_batches=4", "test=false"]
    # torch reads the variable at import.
    variables = {"TORCH_LOGS": "graph_code"}
    result = run_python(*arguments, *short, LIMITS[1], cwd=text, environment=variables, status=0)
    assert "scaled_dot_product_attention" in result.stderr
    keys = load_checkpoint(text / "out" / "checkpoints" / "last.ckpt")["state_dict"].keys()
    assert "model.body.layers.0.attention.qkv.weight" in keys


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.path=nowhere"], ["there is no text at nowhere"]),
        (["data.path=short"], ["the train part of short has 93 bytes", "context + 1 = 129", "validation 2, test 5"]),
        (["model=cnn"], ["Text serves tokens", "no classes", "experiments for it: language_model, char_rnn"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(call, tmp_path, arguments, expected):
    """The error names a missing or short text or a wrong model, before any training."""
    (tmp_path / "short").write_bytes(b"x" * 100)
    assert_fails(call("train", "+experiment=language_model", *arguments, cwd=tmp_path), *expected)


def test_number_of_outputs(call, tmp_path):
    """A model whose number of outputs differs from the number of classes is an error."""
    result = call("train", "+experiment=rnn", "model.num_outputs=7", cwd=tmp_path)
    assert_fails(result, "the data has 10 classes but model.num_outputs is 7")


def test_prompt_for_an_image_model(rnn, call, tmp_path):
    """The key text with a model for images is an error."""
    best = rnn[0] / "out" / "checkpoints" / "best.ckpt"
    result = call("predict", f"ckpt_path={best}", "text=hello", cwd=tmp_path)
    assert_fails(result, "text: the checkpoint is of a model for images, these are for text")
