"""Trains a small language model head in a plain PyTorch loop, with lightkit's ops and optimizer alone.

    python examples/ops_alone.py

No Lightning and no Hydra: `linear_cross_entropy` computes the loss of a linear head without ever holding all of the
logits, and one native call of `AdamW` clips the gradients, steps, and averages the weights.
"""

from __future__ import annotations

import torch
from torch import nn

from lightkit.ops import linear_cross_entropy
from lightkit.optim import AdamW

VOCABULARY, FEATURES = 1000, 64


def main(steps: int = 60) -> tuple[float, float]:
    """Trains to name the successor of each token; returns the first and the last loss."""
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, FEATURES)
    head = nn.Linear(FEATURES, VOCABULARY, bias=False)
    parameters = [*embedding.parameters(), *head.parameters()]
    optimizer = AdamW(parameters, lr=0.02, max_grad_norm=1.0, ema_decay=0.9)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (256,))
        hidden = embedding(tokens)
        loss = linear_cross_entropy(hidden, head.weight, (tokens + 1) % VOCABULARY, z_loss=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}; norm of the last gradient: {optimizer.grad_norm:.3f}")
    with optimizer.averaged_parameters(), torch.no_grad():
        tokens = torch.arange(VOCABULARY)
        averaged = linear_cross_entropy(embedding(tokens), head.weight, (tokens + 1) % VOCABULARY)
    print(f"loss with averaged weights: {averaged.item():.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
