"""A network beside a copy whose calls are captured, and data for both."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightkit.capture import Capture, capture_calls, module_names

IMAGES = torch.randn(6, 1, 18, 18, generator=torch.Generator().manual_seed(0))


class Captured:
    """A network beside a copy whose calls are captured."""

    def __init__(self, network: nn.Module, **options) -> None:
        self.torchs, self.ours = copy.deepcopy(network), network
        self.capture = Capture(dict(module_names(network)))
        self.undo = capture_calls(network, self.capture, **options)

    def check(self, *inputs: Tensor, backward: bool = True) -> None:
        """Compares outputs, gradients of weights and inputs, buffers and random state after one call of each."""
        found = []
        for network in (self.torchs, self.ours):
            network.zero_grad()
            torch.manual_seed(1)
            own = [x.detach().clone().requires_grad_(backward) for x in inputs]
            outputs = [t for t in tree_leaves(network(*own)) if isinstance(t, Tensor)]
            assert {type(t) for t in outputs} == {Tensor}
            assert [t.requires_grad for t in outputs] == [backward] * len(outputs)
            if backward:
                sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in outputs).backward()
            gradients = [t.grad for t in (*own, *network.parameters())]
            found.append([outputs, gradients, list(network.buffers()), [torch.get_rng_state()]])
        for torchs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, torchs, rtol=2e-4, atol=2e-5)

    def replaced(self) -> list[str]:
        """Returns the names of the modules that lightkit computes."""
        return [name for region in self.capture.regions if region.replacement for name in region.names]
