"""A transformer decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightkit.models.arguments import keeps_arguments
from lightkit.models.language_model import LanguageModel

# For each layer its keys and its values, each (N, heads, tokens so far, head size).
State = list[tuple[Tensor, Tensor]]

# GPT-2 draws weights with a deviation of 0.02 for its width of 768. Narrower maps need larger weights for outputs of
# the same size.
_INIT_STD, _INIT_DIM = 0.02, 768


@keeps_arguments
class Transformer(LanguageModel):
    """A decoder [1]_ with RMSNorm before each block [2]_, rotary positions [3]_ and SwiGLU [4]_.

    The linear maps have no biases. The initial weights are those of GPT-2 [5]_: normal with a deviation of
    ``0.02 * sqrt(768 / dim)``, divided by ``sqrt(2 * num_layers)`` in the two maps of a layer whose output is added to
    the residual stream. With D = ``dim`` and F = ``feed_forward_size`` the body has
    ``num_layers * (4 D^2 + 3 D F + 2 D) + D`` parameters, the embedding ``vocab_size * D``, and the head as many unless
    it is tied.

    Args:
        vocab_size: the number of different tokens.
        dim: the width of the residual stream, a multiple of ``2 * num_heads``.
        num_layers: the number of layers, each of attention and feed-forward.
        num_heads: the number of attention heads of a layer.
        context: the largest number of tokens that the model reads, including the tokens of the state.
        feed_forward_size: the inner width of the feed-forward blocks. Default: 8/3 of ``dim`` rounded up to a multiple
            of 32, with which the three maps are as large as the two of width ``4 * dim`` in [1]_.
        dropout: the dropout probability of the embeddings, of the attention, and of the output of a block.
        tie_weights: True uses the embedding's weight in the head.

    Shape, state and errors: see `LanguageModel`. The state holds the keys and values of the tokens that were read.

    References:
        .. [1] Vaswani et al., Attention Is All You Need, NeurIPS 2017.
        .. [2] Zhang and Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019.
        .. [3] Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, Neurocomputing 2024.
        .. [4] Shazeer, GLU Variants Improve Transformer, 2020.
        .. [5] Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        context: int,
        feed_forward_size: int | None = None,
        dropout: float = 0.0,
        tie_weights: bool = True,
    ) -> None:
        if feed_forward_size is None:
            feed_forward_size = -(-8 * dim // (3 * 32)) * 32
        body = _Decoder(dim, num_layers, num_heads, context, feed_forward_size, dropout)
        super().__init__(vocab_size, dim, dim, body, tie_weights, context)
        deviation = _INIT_STD * (_INIT_DIM / dim) ** 0.5
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=deviation)
        for module in body.modules():
            if isinstance(module, (_Attention, _SwiGLU)):
                nn.init.normal_(module.out.weight, std=deviation / (2 * num_layers) ** 0.5)


class _Decoder(nn.Module):
    """The layers of a transformer, and a norm after the last layer."""

    rotation: Tensor

    def __init__(
        self, dim: int, num_layers: int, num_heads: int, context: int, feed_forward_size: int, dropout: float
    ) -> None:
        super().__init__()
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "feed_forward_size": feed_forward_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if dim < 1 or dim % (2 * num_heads) != 0:
            raise ValueError(
                f"dim must be a multiple of 2 * num_heads = {2 * num_heads}, since rotations take pairs; got {dim}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.context = context
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(_Layer(dim, num_heads, feed_forward_size, dropout) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim)
        # A constant, which is computed when the model is built and not saved.
        self.register_buffer("rotation", rotation(context, dim // num_heads), persistent=False)

    def forward(self, embedded: Tensor, state: State | None) -> tuple[Tensor, State]:
        start = 0 if state is None else state[0][0].shape[2]
        end = start + embedded.shape[1]
        if end > self.context:
            raise ValueError(f"the transformer reads {self.context} tokens at most, got {end}")
        if torch.compiler.is_exporting():
            # A slice is a view; torch.export would reject the length at which the view is the whole table.
            rotation = self.rotation.index_select(1, torch.arange(start, end, device=embedded.device))
        else:
            rotation = self.rotation[:, start:end]
        hidden = self.dropout(embedded)
        after = []
        for index, layer in enumerate(self.layers):
            hidden, kept = layer(hidden, rotation, None if state is None else state[index])
            after.append(kept)
        return self.norm(hidden), after


class _Layer(nn.Module):
    """Attention and feed-forward, each with a norm before it and a residual connection around it."""

    def __init__(self, dim: int, num_heads: int, feed_forward_size: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim)
        self.attention = _Attention(dim, num_heads, dropout)
        self.feed_forward_norm = nn.RMSNorm(dim)
        self.feed_forward = _SwiGLU(dim, feed_forward_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Tensor, rotation: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, kept = self.attention(self.attention_norm(hidden), rotation, past)
        hidden = hidden + self.dropout(attended)
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden))), kept


class _Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.head_size = dim // num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self, hidden: Tensor, rotation: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, steps, _ = hidden.shape
        # (3, N, heads, T, head size). A pruned block has fewer heads of the same size.
        qkv = self.qkv(hidden).view(batch, steps, 3, -1, self.head_size).permute(2, 0, 3, 1, 4)
        query, key, value = rotate(qkv[0], rotation), rotate(qkv[1], rotation), qkv[2]
        mask = None
        if past is not None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
            # is_causal aligns the first query with the first key; here the last query belongs to the last key.
            if steps > 1:
                mask = torch.ones(steps, key.shape[2], dtype=torch.bool, device=key.device)
                mask = mask.tril(key.shape[2] - steps)
        attended = F.scaled_dot_product_attention(
            query, key, value, mask, self.dropout if self.training else 0.0, is_causal=past is None
        )
        return self.out(attended.transpose(1, 2).reshape(batch, steps, -1)), (key, value)

    def inner_units(self) -> tuple[int, dict[str, tuple[int, Tensor]]]:
        """Returns the number of heads, and the head of each row of ``qkv`` and each column of ``out``."""
        heads = torch.arange(self.out.in_features // self.head_size)
        columns = heads.repeat_interleave(self.head_size)
        return len(heads), {"qkv.weight": (0, columns.repeat(3)), "out.weight": (1, columns)}


class _SwiGLU(nn.Module):
    """A feed-forward block: ``out(silu(gate(x)) * value(x))``."""

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.gate_and_value = nn.Linear(dim, 2 * size, bias=False)
        self.out = nn.Linear(size, dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, value = self.gate_and_value(hidden).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)

    def inner_units(self) -> tuple[int, dict[str, tuple[int, Tensor]]]:
        """Returns the inner width, and the unit of each row of ``gate_and_value`` and each column of ``out``."""
        units = torch.arange(self.out.in_features)
        return len(units), {"gate_and_value.weight": (0, units.repeat(2)), "out.weight": (1, units)}


def rotation(steps: int, size: int, base: float = 10_000.0) -> Tensor:
    """Returns the cosines and sines of rotary position embedding, by which `rotate` rotates queries and keys.

    The angle of the pair i at position t is ``t * base ** (-2 * i / size)``.

    Args:
        steps: the number of positions.
        size: the size of a query or key of one head, an even number.
        base: the base of the frequencies.

    Returns:
        The cosines and the sines, float32 ``(2, steps, size / 2)``.
    """
    # float64: float32 angles of some thousand radians are the same for neighbouring positions.
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(steps, dtype=torch.float64)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Rotates pairs of values by their positions, so that dot products depend on distances between positions only.

    The pair i consists of the values i and ``size / 2 + i`` of a vector.

    Args:
        vectors: the queries or keys ``(..., T, size)``.
        rotation: the cosines and sines ``(2, T, size / 2)`` of the T positions: see the function `rotation`.

    Returns:
        The rotated vectors, of the shape and dtype of ``vectors``.
    """
    # Half precision would round neighbouring positions to one angle.
    first, second = vectors.float().chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(vectors.dtype)
