"""Traits of strategies: declared, inherited, and those of a strategy that declares none."""

from __future__ import annotations

import warnings

import pytest
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightkit._util.strategy_traits import StepObserver, StrategyTraits, TrafficCounter, traits_of
from lightkit.strategies import DataParallel, DiLoCo, LocalSGD, ParameterServer, TorchTPU


@pytest.mark.parametrize("cls", [DDPStrategy, SingleDeviceStrategy, int])
def test_a_class_without_a_declaration_has_the_default_traits(cls):
    """A strategy of another package promises nothing."""
    assert traits_of(cls) == StrategyTraits(False, False, False)


@pytest.mark.parametrize("cls", [DataParallel, LocalSGD, DiLoCo, TorchTPU])
def test_data_parallel_strategies_support_the_lean_loop(cls):
    """Each of them shards the evaluation and needs all workers."""
    assert traits_of(cls).supports_lean_loop and not traits_of(cls).replicates_evaluation
    assert traits_of(cls).trains_locally == (cls in (LocalSGD, DiLoCo))


def test_an_instance_has_the_traits_of_its_class():
    """The parameter server replicates evaluation and tolerates the loss of workers."""
    assert traits_of(ParameterServer()) == traits_of(ParameterServer) == StrategyTraits(True, True, True)


def test_a_subclass_inherits_all_traits_except_the_lean_loop():
    """An overridden method may change the step: the subclass has to declare the support itself."""

    class Own(ParameterServer):
        pass

    class Declared(ParameterServer):
        traits = StrategyTraits(supports_lean_loop=True)

    assert traits_of(Own) == StrategyTraits(replicates_evaluation=True, tolerates_worker_loss=True)
    assert traits_of(Declared) == StrategyTraits(supports_lean_loop=True)


def test_another_attribute_called_traits_is_ignored():
    """A strategy of another package may use the name for something else."""

    class Own(DDPStrategy):
        traits = ("fast", "small")

    assert traits_of(Own) == StrategyTraits()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("evaluates_everything", "replicates_evaluation"),
        ("survives_lost_workers", "tolerates_worker_loss"),
        ("takes_lean_steps", "supports_lean_loop"),
    ],
)
def test_declarations_of_the_previous_release_count(old, new):
    """A class attribute under the old name still declares the trait, with a warning."""
    cls = type("Own", (DDPStrategy,), {old: True})
    with pytest.warns(DeprecationWarning, match=rf"Own.{old} is deprecated: declare traits = .*{new}=True"):
        assert traits_of(cls) == StrategyTraits(**{new: True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert traits_of(type("Sub", (cls,), {})).supports_lean_loop is False


def test_protocols():
    """The lean loop and the report find the methods by the protocols."""
    assert isinstance(LocalSGD(), StepObserver) and isinstance(LocalSGD(), TrafficCounter)
    assert isinstance(ParameterServer(), TrafficCounter) and not isinstance(ParameterServer(), StepObserver)
    assert not isinstance(DDPStrategy(), (StepObserver, TrafficCounter))
