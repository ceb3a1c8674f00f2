"""Helpers of the parameter server's tests: a small model, its workers and servers in threads, and torch alone."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import lightkit.optim
from lightkit.parameter_server import Client, OptimizerSpec, Server, TrainingSpec, group_options

SECRET = "a secret of the tests"
STEPS, BATCH = 12, 12

generator = torch.Generator().manual_seed(5)
INPUTS = torch.randn(STEPS, BATCH, 5, generator=generator)
LABELS = torch.randint(0, 3, (STEPS, BATCH), generator=generator)


torch.manual_seed(7)
_NETWORK = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def network() -> nn.Sequential:
    # A copy: threads that initialise models would share one random generator.
    return copy.deepcopy(_NETWORK)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def adam(parameters):
    return lightkit.optim.Adam(parameters, lr=0.02)


def spec_of(model, optimizer, **settings) -> TrainingSpec:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return TrainingSpec([OptimizerSpec.from_optimizer(optimizer, names)], **settings)


class Training:
    """One worker: its model, its optimizer and its client."""

    def __init__(self, addresses, rank, make_optimizer=sgd, secret=SECRET, timeout=5.0, patience=20.0, **settings):
        self.model = network()
        self.optimizer = make_optimizer(self.model.parameters())
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        spec = spec_of(self.model, self.optimizer, **settings)
        self.rank, self.workers = rank, spec.workers
        self.client = Client(addresses, secret, rank, spec, timeout, patience)
        self.begun = self.client.start([group_options(self.optimizer)], [[p.detach() for p in self.parameters]])
        self.take(self.client.pull(0))

    @torch.no_grad()
    def take(self, values):
        torch._foreach_copy_([p.detach() for p in self.parameters], list(values))

    def gradients(self, step):
        """Returns the gradients of this worker's shard of a batch."""
        self.optimizer.zero_grad()
        part = slice(self.rank, None, self.workers)
        F.cross_entropy(self.model(INPUTS[step % STEPS][part]), LABELS[step % STEPS][part]).backward()
        return [parameter.grad for parameter in self.parameters]

    def step(self, step, clipping=None):
        self.take(self.client.push(0, self.gradients(step), self.optimizer.param_groups, clipping).result())

    def end(self):
        self.client.finish()
        ((values, state, _),) = self.client.state()
        self.client.leave()
        return torch.cat([value.flatten() for value in values]), state


def train(addresses, rank, steps=STEPS, clipping=None, before=lambda step: None, **settings):
    training = Training(addresses, rank, **settings)
    for step in range(steps):
        before(step)
        training.step(step, clipping)
    return training.end()


def together(*functions: Callable[[], object], timeout: float = 60.0) -> list:
    """Runs functions in threads; returns their results, or raises the error of the first that fails."""
    results, errors = [None] * len(functions), []

    def run(index):
        try:
            results[index] = functions[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))
        assert errors or not thread.is_alive(), "a worker hangs"
    if errors:
        raise errors[0]
    return results


class Serving:
    """Servers in threads of this process."""

    def __init__(self, count=1, timeout=5.0, directory=None):
        self.servers = [Server(secret=SECRET, timeout=timeout, directory=directory) for _ in range(count)]
        self.addresses = [f"127.0.0.1:{server.listener.port}" for server in self.servers]
        self.threads = [threading.Thread(target=server.run, daemon=True) for server in self.servers]
        for thread in self.threads:
            thread.start()
        _serving.append(self)

    def stop(self):
        for server in self.servers:
            server.stop()
        for thread in self.threads:
            thread.join(10)


_serving: list[Serving] = []


def stop_serving():
    """Stops all servers in threads."""
    while _serving:
        _serving.pop().stop()


class ServerProcess:
    """A server process, which tests kill and restart."""

    def __init__(self, directory: Path | None = None, timeout=5.0, quiet=False):
        self.directory, self.timeout, self.port = directory, timeout, 0
        # A full pipe that no test reads would block the server.
        self.errors = subprocess.DEVNULL if quiet else subprocess.PIPE
        self.start()

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "lightkit.parameter_server", "--port", str(self.port), "--leave-with-parent"]
        command += ["--timeout", str(self.timeout)]
        if self.directory is not None:
            command += ["--directory", str(self.directory)]
        environment = {**os.environ, "LIGHTKIT_SECRET": SECRET}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        line = self.process.stdout.readline()
        assert line.startswith("listening on 127.0.0.1:"), self.process.stderr.read()
        self.port = int(line.rpartition(":")[2])

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.process.kill()
        self.process.wait()


def reference(make_optimizer=sgd, steps=STEPS, clip=lambda parameters: None):
    """Trains by torch alone, with whole batches; returns the weights and the optimizer."""
    model = network()
    optimizer = make_optimizer(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(INPUTS[step % STEPS]), LABELS[step % STEPS]).backward()
        clip(model.parameters())
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer
