"""Finds the weights of a language model for the native decoders, or the reason why the model itself must run."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

import lightkit
from lightkit import native
from lightkit._util.originals import Originals
from lightkit._util.plain_modules import are_all_hooked, is_unhooked
from lightkit.errors import ConfigError
from lightkit.models import language_model, rnn_language_model, transformer
from lightkit.models.language_model import LanguageModel
from lightkit.models.rnn_language_model import RNNLanguageModel, _Recurrent
from lightkit.models.transformer import Transformer
from lightkit.ops._dispatch import is_autocast_device, kernels_apply

_CELLS: dict[type[nn.Module], str] = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "elman"}

_LAYERS = ("Embedding", "Linear", "RMSNorm", "Dropout", "LSTM", "GRU", "RNN")

# The functions of torch and of the models that the native decoders do not call.
_OF_TORCH = Originals(
    (torch,),
    nn,
    *(f"{layer}.{method}" for layer in _LAYERS for method in ("forward", "__call__")),
    "Module._call_impl",
    *(f"functional.{name}" for name in ("embedding", "linear", "rms_norm", "scaled_dot_product_attention", "silu")),
)
_OF_MODELS = Originals(
    (lightkit,),
    SimpleNamespace(transformer=transformer, language_model=language_model, recurrent=rnn_language_model),
    *("language_model.LanguageModel.hidden", "transformer.Transformer.hidden", "transformer.rotate"),
    *(f"transformer.{block}.forward" for block in ("_Decoder", "_Layer", "_Attention", "_SwiGLU")),
    *("recurrent.RNNLanguageModel.hidden", "recurrent._Recurrent.forward"),
)


def unsupported_reason(model: LanguageModel) -> str | None:
    """Returns the reason why the native library does not decode a model as it is now; None if it does."""
    if type(model) not in (Transformer, RNNLanguageModel):
        return f"the model is a {type(model).__name__}, not a Transformer or RNNLanguageModel"
    replaced = _OF_TORCH.first_replaced() or _OF_MODELS.first_replaced()
    if replaced is not None:
        return f"{replaced} is patched"
    if torch._C._len_torch_dispatch_stack() or torch._C._is_torch_function_mode_enabled() or torch.jit.is_tracing():
        return "a mode or a tracer of torch sees each operation"
    if is_autocast_device("cpu"):
        return "autocast is enabled"
    if are_all_hooked():
        return "torch has a hook for every module"
    layers = _transformer_layers(model) if type(model) is Transformer else _recurrent_layers(model)
    return next((reason for reason in layers if reason is not None), None) or _unsupported_tensor(model)


def native_decoder(
    model: LanguageModel, weight_bits: int, cache_bits: int, sequences: int, max_tokens: int | None = None
) -> Any:
    """Returns the native library's decoder of a model for which `unsupported_reason` returns None.

    Args:
        model: the model.
        weight_bits: 32 for float32, 8 for int8.
        cache_bits: the bits of the keys and values of a transformer.
        sequences: the number of sequences.
        max_tokens: the number of tokens for whose keys and values there is room. Default: the context of the model.

    Raises:
        ConfigError: keys and values in int8 are asked of a model that has none.
    """
    module: Any = native.load()
    body: Any = model.body
    weight: Any = model.head.weight
    embedding = _data(model.embedding.weight)
    head = None if weight is model.embedding.weight else _data(weight)
    if type(model) is Transformer:
        norms = [norm for layer in body.layers for norm in (layer.attention_norm, layer.feed_forward_norm)]
        return module.transformer_decoder(
            embedding,
            head,
            [_data(tensor) for layer in body.layers for tensor in _layer_tensors(layer)],
            _data(body.norm.weight),
            [torch.finfo(torch.float32).eps if norm.eps is None else norm.eps for norm in (*norms, body.norm)],
            _data(body.rotation[:, :max_tokens]),
            sequences,
            weight_bits,
            cache_bits,
        )
    if cache_bits != 32:
        raise ConfigError("cache='int8' is for the keys and values of a Transformer; an RNNLanguageModel has none")
    layers = [_data(tensor) for tensor in body.core._flat_weights]
    return module.recurrent_decoder(_CELLS[type(body.core)], embedding, head, layers, sequences, weight_bits)


def _data(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def _layer_tensors(layer: Any) -> tuple[Tensor, ...]:
    """Returns the weights of a layer of a transformer in the order in which the native library takes them."""
    attention, feed_forward = layer.attention, layer.feed_forward
    return (
        *(layer.attention_norm.weight, attention.qkv.weight, attention.out.weight),
        *(layer.feed_forward_norm.weight, feed_forward.gate_and_value.weight, feed_forward.out.weight),
    )


def _tensors(model: LanguageModel) -> list[Tensor]:
    """Returns the tensors that a native decoder of the model copies."""
    body: Any = model.body
    ends = [model.embedding.weight, model.head.weight]
    if type(model) is Transformer:
        return [*ends, body.norm.weight, body.rotation, *(t for layer in body.layers for t in _layer_tensors(layer))]
    return [*ends, *body.core._flat_weights]


def _unsupported_tensor(model: LanguageModel) -> str | None:
    tensors = _tensors(model)
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, Parameter):
            return f"a weight is a {type(tensor).__name__}"
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or tensor.layout is not torch.strided:
            return f"a weight is {tensor.dtype} on {tensor.device}, not float32 on the CPU"
        if tensor.numel() == 0:
            return "a layer has no units"
    if not kernels_apply(*tensors):
        return native.missing() or "a transform of torch is active"
    return None


def _check(module: Any, kind: type[nn.Module]) -> str | None:
    """Returns the reason why a module does not run as its class says, or None."""
    if type(module) is not kind:
        return f"a {type(module).__name__} is in the place of a {kind.__name__}"
    if not is_unhooked(module):
        return f"a {kind.__name__} has a hook or a forward of its own"
    if module.training and _dropout(module) > 0:
        return "dropout is on in training mode"
    return None


def _dropout(module: nn.Module) -> float:
    """Returns the dropout probability of a module itself, not of those within it."""
    return module.p if type(module) is nn.Dropout else vars(module).get("dropout", 0.0)


def _linear(module: Any) -> str | None:
    wrong = _check(module, nn.Linear)
    return wrong or ("a Linear has a bias" if module.bias is not None else None)


def _norm(module: Any) -> str | None:
    return _check(module, nn.RMSNorm) or ("an RMSNorm has no weight" if module.weight is None else None)


def _ends(model: LanguageModel) -> Iterator[str | None]:
    yield "the model has a hook, or methods of its own" if not is_unhooked(model) or "hidden" in vars(model) else None
    yield _check(model.embedding, nn.Embedding)
    yield "the embedding has a max_norm" if model.embedding.max_norm is not None else None
    yield _linear(model.head)


def _transformer_layers(model: LanguageModel) -> Iterator[str | None]:
    """Yields a reason or None for each layer; the layers within a layer come after it."""
    yield from _ends(model)
    body: Any = model.body
    yield _check(body, transformer._Decoder)
    yield _check(body.dropout, nn.Dropout)
    yield _norm(body.norm)
    yield _check(body.layers, nn.ModuleList)
    size = 2 * body.rotation.shape[-1]
    yield "the rotation is not that of the context" if body.rotation.shape[-2] != body.context else None
    for layer in body.layers:
        yield _check(layer, transformer._Layer)
        yield _check(layer.attention, transformer._Attention)
        yield _check(layer.feed_forward, transformer._SwiGLU)
        yield _check(layer.dropout, nn.Dropout)
        yield from map(_norm, (layer.attention_norm, layer.feed_forward_norm))
        attention, feed_forward = layer.attention, layer.feed_forward
        yield from map(_linear, (attention.qkv, attention.out, feed_forward.gate_and_value, feed_forward.out))
        yield "the heads are not of the rotation's size" if attention.head_size != size else None


def _recurrent_layers(model: LanguageModel) -> Iterator[str | None]:
    yield from _ends(model)
    body: Any = model.body
    yield _check(body, _Recurrent)
    yield _check(body.dropout, nn.Dropout)
    core = body.core
    if type(core) not in _CELLS:
        yield f"the recurrent layers are a {type(core).__name__}"
    yield _check(core, type(core))
    plain = core.bias and core.batch_first and not core.bidirectional and core.proj_size == 0
    if not plain or getattr(core, "nonlinearity", "tanh") != "tanh":
        yield "the recurrent layers have other settings than those of an RNNLanguageModel"
