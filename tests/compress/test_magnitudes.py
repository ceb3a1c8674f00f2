"""The smallest weights of all tensors: exactly as many as asked for, also among equal ones."""

from __future__ import annotations

import pytest
import torch

from lightkit.compress.magnitudes import smallest_masked


def masked(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_smallest_of_all(share, dtype):
    """The masked weights are the smallest, in exactly the asked number; bfloat16 has many equal ones."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(40, 50, generator=generator).to(dtype), torch.randn(30, 100, generator=generator).to(dtype)]
    masks = smallest_masked(tensors, share)
    assert masked(masks) == min(int(share * 5000), 5000 - 20 - 30)
    largest = max((t[~masks[t]].abs().max().item() for t in tensors if bool((~masks[t]).any())), default=0.0)
    for tensor in tensors:
        kept = tensor[masks[tensor]].abs()
        free = kept.sort().values[: len(kept) - max(1, tensor.numel() // 100)]
        assert len(free) == 0 or free.min().item() >= largest


def test_equal_weights_in_order():
    """Of equal weights the first ones are masked."""
    tensor = torch.ones(10, 10)
    mask = smallest_masked([tensor], 0.3)[tensor].flatten()
    assert mask.tolist() == [False] * 30 + [True] * 70


def test_zeros_first_and_each_tensor_keeps_some():
    """Weights that are zero already are masked first; a tensor of small weights keeps a hundredth."""
    small, large = 1e-6 * torch.rand(10, 20) + 1e-9, torch.rand(10, 20) + 1
    large.view(-1)[:100] = 0
    masks = smallest_masked([small, large], 0.8)
    assert int(masks[small].sum()) == 2 and not bool(masks[large].view(-1)[:100].any())
    assert masked(masks) == 320


def test_infinite_weights_stay():
    """NaN and infinite weights count as large."""
    tensor = torch.ones(10, 10)
    tensor[0, 0], tensor[0, 1] = torch.nan, -torch.inf
    mask = smallest_masked([tensor], 0.5)[tensor]
    assert bool(mask[0, 0]) and bool(mask[0, 1]) and int((~mask).sum()) == 50
