"""When the native library decodes a model, and when the model itself must run."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from lightkit import native
from lightkit.flops import FlopCounter
from lightkit.models import LanguageModel, RNNLanguageModel, Transformer, decoder, transformer
from lightkit.models.native_decoding import unsupported_reason

TEXT = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))


def make_transformer(**options):
    torch.manual_seed(0)
    return Transformer(11, 16, 2, 2, 12, **options).eval()


def make_recurrent(**options):
    torch.manual_seed(0)
    return RNNLanguageModel(11, 16, **{"num_layers": 2, **options}).eval()


def read(model, **options):
    """Returns the logits after each token, of a decoder that reads them in three pieces."""
    reader = decoder(model, sequences=2, **options)
    return torch.cat([reader.read(piece, every=True) for piece in TEXT.split([4, 1, 4], dim=1)], dim=1)


MODELS = pytest.mark.parametrize(
    "make",
    [make_transformer, make_recurrent, functools.partial(make_recurrent, cell="gru")],
    ids=["transformer", "lstm", "gru"],
)


@MODELS
@pytest.mark.parametrize("every", [True, False])
def test_both_decoders_are_one(make, every, monkeypatch):
    """The decoder that calls the model has the results, the shapes and the errors of the native one."""
    model = make()
    assert unsupported_reason(model) is None
    fast = decoder(model, sequences=2)
    monkeypatch.setattr("lightkit.models.decoding.unsupported_reason", lambda model: "the test says so")
    slow = decoder(model, sequences=2)
    for reader in (slow, fast):
        for wrong in (TEXT[0], TEXT[:1], TEXT[:, :0], torch.full((2, 1), 11)):
            with pytest.raises(ValueError, match=r"\(2, T\)|\(N, T\)|token 11 is not in the vocabulary of 11"):
                reader.read(wrong)
    for _ in range(2):
        for piece in TEXT.split([4, 1, 4], dim=1):
            found, expected = fast.read(piece, every), slow.read(piece, every)
            assert not expected.requires_grad
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        fast.reset(), slow.reset()


@MODELS
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.3}, {"top_k": 1}, {"top_k": 4}, {"top_k": 100}, {"temperature": 0}], ids=str
)
def test_both_decoders_draw_the_same_tokens(make, options, monkeypatch):
    """From the same seed both generate the same tokens for each sequence, and read all except the last."""
    model = make()
    with torch.no_grad():
        model.head.weight.mul_(4)
    fast = decoder(model, sequences=2)
    monkeypatch.setattr("lightkit.models.decoding.unsupported_reason", lambda model: "the test says so")
    slow = decoder(model, sequences=2)
    first, second = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    tokens = TEXT[:, :3]
    for count in (4, 1, 2):
        found = fast.extend(tokens, count, generator=first, **options)
        assert found.shape == (2, count) and found.dtype == torch.int64
        assert torch.equal(found, slow.extend(tokens, count, generator=second, **options))
        tokens = found[:, -1:]
    assert torch.equal(first.get_state(), second.get_state())
    torch.testing.assert_close(fast.read(tokens), slow.read(tokens), rtol=1e-4, atol=1e-5)


def test_global_generator():
    """Without a generator the draws are those of torch's global one."""
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        reader = decoder(make_transformer())
        torch.manual_seed(8)
        results.append(reader.extend(TEXT[:1, :1], 10))
    assert torch.equal(*results) and len(results[0].unique()) > 3


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"count": 0}, "got 0, None and 1.0"),
        ({"temperature": -1.0}, "got 1, None and -1.0"),
        ({"temperature": float("nan")}, "got 1, None and nan"),
        ({"top_k": 0}, "got 1, 0 and 1.0"),
        ({"tokens": torch.tensor([[11]])}, "token 11 is not in the vocabulary of 11"),
    ],
)
def test_wrong_arguments_of_extend(native, options, named, monkeypatch):
    """Both decoders name the argument; the state is that before."""
    if not native:
        monkeypatch.setattr("lightkit.models.decoding.unsupported_reason", lambda model: "the test says so")
    reader = decoder(make_transformer())
    with pytest.raises(ValueError, match=named):
        reader.extend(**{"tokens": TEXT[:1, :1], "count": 1, **options})
    assert torch.equal(reader.read(TEXT[:1]), decoder(make_transformer()).read(TEXT[:1]))


def hook_of_a_layer(model):
    def hook(module, inputs, output):
        return output * 2

    next(m for m in model.modules() if isinstance(m, nn.RMSNorm)).register_forward_hook(hook)


def own_forward(model):
    norm = model.body.norm
    norm.forward = lambda x: F.rms_norm(x, (16,)) * 3


def parametrized(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    parametrize.register_parametrization(model.body.layers[0].attention.out, "weight", Doubled())


def pruned(model):
    prune.random_unstructured(model.body.layers[0].feed_forward.out, "weight", amount=0.5)


def other_layer(model):
    model.body.norm = nn.LayerNorm(16)


def subclass_of_a_layer(model):
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model.head.__class__ = Shifted


def bias(model):
    model.head.bias = nn.Parameter(torch.arange(11.0))


def own_hidden(model):
    original = model.hidden
    model.hidden = lambda tokens, state=None: (lambda h, s: (h * 2, s))(*original(tokens, state))


def renormalized_embedding(model):
    model.embedding.max_norm = 0.1


def other_epsilon_and_dtype(model):
    model.bfloat16()


CHANGES = [
    (hook_of_a_layer, "RMSNorm has a hook"),
    (own_forward, "RMSNorm has a hook or a forward of its own"),
    (parametrized, "Parametrized"),
    (pruned, "Linear has a hook"),
    (other_layer, "LayerNorm is in the place of a RMSNorm"),
    (subclass_of_a_layer, "Shifted is in the place of a Linear"),
    (bias, "Linear has a bias"),
    (own_hidden, "methods of its own"),
    (renormalized_embedding, "max_norm"),
    (other_epsilon_and_dtype, "bfloat16 on cpu"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=lambda value: getattr(value, "__name__", None))
def test_what_users_changed_runs(change, reason):
    """A model that somebody has changed decodes as it computes, and its logits show the change."""
    model = make_transformer()
    plain = read(model)
    change(model)
    assert reason in unsupported_reason(model)
    with torch.no_grad():
        hidden, _ = model.hidden(TEXT)
        expected = model.head(hidden).float()
    found = read(model)
    torch.testing.assert_close(
        found,
        expected,
        rtol=1e-1 if change is other_epsilon_and_dtype else 1e-4,
        atol=1e-1 if change is other_epsilon_and_dtype else 1e-5,
    )
    assert (found - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="weights='int8' needs the native decoder, which does not apply"):
        read(model, weights="int8")
    with pytest.raises(ValueError, match="cache='int8' needs the native decoder"):
        read(model, cache="int8")


def test_room_for_tokens(monkeypatch):
    """Both decoders of a transformer read as many tokens as there is room for, and one more is an error."""
    model = make_transformer()
    for reason in (None, "the test says so"):
        monkeypatch.setattr("lightkit.models.decoding.unsupported_reason", lambda model, reason=reason: reason)
        reader = decoder(model, max_tokens=4)
        last = reader.read(TEXT[:1, :4])
        torch.testing.assert_close(last, model(TEXT[:1, :4])[:, -1].detach(), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="reads 4 tokens at most, got 1 after 4"):
            reader.read(TEXT[:1, :1])
        reader.reset()
        assert torch.equal(reader.read(TEXT[:1, :4]), last)


def test_epsilon_of_a_norm():
    """A norm with an epsilon of its own is decoded with it."""
    model = make_transformer()
    before = read(model)
    model.body.norm.eps = 0.5
    assert unsupported_reason(model) is None
    found = read(model)
    torch.testing.assert_close(found, model(TEXT), rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [{"nonlinearity": "relu"}, {"bias": False}, {"proj_size": 4}, {"bidirectional": True}, {"batch_first": False}],
    ids=str,
)
def test_recurrent_layers_with_other_settings(options):
    """Layers that no RNNLanguageModel has by itself are not decoded natively."""
    model = make_recurrent()
    kind = nn.RNN if "nonlinearity" in options else nn.LSTM
    model.body.core = kind(16, 16, **{"batch_first": True, **options})
    assert "other settings" in unsupported_reason(model)


@pytest.mark.parametrize("make", [make_transformer, make_recurrent])
def test_dropout_in_training_mode(make):
    """Dropout in training mode acts; without dropout the mode does not matter, and evaluation mode is native."""
    model = make(dropout=0.5)
    assert unsupported_reason(model) is None
    model.train()
    assert "dropout" in unsupported_reason(model) and not torch.equal(read(model), read(model))
    assert unsupported_reason(make().train()) is None


@pytest.mark.parametrize("place", ["torch.nn.Linear.forward", "torch.nn.Module.__call__", "torch.nn.functional.silu"])
def test_patched_functions(place, monkeypatch):
    """A patched function of torch is called."""
    model = make_transformer()
    calls = []
    owner, name = (nn, place.split(".")[2:]) if "functional" not in place else (F, ["silu"])
    *path, name = name
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def patched(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, patched)
    assert "is patched" in unsupported_reason(model)
    read(model)
    assert calls


def test_patched_blocks(monkeypatch):
    """A patched method of lightkit's own classes is called."""
    model, plain = make_transformer(), read(make_transformer())
    monkeypatch.setattr(transformer, "rotate", lambda vectors, rotation: vectors)
    assert "rotate is patched" in unsupported_reason(model)
    assert (read(model) - plain).abs().max() > 1e-4


@MODELS
def test_subclasses_run_themselves(make):
    """A subclass may do anything."""

    class Own(type(make())):
        pass

    model = make()
    model.__class__ = Own
    assert "the model is a Own" in unsupported_reason(model)
    assert read(model).shape == (2, 9, 11)


def test_other_language_models():
    """A body of the user's own runs."""

    class Body(nn.Module):
        def forward(self, embedded, state):
            return embedded * 2, state

    model = LanguageModel(11, 4, 4, Body(), tie_weights=True)
    torch.testing.assert_close(read(model), model(TEXT).detach())


@MODELS
def test_modes_and_autocast(make):
    """A counter of operations counts them, autocast casts, and a hook for all modules is called."""
    model = make()
    # The counter does not count in a process that has compiled something.
    torch._dynamo.reset()
    with FlopCounter() as counter:
        read(model)
    assert counter.total
    with torch.autocast("cpu", torch.bfloat16):
        assert unsupported_reason(model) == "autocast is enabled"
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: calls.append(args))
    try:
        read(model)
    finally:
        handle.remove()
    assert calls and unsupported_reason(model) is None


def test_without_the_native_library(monkeypatch):
    """Without the library the model runs, and int8 says why it cannot."""
    monkeypatch.setattr(native, "_loaded", (None, "LIGHTKIT_NATIVE=off"))
    model = make_transformer()
    torch.testing.assert_close(read(model), model(TEXT).detach())
    with pytest.raises(ValueError, match="LIGHTKIT_NATIVE=off"):
        read(model, weights="int8")


@MODELS
def test_a_compiled_body_is_decoded(make):
    """`compile` changes how a model is computed and not what: the native decoder applies."""
    model, expected = make(), read(make())
    model.compile(backend="eager")
    assert unsupported_reason(model) is None
    assert torch.equal(read(model), expected)


def test_a_copy_is_decoded():
    """Copies of a model, and weights that were loaded or are not contiguous, are decoded alike."""
    model = make_transformer()
    expected = read(model)
    other = copy.deepcopy(model)
    other.head.weight.data = other.head.weight.data.T.contiguous().T
    assert unsupported_reason(other) is None and torch.equal(read(other), expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weights": "int4"}, "weights must be one of 'float32', 'int8', got 'int4'"),
        ({"cache": "half"}, "cache must be one of 'float32', 'int8', got 'half'"),
        ({"max_tokens": 0}, "max_tokens must be positive, got 0"),
        ({"sequences": 0}, "sequences must be from 1 to 1048576, got 0"),
    ],
)
def test_wrong_arguments(options, named):
    """The error names the argument, its value and what was expected."""
    with pytest.raises(ValueError, match=named):
        decoder(make_transformer(), **options)


def test_a_recurrent_network_has_no_cache():
    """Keys and values in int8 are asked of a model that has none."""
    with pytest.raises(ValueError, match="an RNNLanguageModel has none"):
        decoder(make_recurrent(), cache="int8")
