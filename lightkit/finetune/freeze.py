"""A callback that freezes parameters, and unfreezes them at the beginning of given epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightkit._lightning.ddp import wrap_anew
from lightkit._util.printable import printable
from lightkit._util.strategy_traits import StrategyTraits, traits_of
from lightkit.errors import ConfigError
from lightkit.finetune.patterns import common_prefix, match, to_patterns


class Freeze(Callback):
    """Freezes parameters of any LightningModule: ``Trainer(callbacks=[Freeze("features.*", {2: "features.*"})])``.

    A frozen parameter has no gradient (``requires_grad`` is False), so that optimizers neither step nor decay it, and
    its momentum begins with its first step. A module all of whose parameters are frozen is in evaluation mode: its
    batch norms keep their running statistics, and its dropout is off. Lightning's ``BaseFinetuning`` leaves batch norms
    in training mode; here the frozen part computes what it computes in a validation.

    Parameters that are never unfrozen are frozen before the optimizers are made. Those that are unfrozen later belong
    to the optimizers from the start, which then resume with the same groups in any epoch. A training that resumes has
    the state of its epoch. With data parallel training the callback wraps the module anew when parameters are unfrozen.

    Args:
        patterns: patterns of parameters or modules to freeze, such as ``features.*``, ``features`` or ``*.bias``: see
            `lightkit.finetune.patterns.match`. A name may leave out the first part that all names have in common, such
            as ``model.``.
        unfreeze: patterns to unfreeze by the number of epochs, at least 1, after which this happens; None for none.

    Raises:
        ConfigError: an argument has a wrong type; at the start of a training, a pattern matches nothing or nothing that
            is frozen, no parameter is left to train, or an optimizer lacks a parameter.
    """

    def __init__(
        self, patterns: Sequence[str] | str, unfreeze: Mapping[int, Sequence[str] | str] | None = None
    ) -> None:
        self._patterns = to_patterns(patterns, "freeze")
        self._schedule = _to_schedule(unfreeze)
        if not self._patterns:
            raise ConfigError(
                "freeze names nothing to freeze" + (", so that unfreeze has no effect" if unfreeze else "")
            )
        # The parameters that this callback may freeze, and the epoch in which each is unfrozen (None: never), by name.
        self._epochs: dict[str, int | None] = {}
        # The modules that this callback has put into evaluation mode.
        self._evaluating: list[nn.Module] = []
        self._is_changed = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freezes the parameters that stay frozen, before the optimizers are made.

        A module may create its layers later, in its own ``setup``: `on_fit_start` rejects a pattern without a match.
        """
        if stage != "fit":
            return
        self._is_changed = False
        self._evaluating = []
        try:
            self._find(pl_module)
        except ConfigError:
            self._epochs = {}
        self._set(pl_module, {name for name, epoch in self._epochs.items() if epoch is None})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freezes all parameters, after the optimizers are made."""
        self._find(pl_module)
        self._check(trainer, pl_module)
        self._is_changed = self._set(pl_module, set(self._epochs))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the state of the epoch in which the training begins."""
        self._apply(trainer, pl_module)
        frozen = self._frozen(trainer.current_epoch)
        counts = {name: p.numel() for name, p in pl_module.named_parameters()}
        if not any(p.requires_grad for p in pl_module.parameters()):
            raise ConfigError(f"freeze leaves no parameter to train in epoch {trainer.current_epoch}")
        if frozen and trainer.is_global_zero:
            numbers = sum(counts[name] for name in frozen), sum(counts.values())
            print(f"frozen: {numbers[0]:,} of {numbers[1]:,} parameters", flush=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Unfreezes the parameters whose epoch begins."""
        begun = [name for name, epoch in self._epochs.items() if epoch == trainer.current_epoch]
        self._apply(trainer, pl_module)
        if begun and trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch + 1}: {len(begun)} tensors unfrozen", flush=True)

    def _find(self, pl_module: pl.LightningModule) -> None:
        """Finds the parameters that the patterns mean."""
        names = [name for name, _ in pl_module.named_parameters()]
        prefix = common_prefix(names)
        self._epochs = dict.fromkeys(sorted(match(self._patterns, names, "freeze", prefix)))
        for epoch, patterns in self._schedule.items():
            for pattern in patterns:
                matched = match([pattern], names, f"unfreeze after epoch {epoch}", prefix) & self._epochs.keys()
                if not matched:
                    raise ConfigError(f"unfreeze after epoch {epoch}: {pattern!r} matches nothing that is frozen")
                self._epochs |= {name: epoch for name in matched if self._epochs[name] is None}

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rejects parameters to unfreeze that no optimizer has, and strategies that shard or wrap parameters."""
        later = {name: epoch for name, epoch in self._epochs.items() if epoch is not None}
        if not later:
            return
        strategy = trainer.strategy
        is_known = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or traits_of(strategy) != StrategyTraits()
        if not is_known:
            raise ConfigError(
                f"unfreeze: {type(strategy).__name__} may not notice that parameters are trained from some epoch on; "
                "use one device, DDPStrategy or a strategy of lightkit"
            )
        optimized = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        parameters = dict(pl_module.named_parameters())
        if lacking := [name for name in later if id(parameters[name]) not in optimized]:
            raise ConfigError(
                f"unfreeze: {printable(lacking[0])} is in no optimizer; configure_optimizers must pass the parameters "
                "that are trained later, too"
            )
        epochs = trainer.max_epochs
        if epochs is not None and epochs != -1 and (beyond := [epoch for epoch in later.values() if epoch >= epochs]):
            rank_zero_warn(f"unfreeze={{{beyond[0]}: ...}} has no effect: the training ends after {epochs} epochs")

    def _frozen(self, epoch: int) -> set[str]:
        return {name for name, begin in self._epochs.items() if begin is None or begin > epoch}

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives parameters and modules the state of the present epoch."""
        frozen = self._frozen(trainer.current_epoch)
        self._is_changed |= self._set(pl_module, frozen)
        self._set_modes(pl_module, frozen)
        if self._is_changed:
            wrap_anew(trainer)
        self._is_changed = False

    def _set(self, pl_module: pl.LightningModule, frozen: set[str]) -> bool:
        """Freezes the parameters ``frozen`` and unfreezes the others of this callback; returns True if one changes."""
        is_changed = False
        for name, parameter in pl_module.named_parameters():
            if name in self._epochs and (name in frozen) == parameter.requires_grad:
                parameter.requires_grad_(name not in frozen)
                parameter.grad = None
                is_changed = True
        return is_changed

    def _set_modes(self, pl_module: pl.LightningModule, frozen: set[str]) -> None:
        """Puts the modules all of whose parameters are frozen into evaluation mode, and the others back."""
        ids = {id(p) for name, p in pl_module.named_parameters() if name in frozen}
        evaluating: dict[nn.Module, None] = {}
        for module in pl_module.modules():
            own = list(module.parameters())
            if own and all(id(p) in ids for p in own):
                evaluating |= dict.fromkeys(module.modules())
        for module in self._evaluating:
            if module not in evaluating:
                module.training = True
        # A module that was in evaluation mode before stays there.
        self._evaluating = [m for m in evaluating if m.training or m in self._evaluating]
        for module in self._evaluating:
            module.training = False


def _to_schedule(unfreeze: Any) -> dict[int, list[str]]:
    """Returns the patterns by epoch, in the order of the epochs; a number may be a text, as JSON has it."""
    if unfreeze is None:
        return {}
    if not isinstance(unfreeze, Mapping):
        raise ConfigError(f"unfreeze must have patterns by epoch, such as {{3: [features.*]}}, got {unfreeze!r}")
    schedule: dict[int, list[str]] = {}
    for key, value in unfreeze.items():
        epoch = int(key) if isinstance(key, str) and key.isdecimal() else key
        if type(epoch) is not int or epoch < 1:
            raise ConfigError(f"unfreeze must have numbers of finished epochs, at least 1, got {key!r}")
        schedule[epoch] = to_patterns(value, f"unfreeze after epoch {epoch}")
    return dict(sorted(schedule.items()))
