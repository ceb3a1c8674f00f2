"""The page docs/serving.md: its programs and commands run as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from support.http import send
from support.pictures import write_picture
from support.rows import write_customers
from support.series import write_wave
from support.serving import customers

from lightkit.app.serving import Server, ServerSettings
from lightkit.data import MNIST5k, Series, Text
from lightkit.fitting import FitResult
from lightkit.models import CNN, RNN, Transformer
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask

pytest.importorskip("fastapi_offline")

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Returns a model of each kind."""
    place = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    write_wave(place / "wave.csv")
    wave = Series(path=str(place / "wave.csv"), column="price", history=4, horizon=2)
    models = {
        "pixels": (ClassificationTask(CNN()), MNIST5k()),
        "customers": customers(place),
        "values": (ForecastTask(RNN(1, 4, 2), horizon=2), wave),
        "main": (LanguageModelTask(Transformer(256, 16, 1, 2, context=16)), Text(context=16)),
    }
    return {name: FitResult(task, data, {}) for name, (task, data) in models.items()}


@pytest.mark.parametrize("name", ["pixels", "customers", "values", "def main"])
def test_the_commands_are_answered(results, tmp_path, monkeypatch, name):
    """Each command of curl gets the status 200 from a model of its kind."""
    monkeypatch.chdir(tmp_path)
    write_customers(Path("customers.csv"), target=False)
    (line,) = [line for line in blocks("sh")[1].splitlines() if name in line]
    words = shlex.split(line)
    assert words[0] == "curl" and words[-1] == "http://127.0.0.1:8000/predict"
    headers = [words[index + 1] for index, word in enumerate(words) if word == "-H"]
    body = next(words[index + 1] for index, word in enumerate(words) if word in ("-d", "--data-binary"))
    content = Path(body[1:]).read_bytes() if body.startswith("@") else body.encode()
    media_type = headers[0].partition(": ")[2] if headers else "application/x-www-form-urlencoded"
    with Server(results[name.removeprefix("def ")], port=0) as server:
        status, text = send(server.url, body=content, media_type=media_type)
    assert status == 200, text


def test_the_client_runs(results, tmp_path, monkeypatch, capsys):
    """The client of the page prints the class of its image."""
    monkeypatch.chdir(tmp_path)
    write_picture(Path("seven.png"))
    with Server(results["pixels"], port=0) as server:
        exec(blocks("python")[0].replace("http://127.0.0.1:8000", server.url), {})
    label, probability = capsys.readouterr().out.split()
    assert label in MNIST5k().classes and 0.1 <= float(probability) <= 1


def test_the_defaults_are_those_of_the_page():
    """The table of the keys has all of them with their defaults."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]+) \|", PAGE[PAGE.index("| key |") :], re.MULTILINE)
    found = {}
    for names, defaults in rows:
        found |= dict(zip(re.findall(r"\w+", names), re.findall(r"[\w.]+", defaults), strict=True))
    expected = {
        name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in vars(ServerSettings()).items()
    }
    assert found == expected
