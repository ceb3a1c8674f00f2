"""The parameter server in a program without Lightning, Hydra and OmegaConf."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lightning", "pytorch_lightning", "hydra", "omegaconf"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Forbidden())

import torch
from lightkit.optim import SGD
from lightkit.parameter_server import Client, OptimizerSpec, Server, TrainingSpec, group_options

server = Server(secret="secret")
thread = threading.Thread(target=server.run, daemon=True)
thread.start()
weight = torch.nn.Parameter(torch.ones(3))
optimizer = OPTIMIZER([weight], lr=0.5)
spec = TrainingSpec([OptimizerSpec.from_optimizer(optimizer, {weight: "weight"})])
client = Client([f"127.0.0.1:{server.listener.port}"], "secret", 0, spec)
assert client.start([group_options(optimizer)], [[weight.detach()]])
(value,) = client.push(0, [torch.ones(3)], optimizer.param_groups).result()
assert torch.equal(value, torch.full((3,), 0.5)), value
client.finish()
client.leave()
thread.join(20)
assert not thread.is_alive()
import lightkit.parameter_server.__main__, lightkit.parameter_server.local_servers
"""


@pytest.mark.parametrize("optimizer", ["SGD", "torch.optim.SGD"])
def test_a_training_without_lightning(optimizer):
    """Client and server train although none of the three packages can be imported."""
    program = PROGRAM.replace("OPTIMIZER", optimizer)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
