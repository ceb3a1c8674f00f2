"""The forecast task in a real Trainer: scaling, metrics, intervals, checkpoints."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.trainers import bare_trainer
from torch import nn
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from lightkit.callbacks import LeanLoop, TestRecorder
from lightkit.data import Series
from lightkit.errors import ConfigError
from lightkit.tasks import ForecastTask
from lightkit.tasks.forecast import conformal_quantile


class Affine(nn.Module):
    """A linear map of the history."""

    def __init__(self, history, horizon):
        super().__init__()
        self.map = nn.Linear(history, horizon)

    def forward(self, sequences):
        assert sequences.dtype == self.map.weight.dtype
        return self.map(sequences.squeeze(2))


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Returns the path of 4,000 independent normal numbers around 1,000 with a deviation of 5."""
    values = 1000 + 5 * torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("noise") / "noise.csv"
    path.write_text("x\n" + "\n".join(map(str, values.tolist())) + "\n")
    return str(path)


def data_of(path, **options):
    sizes = {"history": 4, "horizon": 3, "validation_size": 1000, "test_size": 2000, "batch_size": 50}
    return Series(path=path, **{**sizes, **options})


def task(**options):
    metrics = {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False)}
    return ForecastTask(Affine(4, 3), 3, partial(torch.optim.SGD, lr=0.05), metrics=metrics, **options)


@pytest.mark.parametrize("relative", [False, True])
def test_learns_and_measures_in_the_units_of_the_series(noise, relative):
    """Metrics are those of `forward` on the test windows; errors on noise are not far below its deviation."""
    torch.manual_seed(0)
    module, data = task(relative=relative), data_of(noise)
    runner = bare_trainer(max_epochs=8)
    runner.fit(module, datamodule=data)
    (result,) = runner.test(module, datamodule=data, verbose=False)
    with torch.no_grad():
        error = module(data.test.history) - data.test.target
    assert result["test/mae"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
    assert result["test/rmse"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-5)
    assert result["test/loss"] == pytest.approx((error / module.scale).square().mean().item(), rel=1e-4)
    assert 4.8 < result["test/rmse"] < 6.0 < data.baselines()["naive_rmse"]


def test_intervals_hold_at_their_level(noise):
    """If the test is like the validation, the share of targets in the intervals is the level."""
    torch.manual_seed(0)
    for level in (0.5, 0.9):
        module, data = task(level=level), data_of(noise)
        runner = bare_trainer()
        runner.fit(module, datamodule=data)
        (result,) = runner.test(module, datamodule=data, verbose=False)
        assert result["test/coverage"] == pytest.approx(level, abs=0.03)
        # The intervals are as wide as the errors of the validation.
        with torch.no_grad():
            errors = (module(data.validation.history) - data.validation.target).abs()
        torch.testing.assert_close(module.half_width, conformal_quantile(errors, level), rtol=1e-5, atol=0)


def test_quantile_by_hand():
    """The bound is the ceil((n + 1) level)-th smallest error of each column, and infinite if there are too few."""
    errors = torch.tensor([[4.0, 40.0], [1.0, 10.0], [3.0, 30.0], [2.0, 20.0]])
    assert conformal_quantile(errors, 0.5).tolist() == [3.0, 30.0]
    assert conformal_quantile(errors, 0.8).tolist() == [4.0, 40.0]
    assert conformal_quantile(errors, 0.81).tolist() == [math.inf, math.inf]
    assert conformal_quantile(torch.arange(1.0, 10.0).unsqueeze(1), 0.7).tolist() == [7.0]


def test_relative_forecasts_move_with_the_level():
    """Another level of the whole history moves the forecast by the same amount."""
    module = task()
    history = torch.randn(5, 4, 1, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module(history + 1e9), module(history) + 1e9, rtol=0, atol=1e-5)
        assert not torch.allclose(task(relative=False)(history + 7), task(relative=False)(history) + 7)


def test_checkpoint_forecasts_by_itself(noise, tmp_path):
    """Scale and intervals are in the state dict: a new task that loads it forecasts the same on any data."""
    module, data = task(relative=False), data_of(noise)
    runner = bare_trainer()
    runner.fit(module, datamodule=data)
    runner.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    fresh = task(relative=False)
    fresh.load_state_dict(state)
    center, scale = data.scale()
    assert (fresh.center, fresh.scale) == (center, scale)
    with torch.no_grad():
        for name, values in module.predict_step(data.test.history[:9], 0).items():
            assert torch.equal(values, fresh.predict_step((data.test.history[:9], None), 0)[name]), name


def test_lean_steps_change_nothing(noise):
    """With LeanLoop the weights are the same to the bit."""
    weights = []
    for callbacks in ([], [LeanLoop()]):
        torch.manual_seed(0)
        module = task()
        bare_trainer(*callbacks, max_epochs=2).fit(module, datamodule=data_of(noise))
        assert not callbacks or callbacks[0].unsupported_reason is None
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_wrong_horizon_precision_and_level(noise):
    """A model of another horizon, half precision and a level of 0 or 1 are errors."""
    module = ForecastTask(Affine(4, 2), 3)
    with pytest.raises(ConfigError, match=r"has the shape \(50, 2\), but horizon is 3"):
        bare_trainer(num_sanity_val_steps=0).fit(module, datamodule=data_of(noise))
    with pytest.raises(ConfigError, match="bf16-mixed"):
        bare_trainer(precision="bf16-true").fit(task(), datamodule=data_of(noise))
    with pytest.raises(ConfigError, match="level must be between 0 and 1, got 1"):
        task(level=1)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("level", "change"), [(0, 1e23), (0, 1e40), (0, 1e-31), (0, 1e-60), (2.4e12, 0.2)])
def test_metrics_of_any_units(tmp_path, level, change, relative, lean):
    """Metrics, intervals and recorded forecasts are float64: in other units of the series they have the same digits."""

    def results(level, change):
        torch.manual_seed(0)
        steps = torch.randint(0, 9, (300,), generator=torch.Generator().manual_seed(1)).tolist()
        path = tmp_path / "x.csv"
        path.write_text("x\n" + "\n".join(repr(level + change * step) for step in steps) + "\n")
        module, data = task(relative=relative), data_of(str(path), validation_size=60, test_size=60)
        recorder = TestRecorder()
        runner = bare_trainer(recorder, *([LeanLoop()] if lean else []), max_epochs=2)
        runner.fit(module, datamodule=data)
        validation = {name: value.item() for name, value in runner.callback_metrics.items()}
        (found,) = runner.test(module, datamodule=data, verbose=False)
        recorded = recorder.result()
        widths = (recorded["upper"] - recorded["forecast"]).mean().item()
        error = (recorded["forecast"] - recorded["target"]).abs().mean().item()
        found |= {"width": widths, "error": error}
        scales = {"test/mae": change, "test/rmse": change, "width": change, "error": change}
        kept = {name: value / scales.get(name, 1) for name, value in found.items()}
        return kept | {name: validation[name] / change for name in ("val/mae", "val/rmse")}

    found, expected = results(level, change), results(0, 1)
    # The integers have errors of exactly the width of an interval, which rounding may put on its other side.
    assert found.pop("test/coverage") == pytest.approx(expected.pop("test/coverage"), abs=0.02)
    assert found == pytest.approx(expected, rel=1e-3)
