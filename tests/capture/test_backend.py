"""The backend "lightkit" of torch.compile: the graphs of a compiler run on the kernels, without Lightning."""

from __future__ import annotations

import copy
from importlib.metadata import entry_points

import pytest
import torch
from programs import Branching, Functions, Loop, Normalized
from torch import nn

from lightkit.capture import capture as capture_module
from lightkit.capture.backend import lightkit_backend

IMAGES = torch.randn(6, 1, 18, 18, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def regions(monkeypatch):
    """Collects the regions of all captures."""
    found = []

    class Watched(capture_module.Capture):
        def __init__(self, *args):
            super().__init__(*args, on_region=found.append)

    monkeypatch.setattr("lightkit.capture.backend.Capture", Watched)
    return found


@pytest.mark.parametrize("network", [Functions, Loop, Branching, Normalized])
def test_same_training(network, regions):
    """Outputs, gradients and buffers are torch's, in training and in evaluation, and the kernels ran."""
    torch._dynamo.reset()
    plain = network()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend=lightkit_backend)
    for training in (True, True, False):
        for module in (plain, compiled):
            module.train(training).zero_grad()
            module(IMAGES).square().mean().backward()
        expected = [*(p.grad for p in plain.parameters()), *plain.buffers()]
        torch.testing.assert_close([*(p.grad for p in compiled.parameters()), *compiled.buffers()], expected)
    assert any(region.replacement for region in regions)
    torch._dynamo.reset()


def test_backend_by_name():
    """torch.compile finds the backend of an installed lightkit by its name."""
    (found,) = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "lightkit"]
    assert found.load() is lightkit_backend
    torch._dynamo.reset()
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    torch.testing.assert_close(torch.compile(network, backend="lightkit")(IMAGES), network(IMAGES))
    torch._dynamo.reset()
