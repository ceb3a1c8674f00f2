"""Programs that pack the tensors that autograd saves: checkpointing, and hooks of their own."""

from __future__ import annotations

import pytest
import torch
from captured import IMAGES, Captured
from programs import Checkpointed, Packed


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_checkpointed_module(first):
    """Its gradients are torch's, whichever call comes first; the layers before it run on the kernels."""
    both = Captured(Checkpointed())
    with first():
        both.check(IMAGES, backward=first is torch.enable_grad)
    for _ in range(2):
        both.check(IMAGES)
    assert "stem" in both.replaced()
    both.undo()


def test_hooks_of_saved_tensors():
    """They get what torch's operations within them save, and nothing of the operations before."""
    both = Captured(Packed())
    for _ in range(2):
        both.check(IMAGES)
        assert both.ours.packed == both.torchs.packed != []
    assert "conv1" in both.replaced() and "conv2" not in both.replaced()
    both.undo()
