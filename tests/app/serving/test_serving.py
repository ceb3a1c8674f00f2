"""A server in a thread of this process: its routes and limits, by real connections."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from support.http import ask, send
from support.processes import wait_for

import lightkit.serve
from lightkit.app.serving import Server, ServerSettings, worker
from lightkit.app.serving.dispatch import Dispatcher
from lightkit.data import DataModule
from lightkit.errors import CheckpointError, ConfigError, Terminated
from lightkit.fitting import FitResult
from lightkit.serve.__main__ import Keys
from lightkit.tasks import ClassificationTask

pytest.importorskip("fastapi_offline")


def make_result(model=None):
    """Returns the result of a training on arrays that has not happened."""
    torch.manual_seed(0)
    data = DataModule.from_arrays(np.random.default_rng(0).random((20, 5)), ["a", "b"] * 10)
    return FitResult(ClassificationTask(model or torch.nn.Linear(5, 2)), data, {})


@pytest.fixture(scope="module")
def result():
    return make_result()


@pytest.fixture(scope="module")
def url(result):
    with Server(result, port=0, max_body_mb=0.01, max_waiting=3) as running:
        yield running.url


def test_answers_are_those_of_the_result(result, url):
    """Concurrent requests get the predictions of their own samples."""
    samples = np.random.default_rng(1).random((12, 1, 5)).astype(np.float32)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda x: ask(url, {"x": x.tolist()}), samples))
    for x, (status, content) in zip(samples, found, strict=True):
        assert status == 200
        (entry,) = content["predictions"]
        assert list(entry["probabilities"].values()) == pytest.approx(result.predict(x)[0].tolist(), rel=1e-6)


def test_a_large_body_gets_413(url):
    """A body beyond the limit is an error that the client can read, with a declared length and in chunks."""
    for body in (b"x" * 1_000_000, iter([b"x" * 8000] * 50)):
        status, text = send(url, body=body, media_type="application/json")
        assert status == 413
        assert json.loads(text)["error"].startswith("the body must have at most 10,485 bytes, got ")


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nothing", 404, "there is no /nothing; POST /predict answers requests, and GET /docs describes them"),
        ("GET", "/predict", 405, "/predict takes no GET; POST /predict answers requests"),
        ("POST", "/predict?a=1&a=2", 400, "each parameter of the query may stand once"),
        ("POST", "/predict", 400, "the body is empty, expected application/json"),
        ("GET", "/static-offline-docs/../../../etc/passwd", 404, "there is no /"),
    ],
)
def test_errors_of_routes_are_json(url, method, path, status, message):
    """Each error is an object with one message."""
    found, text = send(url, path, method=method)
    assert found == status and message in json.loads(text)["error"]


def test_the_page_works_without_a_network(url):
    """The page of the OpenAPI description loads scripts and styles from this server alone."""
    status, page = send(url, "/docs")
    assert status == 200
    places = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert places and all(place.startswith("/") for place in places)
    assert all(send(url, place, body=None)[0] == 200 for place in places if not place.endswith(".png"))
    assert send(url, "/")[0] == 307


def test_the_description_is_that_of_the_model(url):
    """The example of the description is a request, whose answer is there."""
    _, description = ask(url, None, "/openapi.json")
    operation = description["paths"]["/predict"]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    assert list(content["schema"]["properties"]) == ["x"]
    answer = operation["responses"]["200"]["content"]["application/json"]["example"]
    assert ask(url, content["example"]) == (200, answer)
    status, about = ask(url, None, "/info")
    assert status == 200 and about["classes"] == ["a", "b"] and about["version"] == lightkit.__version__
    assert about["input"] == {"shape": [5], "dtype": "float"} and about["limits"]["max_waiting"] == 3
    assert ask(url, None, "/health") == (200, {"status": "ok"})


def test_a_slow_client_holds_no_place_for_ever():
    """A body that does not come gets 408, and requests beyond the limit 503."""
    with Server(make_result(), port=0, timeout=0.5, max_waiting=1) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
            statuses = {send(running.url, body=b"{}")[0] for _ in range(3)}
            assert statuses == {503}
            slow.settimeout(20)
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        assert send(running.url, body=b"{}")[0] == 400


def test_a_client_that_goes_is_no_fault(capfd):
    """A connection that ends within a body leaves no traceback and no place taken."""
    with Server(make_result(), port=0, max_waiting=1) as running:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", running.port)) as connection:
                connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
                # The server has the place only after it has read the head.
                assert send(running.url, "/health")[0] == 200
        statuses = {send(running.url, body=b"{}")[0] for _ in range(3)}
        assert 400 in statuses
    assert "Traceback" not in capfd.readouterr().err


def refuses(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def test_a_fault_of_the_server_ends_it(monkeypatch):
    """A server that cannot answer any more stops, rather than let requests wait for nothing."""

    async def fail(*arguments):
        raise RuntimeError("a fault")

    monkeypatch.setattr(Dispatcher, "_batch_for", fail)
    with pytest.raises(RuntimeError, match="a fault"), Server(make_result(), port=0) as running:
        wait_for(lambda: refuses(running.port))


def test_a_server_stops_and_leaves_nothing():
    """After the context the port is free and no thread is left; a failure of the start is raised."""
    before = set(threading.enumerate())
    with Server(make_result(), port=0) as running:
        port = running.port
        with pytest.raises(ConfigError, match=rf"cannot listen on host=127\.0\.0\.1 port={port}: "), running_on(port):
            pass
    assert {thread for thread in threading.enumerate() if thread.name.startswith("lightkit")} <= before
    again = Server(make_result(), port=port)
    for _ in range(2):
        with again:
            assert send(again.url, "/health")[0] == 200
    with pytest.raises(CheckpointError, match="the model does not answer an example"):
        Server(make_result(torch.nn.Linear(3, 2)), port=0).__enter__()


def running_on(port):
    return Server(make_result(), port=port)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port must be from 0 to 65535, got 70000"),
        ({"port": "x"}, "port must be int, got 'x'"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"batch_timeout": -1.0}, "batch_timeout must be a number of seconds from 0 on, got -1.0"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0, got 0"),
        ({"timeout": float("nan")}, "timeout must be a number of seconds above 0, got nan"),
        ({"max_body_mb": 5000.0}, "max_body_mb must be above 0 and at most 2000, got 5000.0"),
        ({"devices": "gpu"}, "devices must be auto, cpu or a number of GPUs, got 'gpu'"),
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"prot": 1}, "'prot' is no setting of a server; expected host, port,"),
        ({"workers": 2}, "workers and devices go with files"),
    ],
)
def test_wrong_settings(settings, message):
    """One line names the setting, its value and what was expected."""
    with pytest.raises(ConfigError) as error:
        Server(make_result(), **settings)
    assert message in str(error.value)


def test_devices_of_workers():
    """A worker takes the first GPU or the CPU by itself, and says how many GPUs there are if its own is missing."""
    assert worker._find_device("auto", 0) == worker._find_device("cpu", 2) == "cpu"
    assert worker._find_device("auto", 2) == "cuda:0" and worker._find_device("cuda:1", 2) == "cuda:1"
    with pytest.raises(ConfigError, match="there is no cuda:1: this machine has 1 GPU; on a CPU workers=N"):
        worker._find_device("cuda:1", 1)


def test_a_missing_package(monkeypatch):
    """One line says how to install it."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"serving needs the package uvicorn: pip install .*\[serve\]"):
        Server(make_result())


def test_no_files():
    """An empty list of files is found before a process starts."""
    with pytest.raises(ConfigError, match="model must name at least one file, got an empty list"):
        Server([])


def test_the_command_has_the_settings():
    """The keys of conf/serve.yaml are those of the command, with the defaults of a server in a program."""
    with initialize_config_module("lightkit.conf", version_base="1.3"):
        config = compose("serve")
    assert set(map(str, config)) == set(Keys.__annotations__)
    assert {name: config[name] for name in vars(ServerSettings())} == vars(ServerSettings())


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_signals_end_a_server_of_a_program(number, error, capsys):
    """Ctrl-C and SIGTERM end the server in the main thread, and the program goes on with the exception."""
    # A shell has its background commands ignore SIGINT, and the server would too.
    own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, own)
    try:
        with pytest.raises(error):
            Server(make_result(), port=0).run(lambda url: os.kill(os.getpid(), number))
        assert signal.getsignal(number) == own
    finally:
        signal.signal(number, before)


def test_a_result_serves_itself(monkeypatch):
    """The method of a result passes its settings on, and prints the address."""
    seen = []
    monkeypatch.setattr(Server, "run", lambda self, announce: seen.append((self.settings.port, announce)))
    make_result().serve(port=0, max_batch_size=3)
    lightkit.serve.serve(make_result(), port=0)
    assert [port for port, _ in seen] == [0, 0]
