"""Ends of connections and workers while others wait: the errors they get, and the workers that continue."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from relay import Relay
from support.processes import wait_for
from workers import Serving, Training, together

from lightkit.errors import ConfigError, LightkitError
from lightkit.parameter_server import Clipping
from lightkit.parameter_server.aggregation import AggregationRound
from lightkit.parameter_server.shard import Shard
from lightkit.parameter_server.transport import TransportError


@pytest.fixture
def relays():
    """Makes relays, which the end of the test closes."""
    made = []

    def make(address):
        made.append(Relay(address))
        return made[-1]

    yield make
    for relay in made:
        relay.close()


def in_background(function):
    """Runs a function in a thread; returns the thread, and the list of the errors that the function raises."""
    errors = []

    def run():
        try:
            function()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


def test_reconnection_during_a_round(relays):
    """The push of the new connection replaces that of the old one, once: the two do not alternate."""
    serving = Serving(1)
    (server,) = serving.servers
    relay = relays(serving.addresses[0])
    first = Training([relay.address], 0, workers=2)
    second = Training(serving.addresses, 1, workers=2)
    thread, errors = in_background(lambda: first.step(0))
    wait_for(lambda: server.status().workers[0].pending)
    relay.cut(server_side=False)
    wait_for(lambda: server.status().joins == 3 and server.status().workers[0].pending)
    # `pending` counts pushes of the current connection alone.
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        assert server.status().workers[0].pending == {0}
    second.step(0)
    thread.join(20)
    assert not errors and not thread.is_alive()
    assert server.status().versions == (1,) and server.status().joins == 3
    together(first.end, second.end)


def test_all_workers_get_the_error_of_a_failed_step(monkeypatch):
    """In sync no worker continues with parameters that were not updated."""
    serving = Serving(1)
    trainings = [Training(serving.addresses, rank, workers=2) for rank in (0, 1)]

    def fail(*unused):
        raise RuntimeError("the optimizer cannot do that")

    monkeypatch.setattr(Shard, "step", fail)

    def work(training):
        with pytest.raises(ConfigError, match="the optimizer cannot do that"):
            training.step(0)

    together(*(lambda training=training: work(training) for training in trainings))
    for training in trainings:
        training.client.abandon()


def test_the_error_is_that_of_the_failed_server(monkeypatch):
    """With clipping, servers wait for each other: the worker gets the cause, not the effect on the other server."""
    serving = Serving(2)
    training = Training(serving.addresses, 0)
    average = AggregationRound.average

    def fail(current):
        average(current)
        if len(current.views) == 3:
            # The second of the two servers has three of the four parameters.
            raise RuntimeError("out of memory")

    monkeypatch.setattr(AggregationRound, "average", fail)
    with pytest.raises(ConfigError, match="out of memory"):
        training.step(0, Clipping(max_norm=0.1))
    training.client.abandon()


def test_a_finished_worker_that_is_lost_does_not_end_the_training(relays):
    """The network fails while one worker has finished and waits for the other: the server waits for both."""
    serving = Serving(1, timeout=3.0)
    (server,) = serving.servers
    relay = relays(serving.addresses[0])
    trainings = [Training([relay.address], rank, workers=2, mode="async") for rank in (0, 1)]
    thread, errors = in_background(trainings[0].client.finish)
    wait_for(lambda: server.status().workers[0].has_finished)
    relay.go_down()
    wait_for(lambda: not server.status().connected)
    # The server checks twice in this time whether the training is over.
    serving.threads[0].join(0.5)
    assert serving.threads[0].is_alive()
    relay.come_up()
    trainings[1].step(0)
    together(lambda: thread.join(20), trainings[1].end)
    assert not errors
    trainings[0].client.leave()
    serving.threads[0].join(20)
    assert not serving.threads[0].is_alive()


def test_abandoning_does_not_wait_for_other_workers():
    """A worker that is interrupted during a sync step ends within seconds, and does not reconnect."""
    serving = Serving(1)
    (server,) = serving.servers
    trainings = [Training(serving.addresses, rank, workers=2) for rank in (0, 1)]
    thread, errors = in_background(lambda: trainings[0].step(0))
    wait_for(lambda: server.status().workers[0].pending)
    trainings[0].client.abandon()
    thread.join(15)
    assert not thread.is_alive() and isinstance(errors[0], LightkitError) and not isinstance(errors[0], TransportError)
    # The server takes the worker for lost, and the other one continues.
    trainings[1].step(1)
    trainings[1].end()
    assert server.status().joins == 2


@pytest.mark.parametrize(("server_timeout", "worker_timeout"), [(1.0, 20.0), (20.0, 1.0)])
def test_timeouts_may_differ(server_timeout, worker_timeout):
    """The heartbeats are frequent enough for the less patient side: no worker reconnects."""
    serving = Serving(1, timeout=server_timeout)
    trainings = [Training(serving.addresses, rank, workers=2, timeout=worker_timeout) for rank in (0, 1)]

    def slow():
        for step in range(2):
            # Longer than twice the shorter timeout.
            time.sleep(2.5)
            trainings[1].step(step)
        trainings[1].end()

    def fast():
        for step in range(2):
            trainings[0].step(step)
        trainings[0].end()

    together(slow, fast)
    status = serving.servers[0].status()
    assert status.versions == (2,) and status.joins == 2


def test_worker_0_never_comes(monkeypatch):
    """The other workers wait for its parameters for a limited time."""
    monkeypatch.setattr("lightkit.parameter_server.training._FIRST_WORKER_TIMEOUT", 1.0)
    serving = Serving(1, timeout=1.0)
    with pytest.raises(ConfigError, match="worker 0, which brings the parameters, did not come"):
        Training(serving.addresses, 1, workers=2, timeout=1.0)


def test_a_training_that_has_begun():
    """A replacement of worker 0 gets the parameters of the servers, and does not begin anew."""
    serving = Serving(1)
    first = Training(serving.addresses, 0)
    first.step(0)
    weights = torch.cat([p.detach().flatten().clone() for p in first.parameters])
    first.client.abandon()
    wait_for(lambda: not serving.servers[0].status().connected)
    again = Training(serving.addresses, 0)
    assert not again.begun
    assert torch.equal(weights, torch.cat([p.detach().flatten() for p in again.parameters]))
    again.end()


def test_status():
    """Names the workers, their pushes and the version of each optimizer's parameters."""
    serving = Serving(1)
    (server,) = serving.servers
    status = server.status()
    assert status.versions == () and not status.workers and not status.connected and status.joins == 0
    training = Training(serving.addresses, 0, workers=2, mode="async")
    assert server.status().expected == {1}
    training.step(0)
    status = server.status()
    assert status.versions == (1,) and status.connected == {0} and status.sessions == 1
    assert status.workers[0].pushes == (1,) and not status.workers[0].has_finished
    training.client.abandon()
