"""The decoders compiled for other processors than this one: AVX-512, AVX2, and vectors of the compiler's own making."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from support.exact_language_models import logits, round_rows, rounded
from torch import Tensor, nn

from lightkit.models import RNNLanguageModel, Transformer
from lightkit.models.native_decoding import _data, _layer_tensors
from lightkit.native import target, toolchain

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not target._is_x86(), reason="levels are x86's")]

_TARGETS = {
    "AVX512": target.Target("x86-64-v4", ("avx512f", "avx512bw", "avx512dq", "avx512vl"), "AVX512"),
    "AVX2": target.Target("x86-64-v3", ("avx2", "fma", "f16c"), "AVX2"),
    "DEFAULT": target.Target("x86-64-v2", (), "DEFAULT"),
}


@pytest.fixture(scope="module", params=_TARGETS)
def library(request, compiler: str, tmp_path_factory) -> ctypes.CDLL:
    """The decoders and their driver, compiled for a target."""
    built_for = _TARGETS[request.param]
    if missing := target.missing_instructions(built_for.instructions):
        pytest.skip(f"this processor has no {missing[0]}")
    directory = tmp_path_factory.mktemp("decoding")
    kernels = toolchain.SOURCE_DIR / "kernels" / "cpu"
    sources = [*sorted((kernels / "decode").glob("*.cpp")), kernels / "common" / "parallel.cpp"]
    command = [compiler, *toolchain.common_flags(cuda=False), *built_for.flags, *toolchain.include_flags(None)]
    command += ["-I", str(toolchain.SOURCE_DIR), *(word for path in sources for word in ("-include", str(path)))]
    command += [str(Path(__file__).with_name("decoding_driver.cpp")), "-o", str(directory / "driver.so")]
    subprocess.run([*command, *toolchain.link_flags(None)], check=True)
    return ctypes.CDLL(str(directory / "driver.so"))


def pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def called(function, model, tensors: list[Tensor], sizes: list[int], option, int8: bool, tokens: Tensor) -> Tensor:
    """Returns the logits after each token of ``tokens`` ``(N, T)``, of which half are read at once."""
    by_step = tokens.T.contiguous()
    output = torch.full((*by_step.shape, model.vocab_size), torch.nan)
    tensors = [_data(tensor) for tensor in tensors]
    function(
        pointers(tensors),
        (ctypes.c_int64 * len(sizes))(*sizes),
        option,
        ctypes.c_bool(int8),
        ctypes.c_void_p(by_step.data_ptr()),
        ctypes.c_int64(by_step.shape[0]),
        ctypes.c_int64(by_step.shape[1]),
        ctypes.c_void_p(output.data_ptr()),
    )
    return output.transpose(0, 1)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("vocabulary", "heads", "size", "inner"), [(11, 2, 8, 20), (70, 1, 34, 65), (130, 3, 16, 15)])
def test_transformer(library, vocabulary, heads, size, inner, int8):
    """Each target has the logits of float64, with sizes that fill no vector."""
    torch.manual_seed(0)
    model = Transformer(vocabulary, heads * size, 2, heads, 24, inner).eval()
    body, tokens = model.body, torch.randint(vocabulary, (5, 13))
    tensors = [model.embedding.weight, body.norm.weight, *body.rotation]
    tensors += [tensor for layer in body.layers for tensor in _layer_tensors(layer)]
    sizes = [2, vocabulary, heads * size, size, 24, heads, inner]
    epsilon = ctypes.c_double(torch.finfo(torch.float32).eps)
    found = called(library.transformer, model, tensors, sizes, epsilon, int8, tokens)
    exact = logits(rounded(model), tokens, round_rows) if int8 else logits(model, tokens)
    errors = (found - exact).abs().amax(dim=2) / exact.abs().max()
    # A key at the middle of two integers may be rounded to either.
    assert errors.median() < 1e-5 and errors.max() < (1e-2 if int8 else 1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
@pytest.mark.parametrize(("vocabulary", "embedding", "hidden"), [(11, 5, 20), (70, 33, 65)])
def test_recurrent(library, cell, vocabulary, embedding, hidden, int8):
    """Each target has the states of float64, with sizes that fill no vector."""
    torch.manual_seed(0)
    model = RNNLanguageModel(vocabulary, hidden, embedding, 2, cell).eval()
    core = model.body.core
    assert isinstance(core, nn.RNNBase)
    tensors, sizes = (
        [model.embedding.weight, model.head.weight, *core._flat_weights],
        [2, vocabulary, embedding, hidden],
    )
    tokens = torch.randint(vocabulary, (3, 13))
    number = ctypes.c_int(["lstm", "gru", "elman"].index(cell))
    found = called(library.recurrent, model, tensors, sizes, number, int8, tokens)
    exact = logits(rounded(model) if int8 else model, tokens)
    assert (found - exact).abs().max() < 2e-6
