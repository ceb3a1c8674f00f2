"""Whole jobs on sequences and on text, shortened."""

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
# A small transformer on a text of its own.
TEXT = ["+experiment=language_model", "data.path=text.txt", "data.test_share=0.2", "data.validation_share=0.2", *SMALL]


def assert_fails(result, *expected):
    """The command failed with one error that says all this, and without a traceback."""
    error = the_error(result)
    for text in expected:
        assert text in error


def train(directory, *arguments):
    """Runs a job in a directory; returns its output."""
    return run("train", *arguments, "hydra.run.dir=out", cwd=directory, status=0).stdout


def figures(directory):
    return json.loads((directory / "out" / "metrics.json").read_text())


@pytest.fixture
def text(tmp_path):
    """A text that is easy to learn, in the directory of the job."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog <&>\n" * 400)
    return tmp_path


@pytest.fixture(scope="module")
def rnn(tmp_path_factory):
    """A third of the experiment."""
    directory = tmp_path_factory.mktemp("rnn")
    return directory, train(directory, "+experiment=rnn", "trainer.max_epochs=5")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tenth of a smaller experiment on the default text."""
    directory = tmp_path_factory.mktemp("language_model")
    small = ["model.dim=64", "model.num_layers=2", "data.context=64", "trainer.max_epochs=2"]
    limits = ["trainer.limit_train_batches=100", "trainer.limit_val_batches=4", "trainer.limit_test_batches=8"]
    return directory, train(directory, "+experiment=language_model", *small, *limits)


def test_rnn(rnn):
    """An LSTM learns to read digits row by row, and leaves the report of any classification."""
    directory, output = rnn
    # After 15 epochs it is 0.95; this short it is 0.91.
    assert figures(directory)["test/accuracy"] > 0.8
    assert "val/accuracy" in output
    assert "Confusion matrix" in (directory / "out" / "report.html").read_text()


def test_rnn_predicts_pictures(rnn, tmp_path):
    """Its checkpoint classifies picture files, which become rows as the training images did."""
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
    """On Python's own sources it beats counting bytes within 200 steps; all figures agree with each other."""
    directory, output = language_model
    metrics = figures(directory)
    assert metrics["test/bits_per_byte"] < metrics["baseline/unigram_bits_per_byte"] - 0.5
    assert 2.5 < metrics["baseline/bigram_bits_per_byte"] < 4 < metrics["baseline/unigram_bits_per_byte"] < 5
    assert metrics["test/bits_per_byte"] == pytest.approx(metrics["test/loss"] / math.log(2), rel=1e-5)
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-5)
    assert metrics["train/tokens_per_second"] > 0 and metrics["steps"] == 200
    assert "val/bits_per_byte" in output and "baseline/bigram_bits_per_byte" in output


def test_report_of_a_language_model(language_model):
    """The page shows figures, texts with what they go on from, and a passage coloured by surprise, in itself."""
    page = (language_model[0] / "out" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    for title in ("Learning curves", "Bits a byte of the test", "By place in the window", "What it writes"):
        assert f"<h2>{title}</h2>" in page
    assert page.count('<span style="color: #64748b">') == 3
    assert page.count("rgba(234, 88, 12,") > 100
    assert "bits a byte of the test</span>" in page


def test_evaluate_gives_the_same_figures(text):
    """From the checkpoint alone, with the text in another place, the test comes out as in training."""
    train(text, *TEXT, *LIMITS[:2], "trainer.max_epochs=1")
    (text / "text.txt").rename(text / "moved.txt")
    arguments = ["ckpt_path=out/checkpoints/best.ckpt", "data_dir=moved.txt", "output=figures.json"]
    run("evaluate", *arguments, cwd=text, status=0)
    found = json.loads((text / "figures.json").read_text())
    assert found == {name: figures(text)[name] for name in ("test/bits_per_byte", "test/loss", "test/perplexity")}


def test_char_rnn(text):
    """The recurrent language model learns a text by heart, and what is markup in it is none on the page."""
    sizes = ["data.context=32", "data.batch_size=8", "model.hidden_size=96", "optim.lr=0.01"]
    shares = ["data.test_share=0.2", "data.validation_share=0.2"]
    train(text, "+experiment=char_rnn", "data.path=text.txt", *sizes, *shares, "trainer.max_epochs=4")
    metrics = figures(text)
    # Only the first bytes of a window leave anything to guess.
    assert metrics["test/bits_per_byte"] < min(0.6, metrics["baseline/bigram_bits_per_byte"])
    page = (text / "out" / "report.html").read_text()
    assert "dog &lt;&amp;&gt;" in page and "<&>" not in page
    predict = ["ckpt_path=out/checkpoints/best.ckpt", "text='the quick br'", "length=120", "temperature=0.1", "seed=0"]
    result = run("predict", *predict, cwd=text, status=0)
    assert result.stdout.startswith("the quick brown fox jumps over the lazy dog <&>\nthe quick")


def test_compiled_and_in_mixed_precision(text):
    """compile=true compiles what training runs, with bfloat16 too; the checkpoint is that of any other run."""
    arguments = ["-m", "lightkit.train", *TEXT, "compile=true", "trainer.precision=bf16-mixed", "hydra.run.dir=out"]
    # One size of batches, for which it compiles once.
    short = ["data.eval_batch_size=8", "trainer.max_epochs=1", "trainer.limit_train_batches=4", "test=false"]
    # Which torch reads when it is imported.
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
    """A text that is missing or too short, and settings that fit nothing, are named before any training."""
    (tmp_path / "short").write_bytes(b"x" * 100)
    assert_fails(call("train", "+experiment=language_model", *arguments, cwd=tmp_path), *expected)


def test_number_of_outputs(call, tmp_path):
    """A model with another number of outputs than there are classes is refused."""
    result = call("train", "+experiment=rnn", "model.num_outputs=7", cwd=tmp_path)
    assert_fails(result, "the data has 10 classes but model.num_outputs is 7")


def test_prompt_for_an_image_model(rnn, call, tmp_path):
    """A text that is given to a model for images is said to be of another kind."""
    best = rnn[0] / "out" / "checkpoints" / "best.ckpt"
    result = call("predict", f"ckpt_path={best}", "text=hello", cwd=tmp_path)
    assert_fails(result, "text: the checkpoint is of a model for images, these are for text")
