"""Networks as people write them: layers as attributes, functions in ``forward``. None of them knows lightkit.

`NETWORKS` has them by name. Each class has the shape of a sample without the batch, the size of a batch, the number of
classes, and the loss of a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DocumentedCnn(nn.Module):
    """The documented CNN on grey images of 28x28."""

    shape, batch, classes = (1, 28, 28), 32, 10
    loss = staticmethod(F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3)
        self.second = nn.Conv2d(32, 64, 3)
        self.third = nn.Conv2d(64, 64, 3)
        self.hidden = nn.Linear(64 * 3 * 3, 64)
        self.output = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.first(images)), 2)
        features = F.max_pool2d(F.relu(self.second(features)), 2)
        features = F.relu(self.third(features))
        return self.output(F.relu(self.hidden(torch.flatten(features, 1))))


class Digits(nn.Module):
    """Two convolutions and one pool, two dropouts, a wide linear layer, log-probabilities and their loss."""

    shape, batch, classes = (1, 28, 28), 64, 10
    loss = staticmethod(F.nll_loss)

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)])
        self.weak, self.strong = nn.Dropout(0.25), nn.Dropout(0.5)
        self.hidden, self.output = nn.Linear(64 * 12 * 12, 128), nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = images
        for convolution in self.convolutions:
            features = F.relu(convolution(features))
        features = self.weak(F.max_pool2d(features, 2)).flatten(1)
        features = self.strong(F.relu(self.hidden(features)))
        return F.log_softmax(self.output(features), dim=1)


class SmallColour(nn.Module):
    """Two 5x5 convolutions with few channels and three linear layers, for colour images of 32x32."""

    shape, batch, classes = (3, 32, 32), 32, 10
    loss = staticmethod(F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.conv_a, self.conv_b, self.pool = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2)
        self.dense_a, self.dense_b, self.dense_c = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(self.conv_a(images).relu())
        features = self.pool(self.conv_b(features).relu())
        features = features.view(features.size(0), -1)
        return self.dense_c(self.dense_b(self.dense_a(features).relu()).relu())


class Normalized(nn.Module):
    """Three blocks of convolution, batch norm, ReLU and pool; dropout; a linear layer."""

    shape, batch, classes = (3, 32, 32), 64, 10
    loss = staticmethod(F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_normalized(a, b) for a, b in ((3, 32), (32, 64), (64, 128)))
        self.output = nn.Linear(128 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = images
        for block in self.blocks:
            features = F.max_pool2d(F.relu(block(features)), 2)
        features = F.dropout(features.flatten(1), 0.3, self.training)
        return self.output(features)


def _normalized(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _normalized(inputs, outputs, 3, stride), _normalized(outputs, outputs)
        self.shortcut = _normalized(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(features))) + self.shortcut(features))


class ResNet20(nn.Module):
    """The residual network of 20 layers for 32x32 images (He et al., Deep residual learning, 2016)."""

    shape, batch, classes = (3, 32, 32), 64, 10
    loss = staticmethod(F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.stem = _normalized(3, 16)
        blocks, channels = [], 16
        for width in (16, 32, 64):
            for place in range(3):
                blocks.append(_Residual(channels, width, 2 if place == 0 and width != channels else 1))
                channels = width
        self.blocks, self.output = nn.Sequential(*blocks), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(torch.relu(self.stem(images)))
        return self.output(features.mean((2, 3)))


class Encoder(nn.Module):
    """Four layers of :class:`torch.nn.TransformerEncoderLayer` with dropout on 64 tokens, and the mean over them."""

    shape, batch, classes = (64,), 32, 10
    loss = staticmethod(F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.output = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.layers(self.tokens(tokens)).mean(dim=1))


class _Attending(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query_key_value, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, features: Tensor) -> Tensor:
        batch, length, width = features.shape
        whole = self.query_key_value(self.norms[0](features)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = whole.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        features = features + self.merge(seen.transpose(1, 2).reshape(batch, length, width))
        return features + self.narrow(F.gelu(self.widen(self.norms[1](features))))


class SmallGpt(nn.Module):
    """A causal transformer of four blocks over 128 bytes: layer norm, GELU, learnt positions."""

    shape, batch, classes = (128,), 16, 256

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, 128), nn.Embedding(128, 128)
        self.blocks = nn.Sequential(*(_Attending(128, 4) for _ in range(4)))
        self.norm, self.output = nn.LayerNorm(128), nn.Linear(128, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        features = self.blocks(self.tokens(tokens) + self.positions(positions))
        return self.output(self.norm(features))

    @staticmethod
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Tagger(nn.Module):
    """Two layers of :class:`torch.nn.LSTM` over 64 tokens, and a linear layer on the last state."""

    shape, batch, classes = (64,), 32, 10
    loss = staticmethod(F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.recurrent = nn.Embedding(1000, 64), nn.LSTM(64, 128, 2, batch_first=True)
        self.output = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.tokens(tokens))
        return self.output(states[:, -1])


NETWORKS = {
    network.__name__: network
    for network in (DocumentedCnn, Digits, SmallColour, Normalized, ResNet20, Encoder, SmallGpt, Tagger)
}
