"""A crowded machine: how kernels use the threads depends on it, what they compute does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import os, subprocess, sys, time
import torch
from torch import nn
from lightkit import native
from lightkit.nn import FusedSequential
from lightkit.ops import cross_entropy

def results():
    model.zero_grad()
    loss = cross_entropy(model(images), labels)
    loss.backward()
    return [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]

native.load()
torch.set_num_threads(2)
torch.manual_seed(0)
model = FusedSequential(
    nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7744, 10)
)
images, labels = torch.rand(64, 1, 28, 28), torch.randint(0, 10, (64,))
# The threads of torch; those that sleep come later, or with the first results if the machine is crowded already.
torch.rand(1 << 20).add_(1)
threads = len(os.listdir("/proc/self/task")) + len(os.sched_getaffinity(0))
alone = results()
spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4 * os.cpu_count())]
try:
    end = time.monotonic() + 60
    while len(os.listdir("/proc/self/task")) <= threads and time.monotonic() < end:
        assert all(map(torch.equal, results(), alone))
    print(len(os.listdir("/proc/self/task")) > threads)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        assert all(map(torch.equal, results(), alone))
finally:
    for process in spinning:
        process.kill()
        process.wait()
"""


@pytest.mark.alone
@pytest.mark.skipif(not os.path.exists("/proc/thread-self/schedstat"), reason="the kernel does not tell who waits")
@pytest.mark.skipif(torch.get_num_threads() == 1, reason="one thread waits for nobody")
def test_a_crowded_machine_changes_no_bit():
    """Beside many spinning processes the threads of a job go to sleep while they wait, and results stay the same."""
    # OpenMP's own way to wait, as a user has it.
    variables = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "True\n"
