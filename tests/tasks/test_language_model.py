"""The language-model task in a real Trainer, and its generation."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.processor import skip_without_bfloat16_lstm
from support.trainers import bare_trainer
from torch import nn

from lightkit.callbacks import LeanLoop, TestRecorder
from lightkit.data import TensorBatches
from lightkit.errors import ConfigError
from lightkit.models import RNNLanguageModel, Transformer
from lightkit.optim import AdamW
from lightkit.tasks import LanguageModelTask

VOCABULARY = 7


def transformer(context=8):
    return Transformer(VOCABULARY, dim=16, num_layers=2, num_heads=2, context=context)


def lstm():
    return RNNLanguageModel(VOCABULARY, 16)


def cycles(count=50, steps=8):
    """Returns texts in which the successor of each token is the next number."""
    starts = torch.randint(0, VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(0))
    text = (starts + torch.arange(steps + 1)) % VOCABULARY
    return text[:, :-1], text[:, 1:]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [transformer, lstm])
def test_learns(make, precision):
    """Both models learn a rule, on lean steps and in mixed precision, and every metric is logged under its name."""
    if make is lstm and precision != "32-true":
        skip_without_bfloat16_lstm()
    inputs, targets = cycles()
    task = LanguageModelTask(make(), partial(AdamW, lr=0.02))
    lean = LeanLoop()
    runner = bare_trainer(lean, max_epochs=15, precision=precision)
    runner.fit(task, TensorBatches([inputs, targets], 10, shuffle=True), TensorBatches([inputs, targets], 20))
    names = {"loss", "perplexity", "bits_per_byte"}
    assert runner.callback_metrics.keys() >= {"train/loss", *(f"val/{name}" for name in names)}
    assert runner.callback_metrics["val/loss"] < 0.1
    (result,) = runner.test(task, TensorBatches([inputs, targets], 20), verbose=False)
    assert result.keys() == {f"test/{name}" for name in names}
    assert task.generate(torch.tensor([3]), 5, temperature=0).tolist() == [4, 5, 6, 0, 1]


def test_figures_are_of_all_targets_alike():
    """Metrics are exact means over all targets that are not ignored, in uneven batches and without smoothing."""
    inputs, targets = cycles(10)
    targets = targets.clone()
    targets[3:, 5:] = -100
    targets[9] = -100
    task = LanguageModelTask(lstm(), label_smoothing=0.3, z_loss=0.1)
    (result,) = bare_trainer().test(task, TensorBatches([inputs, targets], 3), verbose=False)
    exact = F.cross_entropy(task(inputs).flatten(0, 1), targets.flatten()).item()
    assert result["test/loss"] == pytest.approx(exact, rel=1e-5)
    assert result["test/perplexity"] == pytest.approx(math.exp(exact), rel=1e-5)
    assert result["test/bits_per_byte"] == pytest.approx(exact / math.log(2), rel=1e-5)


def test_loss_of_training():
    """The loss is the cross-entropy of the model's logits with smoothing and z-loss, and reaches every parameter."""
    inputs, targets = cycles(4)
    task = LanguageModelTask(transformer(), label_smoothing=0.2, z_loss=0.01)
    task.log = lambda *_, **__: None
    logits = task(inputs).flatten(0, 1)
    expected = (
        F.cross_entropy(logits, targets.flatten(), label_smoothing=0.2) + 0.01 * logits.logsumexp(1).square().mean()
    )
    loss = task.training_step((inputs, targets), 0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in task.parameters())


def test_losses_of_single_targets_are_recorded():
    """test_step returns the loss of every target in its place."""
    inputs, targets = cycles(10)
    recorder = TestRecorder()
    task = LanguageModelTask(lstm())
    bare_trainer(recorder).test(task, TensorBatches([inputs, targets], 3), verbose=False)
    exact = F.cross_entropy(task(inputs).transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(recorder.result()["losses"], exact.detach())


def test_not_more_losses_than_are_looked_at(monkeypatch):
    """Of a large test set the first losses are returned, and all are in the metrics."""
    monkeypatch.setattr("lightkit.tasks.language_model._RECORDED_TOKENS", 40)
    inputs, targets = cycles(10)
    recorder = TestRecorder()
    bare_trainer(recorder).test(LanguageModelTask(lstm()), TensorBatches([inputs, targets], 3), verbose=False)
    assert recorder.result()["losses"].shape == (6, 8)


def test_generates_as_from_the_whole_text():
    """The likeliest continuation with states equals that of reading the whole text for each token."""
    for model in (transformer(context=16), lstm()):
        task = LanguageModelTask(model).eval()
        text = torch.tensor([1, 4, 2])
        for _ in range(10):
            text = torch.cat((text, task(text[None])[0, -1].argmax()[None]))
        assert torch.equal(task.generate(torch.tensor([1, 4, 2]), 10, temperature=0), text[3:])


def test_generates_beyond_the_context():
    """A full window is read again from its last half, and each token follows from the window then."""
    task = LanguageModelTask(transformer(context=8)).eval()
    prompt = torch.arange(12) % VOCABULARY
    text = torch.cat((prompt, task.generate(prompt, 20, temperature=0)))
    seen = 8
    for end in range(12, 32):
        assert text[end] == task(text[None, end - seen : end])[0, -1].argmax(), end
        seen = 4 if seen == 8 else seen + 1


def test_choices():
    """The generator decides; temperature 0 and top_k=1 take the likeliest token; top_k excludes the others."""
    task = LanguageModelTask(lstm())
    with torch.no_grad():
        task.model.head.weight.mul_(5)
    prompt = torch.tensor([2, 3])
    make = lambda seed, **options: task.generate(  # noqa: E731
        prompt, 60, generator=torch.Generator().manual_seed(seed), **options
    )
    assert torch.equal(make(0), make(0)) and not torch.equal(make(0), make(1))
    greedy = task.generate(prompt, 60, temperature=0)
    assert torch.equal(make(0, top_k=1), greedy) and torch.equal(make(0, temperature=1e-4), greedy)
    chosen = make(0, top_k=2)
    logits = task(torch.cat((prompt, chosen))[None, :-1])[0, 1:]
    allowed = logits.topk(2, dim=1).indices
    assert (allowed == chosen[:, None]).any(dim=1).all() and not torch.equal(chosen, greedy)
    assert len(make(0, top_k=1000)) == 60 and len(task.generate(prompt, 0)) == 0


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("model", [transformer, lstm])
def test_native_generation_is_that_of_the_model(model, options):
    """The native decoder and the model draw the same tokens from the same seed, also beyond the context."""
    task = LanguageModelTask(model())
    with torch.no_grad():
        task.model.head.weight.mul_(3)
    make = lambda: task.generate(torch.tensor([2, 3]), 60, generator=torch.Generator().manual_seed(0), **options)  # noqa: E731
    native = make()
    calls = []
    handle = task.model.head.register_forward_hook(lambda *args: calls.append(args))
    assert torch.equal(make(), native) and len(calls) == 60
    handle.remove()
    assert torch.equal(make(), native) and len(calls) == 60


def test_generation_in_int8():
    """Weights and cache in int8 give nearly the likeliest tokens of the model; a wrong precision is an error."""
    task = LanguageModelTask(transformer(context=40)).eval()
    prompt = torch.tensor([2, 3])
    text = torch.cat((prompt, task.generate(prompt, 30, temperature=0, weights="int8", cache="int8")))
    logits = task(text[None, :-1])[0, 1:]
    assert (logits.max(dim=1).values - logits.gather(1, text[2:, None])[:, 0]).max() < 0.05 * logits.std()
    with pytest.raises(ConfigError, match="weights must be one of 'float32', 'int8', got 'int2'"):
        task.generate(prompt, 3, weights="int2")


def test_a_diverged_model_is_an_error():
    """Logits that are NaN are an error and no text, as with torch's operations."""
    task = LanguageModelTask(transformer())
    with torch.no_grad():
        task.model.head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="probabilities of the next token are NaN"):
        task.generate(torch.tensor([1]), 3)
    task.model.head.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="nan"):
        task.generate(torch.tensor([1]), 3)


def test_generation_leaves_the_task_as_it_was():
    """A task in training mode is in training mode afterwards, and dropout does not affect the text."""
    model = RNNLanguageModel(VOCABULARY, 16, dropout=0.9)
    task = LanguageModelTask(model).train()
    first, second = (task.generate(torch.tensor([1]), 30, temperature=0) for _ in range(2))
    assert torch.equal(first, second)
    assert task.training and model.training


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt": torch.empty(0).long()}, "P at least 1"),
        ({"prompt": torch.zeros(1, 2).long()}, "P at least 1"),
        ({"length": -1}, "got -1, 1.0 and None"),
        ({"temperature": -0.5}, "got 3, -0.5 and None"),
        ({"top_k": 0}, "got 3, 1.0 and 0"),
        ({"prompt": torch.tensor([VOCABULARY])}, "token 7 is not in the vocabulary of 7"),
    ],
)
def test_wrong_arguments(arguments, named):
    """The error names the invalid argument and the expected one."""
    with pytest.raises(ValueError, match=named):
        LanguageModelTask(lstm()).generate(**{"prompt": torch.tensor([1]), "length": 3, **arguments})


def test_takes_language_models_alone():
    """The constructor rejects a model without hidden states."""
    with pytest.raises(ValueError, match="takes a LanguageModel, got Linear"):
        LanguageModelTask(nn.Linear(2, 2))
