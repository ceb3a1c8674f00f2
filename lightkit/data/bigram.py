"""Baselines of byte-level language models: unigram and bigram counts of a text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Pairs that are counted at once. They take 8 bytes each as int64, one byte in the text.
_CHUNK = 1 << 22


def bits_per_byte(train: Tensor, test: Tensor) -> dict[str, float]:
    """Returns the mean cross-entropy in bits per byte of the targets of ``test`` under two models counted on ``train``.

    ``unigram`` estimates the probability of each byte from its count plus one. ``bigram`` estimates the probability
    from the count of the pair of the previous byte and this byte, interpolated with ``unigram`` by the rule of Witten
    and Bell [1]_: the more different bytes have followed a byte, the larger is the weight of ``unigram``.

    Args:
        train: windows of bytes, a uint8 tensor ``(N, T + 1)``; each byte except the first is the target of the byte
            before it.
        test: windows of the same form; N and T may differ.

    Returns:
        The numbers under the keys ``unigram`` and ``bigram``.

    References:
        .. [1] Witten and Bell, The Zero-Frequency Problem, IEEE Transactions on Information Theory 1991, method C.
    """
    pairs, measured = count_pairs(train), count_pairs(test)
    singles = pairs.sum(dim=0) + 1
    unigram = singles / singles.sum()
    followers = (pairs > 0).sum(dim=1, keepdim=True)
    total = pairs.sum(dim=1, keepdim=True)
    bigram = (pairs + followers * unigram) / (total + followers)
    # No byte followed this one in training: the unigram is the only estimate.
    bigram = torch.where(total > 0, bigram, unigram)
    return {
        "unigram": _cross_entropy(measured, unigram.expand_as(measured)),
        "bigram": _cross_entropy(measured, bigram),
    }


def count_pairs(windows: Tensor) -> Tensor:
    """Returns how often each byte (column) follows each byte (row) in ``windows``: float64 ``(256, 256)``."""
    counts = torch.zeros(256 * 256, dtype=torch.int64)
    for part in windows.split(max(1, _CHUNK // windows.shape[1])):
        index = part[:, :-1].long().mul_(256).add_(part[:, 1:])
        counts += index.flatten().bincount(minlength=256 * 256)
    return counts.view(256, 256).double()


def _cross_entropy(counts: Tensor, probabilities: Tensor) -> float:
    seen = counts > 0
    return float(-(counts[seen] * probabilities[seen].log()).sum() / counts.sum() / math.log(2))
