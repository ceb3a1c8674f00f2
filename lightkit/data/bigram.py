"""What counting gets out of a text: the baselines of byte-level language models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Pairs counted at once: as int64 they take 8 bytes each, where the text takes one.
_CHUNK = 1 << 22


def bits_per_byte(train: Tensor, test: Tensor) -> dict[str, float]:
    """Bits that a target of ``test`` takes in the mean, by counts of ``train``.

    ``unigram`` knows how often each byte comes, each counted once more than it was seen. ``bigram`` knows what
    follows each byte, and mixes that with the first by the rule of Witten and Bell [1]_: the more different bytes
    have followed a byte, the likelier the next is a new one.

    Args:
        train: windows of bytes, uint8 ``(N, T + 1)``; each byte but the first is the target of the one before it.
        test: the same.

    References:
        .. [1] Witten and Bell, The Zero-Frequency Problem, IEEE Transactions on Information Theory 1991, method C.
    """
    pairs, measured = count_pairs(train), count_pairs(test)
    singles = pairs.sum(dim=0) + 1
    unigram = singles / singles.sum()
    followers = (pairs > 0).sum(dim=1, keepdim=True)
    total = pairs.sum(dim=1, keepdim=True)
    bigram = (pairs + followers * unigram) / (total + followers)
    # A byte that nothing has ever followed says nothing of the next.
    bigram = torch.where(total > 0, bigram, unigram)
    return {
        "unigram": _cross_entropy(measured, unigram.expand_as(measured)),
        "bigram": _cross_entropy(measured, bigram),
    }


def count_pairs(windows: Tensor) -> Tensor:
    """How often each byte (column) follows each (row): float64 ``(256, 256)``."""
    counts = torch.zeros(256 * 256, dtype=torch.int64)
    for part in windows.split(max(1, _CHUNK // windows.shape[1])):
        index = part[:, :-1].long().mul_(256).add_(part[:, 1:])
        counts += index.flatten().bincount(minlength=256 * 256)
    return counts.view(256, 256).double()


def _cross_entropy(counts: Tensor, probabilities: Tensor) -> float:
    seen = counts > 0
    return float(-(counts[seen] * probabilities[seen].log()).sum() / counts.sum() / math.log(2))
