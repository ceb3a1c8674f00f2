"""The native decoders against the models in float64, in float32 and int8, at the edges of vectors and panels."""

from __future__ import annotations

import signal
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.exact_language_models import logits, round_rows, rounded
from support.threads import assert_same_with_any_threads
from torch import Tensor, nn

from lightkit.models import RNNLanguageModel, Transformer, decoder
from lightkit.models.native_decoding import native_decoder, unsupported_reason

# The largest numbers below which a block, a panel, and the tokens that a call reads at once are not full.
EDGES = [1, 15, 16, 17, 63, 64, 65, 130]


def transformer(vocabulary=11, heads=2, head_size=8, layers=2, context=24, inner=20, tied=True, seed=0):
    """Returns a transformer whose norms and epsilon are not the initial ones."""
    torch.manual_seed(seed)
    model = Transformer(vocabulary, heads * head_size, layers, heads, context, inner, tie_weights=tied)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.uniform_(0.5, 1.5)
        # Logits of a trained model: the initial ones hardly differ.
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()


def recurrent(cell="lstm", vocabulary=11, hidden=20, embedding=None, layers=2, tied=False, seed=0):
    torch.manual_seed(seed)
    return RNNLanguageModel(vocabulary, hidden, embedding, layers, cell, tie_weights=tied).eval()


def pruned(model: Transformer, heads: list[int], inner: list[int]) -> Transformer:
    """Leaves so many heads and inner units in each layer."""
    for layer, count, width in zip(model.body.layers, heads, inner, strict=True):
        attention, feed_forward, size = layer.attention, layer.feed_forward, layer.attention.head_size
        qkv = attention.qkv.weight.detach().unflatten(0, (3, -1, size))[:, :count].flatten(0, 2)
        wide = feed_forward.gate_and_value.weight.detach().unflatten(0, (2, -1))[:, :width].flatten(0, 1)
        for linear, weight in (
            (attention.qkv, qkv),
            (attention.out, attention.out.weight.detach()[:, : count * size]),
            (feed_forward.gate_and_value, wide),
            (feed_forward.out, feed_forward.out.weight.detach()[:, :width]),
        ):
            linear.weight = nn.Parameter(weight.contiguous())
            linear.out_features, linear.in_features = weight.shape
    return model


def text(vocabulary: int, sequences: int, steps: int, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (sequences, steps), generator=torch.Generator().manual_seed(seed))


def read_in_pieces(model, tokens: Tensor, pieces: list[int], **options) -> Tensor:
    """Returns the logits after each token, of a decoder that reads the tokens in pieces of these lengths."""
    assert unsupported_reason(model) is None
    reader = decoder(model, sequences=len(tokens), **options)
    return torch.cat([reader.read(piece, every=True) for piece in tokens.split(pieces, dim=1)], dim=1)


def assert_close(found: Tensor, model, exact: Tensor, tokens: Tensor, int8_cache: bool = False) -> None:
    """Fails unless the error is about that of torch's operations in float32.

    The two add in different orders, so that one of them may be luckier: of few logits several times. A key or value at
    the middle of two integers may be rounded to either, which changes the logits of its sequence from there on, by less
    than int8 does: with an int8 cache, half of the tokens must have no such value before them.
    """
    with torch.no_grad():
        torchs = (model(tokens) - (logits(model, tokens) if int8_cache else exact)).abs().max()
    errors, largest = (found - exact).abs().amax(dim=2), exact.abs().max()
    bound = 4 * torchs + 2e-6 * largest
    assert found.dtype == torch.float32
    if int8_cache:
        assert errors.median() <= bound and errors.max() <= 1e-2 * largest, (errors, torchs, largest)
    else:
        assert errors.max() <= bound, (errors, torchs, largest)


@given(
    vocabulary=st.integers(1, 70),
    heads=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    half=st.integers(1, 20),
    inner=st.lists(st.integers(1, 70), min_size=3, max_size=3),
    tied=st.booleans(),
    sequences=st.integers(1, 6),
    pieces=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    spare=st.integers(0, 3),
    seed=st.integers(0, 3),
)
def test_any_transformer(vocabulary, heads, half, inner, tied, sequences, pieces, spare, seed):
    """Logits after every token, for any sizes, pruned layers, and a text in any pieces up to the end of the context."""
    context = sum(pieces) + spare
    model = transformer(vocabulary, 3, 2 * half, len(heads), context, 70, tied, seed)
    pruned(model, heads, inner[: len(heads)])
    tokens = text(vocabulary, sequences, sum(pieces), seed)
    assert_close(read_in_pieces(model, tokens, pieces), model, logits(model, tokens), tokens)


@given(
    cell=st.sampled_from(["lstm", "gru", "elman"]),
    vocabulary=st.integers(1, 70),
    hidden=st.integers(1, 70),
    embedding=st.none() | st.integers(1, 40),
    layers=st.integers(1, 3),
    tied=st.booleans(),
    sequences=st.integers(1, 6),
    pieces=st.lists(st.integers(1, 20), min_size=1, max_size=5),
)
def test_any_recurrent_network(cell, vocabulary, hidden, embedding, layers, tied, sequences, pieces):
    """Logits after every token, for every cell and any sizes, and a text in any pieces."""
    model = recurrent(cell, vocabulary, hidden, embedding, layers, tied and embedding is None)
    tokens = text(vocabulary, sequences, sum(pieces))
    assert_close(read_in_pieces(model, tokens, pieces), model, logits(model, tokens), tokens)


@pytest.mark.sanitized
@pytest.mark.parametrize("cache", ["float32", "int8"])
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("size", EDGES)
def test_edges_of_a_transformer(size, weights, cache):
    """Each size at the edges of a block and of a panel: vocabulary, head, inner width, context, text at once."""
    for sizes in (
        {"vocabulary": size},
        {"head_size": 2 * size, "heads": 1, "layers": 1},
        {"inner": size},
        {"context": size},
    ):
        model = transformer(**sizes)
        tokens = text(model.vocab_size, 3, min(model.context, 30))
        for pieces in ([1] * tokens.shape[1], [tokens.shape[1]]):
            found = read_in_pieces(model, tokens, pieces, weights=weights, cache=cache)
            same = rounded(model) if weights == "int8" else model
            exact = logits(same, tokens, round_rows if cache == "int8" else Tensor.double)
            assert_close(found, same, exact, tokens, cache == "int8")


@pytest.mark.sanitized
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
@pytest.mark.parametrize("size", EDGES)
def test_edges_of_a_recurrent_network(size, cell, weights):
    """States, embeddings and vocabularies at the edges of a block and of a panel; int8 is exact up to float32."""
    for sizes in ({"vocabulary": size}, {"hidden": size}, {"embedding": size}):
        model = recurrent(cell, **sizes)
        tokens = text(model.vocab_size, 2, 9)
        found = read_in_pieces(model, tokens, [1, 3, 5], weights=weights)
        same = rounded(model) if weights == "int8" else model
        assert_close(found, same, logits(same, tokens), tokens)


@pytest.mark.parametrize("make", [transformer, recurrent])
def test_last_logits_alone(make):
    """Without ``every`` a call returns the logits after its last token, the same to the bit."""
    model, tokens = make(), text(11, 3, 20)
    every = read_in_pieces(model, tokens, [7, 13])
    reader = decoder(model, sequences=3)
    assert torch.equal(reader.read(tokens[:, :7]), every[:, 6])
    assert torch.equal(reader.read(tokens[:, 7:].int()), every[:, 19])


@pytest.mark.parametrize("make", [transformer, recurrent])
def test_reset_and_weights(make):
    """After a reset the decoder reads as at first, with the weights that the model had when it was made."""
    model, tokens = make(), text(11, 1, 12)
    reader = decoder(model)
    first = reader.read(tokens, every=True)
    with torch.no_grad():
        model.head.weight.zero_()
    reader.reset()
    assert torch.equal(reader.read(tokens, every=True), first)


@pytest.mark.parametrize("make", [transformer, recurrent])
def test_an_error_changes_nothing(make):
    """After tokens that do not fit the decoder goes on as if they had not been."""
    model, tokens = make(), text(11, 2, 24)
    expected = read_in_pieces(model, tokens, [5, 19])
    reader = decoder(model, sequences=2)
    reader.read(tokens[:, :5])
    wrong = tokens[:, 5:].clone()
    wrong[1, 18] = 11
    below = wrong.clone()
    below[1, 18] = -1
    for bad, message in (
        (wrong, "token 11 is not in the vocabulary of 11"),
        (below, "token -1 is not in the vocabulary of 11"),
        (tokens[0], r"must have the shape \(2, T\) with T at least 1, got \[24\]"),
        (tokens[:1], r"must have the shape \(2, T\)"),
        (tokens[:, :0], r"must have the shape \(2, T\)"),
        (tokens.float(), "must be int64 on the CPU, got Float"),
        (tokens.to("meta"), "must be int64 on the CPU, got Long on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            reader.read(bad)
    assert torch.equal(reader.read(tokens[:, 5:], every=True), expected[:, 5:])


def test_full_context():
    """The last token of the context is read; one more is an error, after which a reset makes room."""
    model, tokens = transformer(context=24), text(11, 1, 24)
    reader = decoder(model)
    with pytest.raises(ValueError, match="reads 24 tokens at most, got 25 after 0"):
        reader.read(torch.cat((tokens, tokens[:, :1]), dim=1))
    last = reader.read(tokens)
    for _ in range(2):
        with pytest.raises(ValueError, match="reads 24 tokens at most, got 1 after 24"):
            reader.read(tokens[:, :1])
    reader.reset()
    assert torch.equal(reader.read(tokens), last)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value, bits):
    """A weight of the head that is not finite makes its logits NaN or infinite, and no others."""
    model, tokens = transformer(vocabulary=40, tied=False), text(40, 1, 4)
    with torch.no_grad():
        model.head.weight[17, 3] = value
    found = native_decoder(model, bits, 32, 1).read(tokens, False)[0]
    assert not found[17].isfinite() and found[torch.arange(40) != 17].isfinite().all()


@pytest.mark.parametrize("factor", [0.0, 1e-45, 1e-38, 1e30])
def test_extreme_rows(factor):
    """Rows of zeros, of subnormal numbers and of huge ones are rounded without a step out of range."""
    model, tokens = transformer(vocabulary=40, tied=False), text(40, 1, 4)
    with torch.no_grad():
        model.head.weight.mul_(factor)
    found = read_in_pieces(model, tokens, [4], weights="int8").double()
    exact = logits(model, tokens)
    # Two layers in int8 are off by some hundredths. A subnormal weight has few bits: nothing is left of the smallest.
    assert found.isfinite().all() and (found - exact).abs().max() <= 0.1 * exact.abs().max() + 1e-42


@pytest.mark.parametrize("make", [transformer, recurrent])
def test_any_number_of_threads(make):
    """Large maps are shared out over threads, and the logits do not depend on their number."""
    large = {"vocabulary": 3000} | (
        {"head_size": 64, "heads": 4, "inner": 700} if make is transformer else {"hidden": 300}
    )
    model, tokens = make(**large), text(3000, 2, 24)
    for weights in ("float32", "int8"):
        assert_same_with_any_threads(lambda w=weights: [read_in_pieces(model, tokens, [20, 1, 1, 2], weights=w)])


def test_two_threads_take_turns():
    """Threads may share a decoder: each call reads its tokens after those of some other call."""
    model = recurrent(hidden=128)
    reader, tokens = decoder(model), text(11, 1, 200)
    threads = [threading.Thread(target=lambda: [reader.read(tokens) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = decoder(model)
    for _ in range(81):
        expected = alone.read(tokens)
    assert torch.equal(reader.read(tokens), expected)


@pytest.fixture
def alarm():
    """Calls a function in a handler of a signal, after some hundredths of a second."""
    before = signal.getsignal(signal.SIGALRM)

    def set_alarm(handle):
        signal.signal(signal.SIGALRM, lambda number, frame: handle())
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    yield set_alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_ctrl_c_ends_a_long_call(alarm):
    """A text of a million tokens can be interrupted, and the decoder reads on afterwards."""
    model = recurrent()
    reader, tokens = decoder(model), text(11, 1, 1_000_000)

    def interrupt():
        raise KeyboardInterrupt

    for call in (lambda: reader.read(tokens), lambda: reader.extend(tokens, 1)):
        alarm(interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()
        assert 0 < reader._decoder.position < 1_000_000
        reader.reset()
    assert torch.equal(reader.read(tokens[:, :9]), decoder(model).read(tokens[:, :9]))


def test_a_call_within_a_call_is_an_error(alarm):
    """A handler of a signal that uses the decoder while it reads gets an error, and does not wait forever."""
    reader = decoder(recurrent())
    alarm(reader.reset)
    with pytest.raises(RuntimeError, match="a call within another call of the same decoder"):
        reader.read(text(11, 1, 1_000_000))
    reader.reset()


def test_room_for_generated_tokens():
    """All tokens but the last generated one need room; one more is an error that changes nothing."""
    model, tokens = transformer(context=24), text(11, 1, 20)
    reader = decoder(model)
    with pytest.raises(ValueError, match="reads 24 tokens at most, got 25 after 0"):
        reader.extend(tokens, 6)
    added = reader.extend(tokens, 5, temperature=0)
    for i in range(5):
        whole = torch.cat((tokens, added[:, :i]), dim=1)
        assert decoder(model).read(whole).argmax() == added[0, i]
    with pytest.raises(ValueError, match="reads 24 tokens at most, got 1 after 24"):
        reader.extend(tokens[:, :1], 1)


def test_frequencies():
    """Tokens are drawn with their probabilities, of all tokens and of the likeliest."""
    model, count = recurrent(vocabulary=9), 4000
    with torch.no_grad():
        model.head.weight.mul_(8)
        logits = model(torch.zeros(1, 1, dtype=torch.int64))[0, 0].double()
    for temperature, k in ((1.0, 9), (0.5, 9), (2.0, 4)):
        reader = decoder(model, sequences=count)
        generator = torch.Generator().manual_seed(0)
        drawn = reader.extend(torch.zeros(count, 1, dtype=torch.int64), 1, temperature, k, generator)
        kept = torch.where(logits >= logits.sort().values[-k], logits, -torch.inf)
        expected = (kept / temperature).softmax(dim=0)
        found = drawn[:, 0].bincount(minlength=9) / count
        # Four standard deviations of a frequency.
        assert ((found - expected).abs() <= 4 * (expected / count).sqrt()).all()


@pytest.mark.sanitized
@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("top_k", [1, 3, 40, 2**40])
def test_draws_that_no_generator_makes(value, top_k):
    """Whatever the draws are, the tokens are in the vocabulary."""
    reader = decoder(transformer(vocabulary=40))._decoder
    tokens = reader.extend(text(40, 1, 2), 20, 1.0, top_k, torch.full((20, 1, 40), value))
    assert ((tokens >= 0) & (tokens < 40)).all()
