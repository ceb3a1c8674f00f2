"""The language models in float64, written from the formulas of their papers and not from the models' code."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightkit.models import RNNLanguageModel, Transformer

Rounding = Callable[[Tensor], Tensor]


def round_rows(values: Tensor) -> Tensor:
    """Rounds the last dimension to the multiples of the 127th part of its largest magnitude, a float32 number."""
    scale = values.float().abs().amax(dim=-1, keepdim=True) / 127
    return (torch.where(scale > 0, values.float() / scale, 0).round() * scale.double()).to(torch.float64)


def rounded(model: nn.Module) -> nn.Module:
    """Returns a copy of the model whose matrices have the values that int8 rounds them to."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                # A tied weight is one parameter.
                parameter.copy_(round_rows(parameter))
    return model


def logits(model: nn.Module, tokens: Tensor, cache: Rounding = Tensor.double) -> Tensor:
    """Returns the logits after each token, float64 ``(N, T, V)``.

    Args:
        model: a `Transformer` or an `RNNLanguageModel`.
        tokens: the tokens ``(N, T)``.
        cache: the rounding of keys and values ``(..., head size)``.
    """
    with torch.no_grad():
        hidden = model.embedding.weight.double()[tokens]
        hidden = _transformer(model, hidden, cache) if isinstance(model, Transformer) else _recurrent(model, hidden)
        return hidden @ model.head.weight.double().T


def _transformer(model: Transformer, hidden: Tensor, cache: Rounding) -> Tensor:
    body = model.body
    steps = hidden.shape[1]
    causal = torch.ones(steps, steps, dtype=torch.bool).tril()
    for layer in body.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        size = attention.head_size
        projected = _normalized(hidden, layer.attention_norm) @ attention.qkv.weight.double().T
        query, key, value = projected.unflatten(-1, (3, -1, size)).permute(2, 0, 3, 1, 4)
        query, key, value = _rotated(query), cache(_rotated(key)), cache(value)
        scores = (query @ key.mT / size**0.5).masked_fill(~causal, -torch.inf)
        attended = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + attended @ attention.out.weight.double().T
        wide = _normalized(hidden, layer.feed_forward_norm) @ feed_forward.gate_and_value.weight.double().T
        gate, value = wide.chunk(2, dim=-1)
        hidden = hidden + (gate / (1 + (-gate).exp()) * value) @ feed_forward.out.weight.double().T
    return _normalized(hidden, body.norm)


def _normalized(hidden: Tensor, norm: nn.RMSNorm) -> Tensor:
    epsilon = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    return hidden / (hidden.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * norm.weight.double()


def _rotated(vectors: Tensor) -> Tensor:
    """Multiplies the pairs (i, size / 2 + i), as complex numbers, by exp(1j * position * 10000 ** (-2 i / size))."""
    steps, size = vectors.shape[-2:]
    angles = torch.arange(steps).double()[:, None] * 10_000.0 ** (-torch.arange(0, size, 2).double() / size)
    first, second = vectors.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def _recurrent(model: RNNLanguageModel, inputs: Tensor) -> Tensor:
    core = model.body.core
    for layer in range(core.num_layers):
        of_input, of_hidden = (getattr(core, f"weight_{kind}_l{layer}").double() for kind in ("ih", "hh"))
        bias_input, bias_hidden = (getattr(core, f"bias_{kind}_l{layer}").double() for kind in ("ih", "hh"))
        hidden = cell = inputs.new_zeros(len(inputs), core.hidden_size)
        outputs = []
        for x in inputs.unbind(dim=1):
            a, b = x @ of_input.T + bias_input, hidden @ of_hidden.T + bias_hidden
            if isinstance(core, nn.LSTM):
                i, f, g, o = (a + b).chunk(4, dim=1)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                hidden = o.sigmoid() * cell.tanh()
            elif isinstance(core, nn.GRU):
                (r, z, n), (hr, hz, hn) = a.chunk(3, dim=1), b.chunk(3, dim=1)
                share = (z + hz).sigmoid()
                hidden = (1 - share) * (n + (r + hr).sigmoid() * hn).tanh() + share * hidden
            else:
                hidden = (a + b).tanh()
            outputs.append(hidden)
        inputs = torch.stack(outputs, dim=1)
    return inputs
