"""The language models: causality, states, and errors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from support.processor import skip_without_bfloat16_lstm
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightkit.models import LanguageModel, RNNLanguageModel, Transformer
from lightkit.models.transformer import rotate, rotation

VOCABULARY = 11


def transformer(**options):
    return Transformer(
        **{"vocab_size": VOCABULARY, "dim": 16, "num_layers": 2, "num_heads": 2, "context": 12, **options}
    )


def lstm(**options):
    return RNNLanguageModel(**{"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, **options})


def gru(**options):
    return lstm(cell="gru", **options)


MODELS = pytest.mark.parametrize("make", [transformer, lstm, gru], ids=lambda make: make.__name__)


def tokens(steps=10, count=3):
    return torch.randint(0, VOCABULARY, (count, steps), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@MODELS
def test_the_future_changes_nothing(make):
    """Logits depend on all tokens before them and on none after."""
    model = make().eval()
    text = tokens()
    logits = model(text)
    assert logits.shape == (3, 10, VOCABULARY)
    for changed in range(10):
        other = text.clone()
        other[:, changed] = (other[:, changed] + 1) % VOCABULARY
        difference = (model(other) - logits).abs().amax(dim=(0, 2))
        assert (difference[:changed] < 1e-6).all()
        assert (difference[changed:] > 1e-6).all()


@MODELS
@pytest.mark.parametrize("cuts", [(1,) * 10, (10,), (4, 6), (3, 1, 4, 2)], ids=str)
def test_reading_on_is_reading_all(make, cuts):
    """A text in pieces, each with the state of those before, gets the hidden states of the whole."""
    model = make().eval()
    text = tokens()
    whole, _ = model.hidden(text)
    state, pieces = None, []
    for piece in text.split(cuts, dim=1):
        hidden, state = model.hidden(piece, state)
        pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


@MODELS
def test_a_state_can_be_continued_twice(make):
    """Reading on from a state does not change it."""
    model = make().eval()
    _, state = model.hidden(tokens(4))
    first, _ = model.hidden(tokens(5), state)
    model.hidden(tokens(3), state)
    second, _ = model.hidden(tokens(5), state)
    assert torch.equal(first, second)


def test_rotary_positions_are_relative():
    """Dot products of rotated vectors depend on their distance only, and lengths stay the same."""
    table = rotation(40, 8)
    query, key = torch.randn(2, 8)
    turned_query, turned_key = (rotate(vector.expand(40, 8), table) for vector in (query, key))
    products = turned_query @ turned_key.T
    for distance in (-7, 0, 1, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert products[0].std() > 0.1
    torch.testing.assert_close(turned_query.norm(dim=1), query.norm().expand(40))
    torch.testing.assert_close(turned_query[0], query)


@pytest.mark.parametrize("make", [transformer, lstm])
def test_tied_weights(make):
    """A tied head shares the embedding's storage and counts once, also after loading; an untied one does not."""
    model, untied = make(tie_weights=True), make(tie_weights=False)
    assert model.head.weight is model.embedding.weight
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in untied.parameters()) == parameters + VOCABULARY * 16
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = make(tie_weights=True)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other(tokens()), model(tokens()))


@pytest.mark.parametrize(("dim", "layers", "size"), [(16, 2, 64), (48, 1, 128), (128, 4, 352)])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_the_transformer(dim, layers, size, tied):
    """The number of parameters is the documented one; the inner width is 8/3 of the outer, rounded up."""
    model = transformer(dim=dim, num_layers=layers, tie_weights=tied)
    assert model.body.layers[0].feed_forward.out.in_features == size
    expected = layers * (4 * dim**2 + 3 * dim * size + 2 * dim) + dim + VOCABULARY * dim * (1 if tied else 2)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_start_of_the_transformer():
    """The maps onto the residual stream start smaller, and the first loss is about that of a uniform choice."""
    model = Transformer(256, 128, num_layers=8, num_heads=4, context=32)
    layer = model.body.layers[3]
    assert layer.attention.qkv.weight.std().item() == pytest.approx(0.02 * 6**0.5, rel=0.05)
    assert layer.feed_forward.out.weight.std().item() == pytest.approx(0.02 * 6**0.5 / 4, rel=0.05)
    text = torch.randint(0, 256, (4, 33))
    loss = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), rel=0.1)


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_learns(make, dtype):
    """Each parameter gets a finite nonzero gradient, also under autocast and with dropout."""
    if make is lstm and dtype == torch.bfloat16:
        skip_without_bfloat16_lstm()
    model = make(dropout=0.1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(tokens()).float().logsumexp(dim=-1).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@MODELS
def test_dropout_is_for_training(make):
    """Dropout acts in training and not in evaluation."""
    model = make(dropout=0.5)
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


@MODELS
@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 1000])
def test_token_outside_the_vocabulary(make, wrong):
    """The error names the token and the size of the vocabulary."""
    text = tokens()
    text[1, 4] = wrong
    with pytest.raises(ValueError, match=f"token {wrong} is not in the vocabulary of {VOCABULARY}"):
        make()(text)


@MODELS
@pytest.mark.parametrize("shape", [(5,), (2, 0), (2, 3, 4)])
def test_wrong_shape(make, shape):
    """The error names the shape of the tokens and the expected one."""
    with pytest.raises(ValueError, match=r"shape \(N, T\) with T at least 1, got"):
        make()(torch.zeros(shape, dtype=torch.long))


def test_more_than_the_context():
    """The error names the limit, for one text and for a text after a state."""
    model = transformer()
    with pytest.raises(ValueError, match="reads 12 tokens at most, got 13"):
        model(tokens(13))
    _, state = model.hidden(tokens(10))
    with pytest.raises(ValueError, match="reads 12 tokens at most, got 13"):
        model.hidden(tokens(3), state)


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (transformer, {"vocab_size": 0}, "vocab_size must be positive"),
        (transformer, {"context": 0}, "context must be positive"),
        (transformer, {"num_layers": 0}, "num_layers must be positive"),
        (transformer, {"num_heads": 0}, "num_heads must be positive"),
        (transformer, {"dim": 14, "num_heads": 2}, "dim must be a multiple of 2 \\* num_heads = 4"),
        (transformer, {"dropout": 1.0}, "dropout must be"),
        (transformer, {"feed_forward_size": 0}, "feed_forward_size must be positive"),
        (lstm, {"cell": "rnn"}, "cell must be one of"),
        (lstm, {"hidden_size": 0}, "hidden_size must be positive"),
        (lstm, {"tie_weights": True, "embedding_size": 8}, "tie_weights needs an embedding as wide"),
    ],
)
def test_wrong_arguments(make, options, named):
    """The constructor rejects impossible arguments and names them."""
    with pytest.raises(ValueError, match=named):
        make(**options)


def test_compile_is_of_what_training_runs():
    """compile() compiles `hidden`, which the loss reads, as one graph; the parameters keep their names."""
    torch._dynamo.reset()
    model = transformer()
    names = list(model.state_dict())
    plain = copy.deepcopy(model)
    counter = CompileCounter()
    model.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(model.hidden(tokens())[0], plain.hidden(tokens())[0])
    assert counter.frame_count == 1 and counter.op_count > 10
    torch.testing.assert_close(model(tokens()), plain(tokens()))
    assert list(model.state_dict()) == names


def test_any_body():
    """Any body of the documented signature makes a language model."""

    class Last(nn.Module):
        def forward(self, embedded, state):
            return embedded * 2, state

    model = LanguageModel(VOCABULARY, 4, 4, Last(), tie_weights=True)
    assert model.context is None
    assert model(tokens()).shape == (3, 10, VOCABULARY)
