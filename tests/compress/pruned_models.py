"""Models with the connections between layers that pruning must follow."""

from __future__ import annotations

import torch
from torch import nn

from lightkit.models import CNN, MLP, RNN, RNNLanguageModel, Transformer


class Residual(nn.Module):
    """Branches that are added and scaled, a depthwise convolution, and batch norms, all as attributes."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.branch, self.branch_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.gate = nn.Linear(16, 16)
        self.narrow, self.depthwise = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(x + self.branch_norm(self.branch(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[..., None, None]
        return self.head(self.depthwise(torch.max_pool2d(self.narrow(x), 2)).mean(dim=(-1, -2)))


class Concatenated(nn.Module):
    """Two branches side by side, a linear layer behind the flattened images, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 10, 3, padding=1)
        self.join, self.twice, self.head = nn.Linear(16 * 16, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.cat([self.left(x).relu(), self.right(x).tanh()], dim=1)
        x = self.twice(torch.relu(self.join(x.flatten(1))))
        return self.head(self.twice(torch.relu(x)))


class Siamese(nn.Module):
    """Branches that share layers which compute no channels: a batch norm, a depthwise convolution and a PReLU."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.both = nn.Conv2d(1, 8, 3), nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 1)
        self.norm, self.depthwise, self.slope = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 2, groups=8), nn.PReLU(6)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        branches = [self.depthwise(self.norm(layer(x))) for layer in (self.left, self.right)]
        return self.head(torch.cat([self.slope(self.both(branch)).mean((2, 3)) for branch in branches], dim=1))


class SizeInCode(nn.Module):
    """A model whose forward has the size of the first layer in its code."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8 * 4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(self.first(x).view(-1, 8 * 4))))


def cases():
    """Returns a model, its inputs, and the layers whose units can be removed, by the name of the case."""
    tokens = torch.randint(20, (4, 6))
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return {
        "cnn": (CNN(), [torch.randn(4, 1, 28, 28)], {"features.0", "features.3", "features.6", "classifier.1"}),
        "mlp": (
            MLP(5, 3, [4, 5], hidden_sizes=[16, 12], norm="batch", dropout=0.1),
            [torch.randn(4, 5), torch.zeros(4, 2, dtype=torch.long)],
            {"layers.0", "layers.4"},
        ),
        "layer norm": (MLP(5, 3, hidden_sizes=[16, 12], norm="layer"), [torch.randn(4, 5)], {"layers.0", "layers.3"}),
        "lstm": (
            RNN(3, 8, 2, num_layers=2, bidirectional=True),
            [torch.randn(4, 6, 3), torch.tensor([6, 5, 4, 3])],
            {"core"},
        ),
        "gru": (RNN(3, 8, 2, cell="gru"), [torch.randn(4, 6, 3)], {"core"}),
        "elman": (RNN(3, 8, 2, cell="elman"), [torch.randn(4, 6, 3)], {"core"}),
        "recurrent language model": (RNNLanguageModel(20, 8), [tokens], {"body.core"}),
        "tied": (RNNLanguageModel(20, 8, tie_weights=True), [tokens], set()),
        "transformer": (
            Transformer(20, 16, 2, 4, 8),
            [tokens],
            {f"body.layers.{i}.{part}" for i in range(2) for part in ("attention", "feed_forward")},
        ),
        "encoder layer": (encoder, [torch.randn(2, 3, 16)], {"linear1"}),
        "residual": (Residual(), [torch.randn(4, 3, 8, 8)], {"branch + gate + stem", "narrow"}),
        "concatenated": (Concatenated(), [torch.randn(4, 1, 4, 4)], {"left", "right", "join + twice"}),
        "siamese": (Siamese(), [torch.randn(4, 1, 6, 6)], {"left + right", "both"}),
        "size in code": (SizeInCode(), [torch.randn(4, 1, 4, 4)], {"second"}),
    }


NAMES = tuple(cases())
