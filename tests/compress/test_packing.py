"""Packed weights: integers of few bits come back, and a stranger's entry allocates no more than its bytes fill."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruned_trainings import fit, seeded

from lightkit.checkpoints import load_checkpoint
from lightkit.compress import QUANTIZATION_KEY, Quantize, apply_quantization
from lightkit.compress.packing import PACKED_KEY, pack_levels, pack_weights, unpack_levels, unpacked_weights
from lightkit.compress.weight_formats import largest_level
from lightkit.errors import CheckpointError


@given(bits=st.sampled_from([2, 3, 4, 8]), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_levels_come_back(bits, count, seed):
    """Any levels of any number, which need not fill the last byte, take ``bits`` bits each."""
    largest = largest_level(bits)
    levels = torch.randint(-largest, largest + 1, (count,), generator=torch.Generator().manual_seed(seed))
    levels = (levels // 2 * 2 + 1 if bits == 2 else levels).clamp(-largest, largest).to(torch.int8)
    packed = pack_levels(levels, bits)
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack_levels(packed, bits, count), levels)


@pytest.fixture
def packed(tmp_path):
    """A checkpoint with packed weights, and the module whose weights they are."""
    module = seeded()
    fit(module, Quantize(4, batches=4)).save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = load_checkpoint(tmp_path / "x.ckpt")
    again = seeded()
    again.load_state_dict(checkpoint["state_dict"])
    pack_weights(checkpoint, apply_quantization(again, checkpoint))
    torch.save(checkpoint, tmp_path / "packed.ckpt")
    return torch.load(tmp_path / "packed.ckpt", weights_only=True), module


def test_module_comes_back(packed):
    """Integers and scales alone give the weights that the training has ended with, to the bit."""
    checkpoint, module = packed
    assert not any(name.endswith("weight") for name in checkpoint["state_dict"])
    again = seeded()
    again.load_state_dict({**checkpoint["state_dict"], **unpacked_weights(checkpoint)})
    levels = apply_quantization(again, checkpoint)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), module.parameters(), strict=True))
    assert levels.keys() == {f"net.{i}.weight" for i in (0, 4, 6)} and levels["net.4.weight"][0].abs().max() <= 7


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [24, 145]},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": [24, -144]},
        {"shape": "24"},
        {"levels": torch.zeros(3, dtype=torch.uint8)},
        {"levels": torch.zeros(24 * 72)},
        # One byte that says to be many.
        {"levels": torch.zeros(1, dtype=torch.uint8).expand(24 * 72)},
        {"levels": torch.zeros(24 * 72, dtype=torch.uint8, device="meta")},
        {"scales": torch.zeros(24)},
        {"scales": torch.full((24,), float("nan"))},
        {"scales": torch.ones(23)},
        {"scales": None},
    ],
)
def test_damaged(packed, change):
    """An entry that is not what it says is one error."""
    checkpoint, _ = packed
    checkpoint[QUANTIZATION_KEY][PACKED_KEY]["net.4.weight"].update(change)
    with pytest.raises(CheckpointError, match=r"packed weights of the checkpoint are damaged: net\.4\.weight"):
        unpacked_weights(checkpoint)


def test_groups_that_do_not_fit(packed):
    """Rows that a group does not divide are one error, and so are names that share their bytes."""
    checkpoint, _ = packed
    spec = checkpoint[QUANTIZATION_KEY]
    shared = dict(spec[PACKED_KEY]["net.4.weight"])
    spec["weights"]["net.4.weight"] = [4, 5]
    with pytest.raises(CheckpointError, match=r"damaged: net\.4\.weight"):
        unpacked_weights(checkpoint)
    spec["weights"]["net.4.weight"] = spec["weights"]["other"] = [4, 0]
    spec[PACKED_KEY]["other"] = shared
    with pytest.raises(CheckpointError, match="damaged: other"):
        unpacked_weights(checkpoint)


def test_unknown_name(packed):
    """A packed weight without its bits, or that the module lacks, is one error."""
    checkpoint, _ = packed
    checkpoint[QUANTIZATION_KEY]["weights"].pop("net.4.weight")
    with pytest.raises(CheckpointError, match=r"packed weights of the checkpoint are damaged: net\.4\.weight"):
        unpacked_weights(checkpoint)
