"""Models of each kind with random weights, and requests to them without a server."""

from __future__ import annotations

import io
import json

import numpy as np
import torch
from PIL import Image

from lightkit.app.serving.kinds import find_kind
from lightkit.app.serving.messages import Request
from lightkit.app.serving.responder import Responder
from lightkit.data import MNIST5k, Series, TableDataModule, Text
from lightkit.models import CNN, MLP, RNN, Transformer
from lightkit.tasks import ClassificationTask, ForecastTask, LanguageModelTask, RegressionTask
from support.rows import write_customers
from support.series import write_wave

JSON = "application/json"


def answer(kind, body, media_type=JSON, **query):
    """Returns the status and the object with which a kind answers one request."""
    found = answers(kind, [(body, media_type, query)])
    return found[0]


def answers(kind, requests):
    """Returns the status and the object for each request of a batch."""
    replies = {}
    encoded = [
        Request(body if isinstance(body, bytes) else json.dumps(body).encode(), media_type, query)
        for body, media_type, query in requests
    ]
    Responder(kind).answer(encoded, replies.__setitem__)
    return [(replies[index].status, json.loads(replies[index].body)) for index in range(len(requests))]


def picture(seed=0, size=(28, 28), format="PNG"):
    """Returns the content of an image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def digits():
    """Returns a classifier of digits."""
    torch.manual_seed(0)
    return find_kind(ClassificationTask(CNN()).eval(), MNIST5k())


def customers(tmp_path, kind="classification"):
    """Returns the task and the data of a table of customers, whose file is customers.csv."""
    torch.manual_seed(0)
    target = "leaves" if kind == "classification" else "age"
    data = TableDataModule(str(write_customers(tmp_path / "customers.csv")), target, kind=kind)
    data.setup()
    sizes = {name: data.model_sizes()[name] for name in ("input_size", "category_sizes", "num_outputs")}
    model = MLP(**sizes)
    task = ClassificationTask(model) if kind == "classification" else RegressionTask(model, num_targets=1)
    return task.eval(), data


def wave(tmp_path, **options):
    """Returns the task and the data of a forecaster of the file wave.csv."""
    torch.manual_seed(0)
    write_wave(tmp_path / "wave.csv")
    data = Series(path=str(tmp_path / "wave.csv"), column="price", history=12, horizon=4, **options)
    return ForecastTask(RNN(1, 4, 4), horizon=4).eval(), data


def writer(max_length=50):
    """Returns the task and the data of a model of text, and its kind."""
    torch.manual_seed(0)
    task = LanguageModelTask(Transformer(256, 16, 1, 2, context=16)).eval()
    return task, Text(context=16), find_kind(task, Text(context=16), max_length=max_length)
