"""The values ``optim.lr=auto`` and ``data.batch_size=auto``, which a search replaces before a job is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf, read_write

from lightkit import native
from lightkit.app import factory, run_records, run_search, untrusted
from lightkit.app.checks import lightning_errors_as_config_errors
from lightkit.app.model_sizes import fill
from lightkit.app.texts import escape_interpolations
from lightkit.checkpoints import CONFIG_KEY, load_checkpoint
from lightkit.config import to_plain
from lightkit.errors import CheckpointError, ConfigError
from lightkit.runtime.environment import is_under_torchrun, world_size
from lightkit.tuning import find_batch_size, find_learning_rate

_AUTO = "auto"
_RATE, _SIZE = "optim.lr", "data.batch_size"

# The keys that may be auto, in the order of the searches: the learning rate depends on the batch size.
_KEYS = (_SIZE, _RATE)

# The learning rate of the first step of the range test, and of the trials of batch sizes.
_MIN_RATE = 1e-6

# The arguments of the trainer that matter to a search.
_TRAINER_ARGUMENTS = (
    *("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches"),
    *("limit_train_batches", "overfit_batches", "deterministic", "benchmark"),
)


def resolve(config: DictConfig) -> None:
    """Replaces each ``auto`` in a configuration by a number, and prints the number.

    A resumed job takes the number from its checkpoint. Otherwise the function searches: it builds data and tasks of its
    own, so that the job itself is built anew afterwards, with the seeds of the configuration.

    Args:
        config: the configuration of the job, which the function changes; `lightkit.app.checks.check` has accepted it.

    Raises:
        ConfigError: a search finds no value, or the job has several processes.
        CheckpointError: the checkpoint to resume from cannot be read, or has no such number.
    """
    wanted = [key for key in _KEYS if OmegaConf.select(config, key) == _AUTO]
    if not wanted:
        return
    if config.ckpt_path is not None:
        found = _from_checkpoint(config, wanted)
    else:
        if is_under_torchrun() and world_size() > 1:
            raise ConfigError(
                f"{wanted[0]}=auto searches in one process, and the job has {world_size()}: search with "
                f"trainer.devices=1, and set {wanted[0]} here to the number that the search prints"
            )
        # The trials run on the kernels of the job.
        native.load()
        found = _search(config, wanted)
    for key, value in found.items():
        _set(config, key, value)


def _from_checkpoint(config: DictConfig, wanted: list[str]) -> dict[str, Any]:
    if config.ckpt_path == "last":
        # Only a program that calls `train` itself comes here: see `lightkit.app.resume`. The search compares the
        # configuration with `auto` in it.
        _set(config, "ckpt_path", str(run_search.find_last(run_records.describe(config), config.name)))
    path = Path(config.ckpt_path)
    saved = load_checkpoint(path, map_location="meta", untrusted=True).get(CONFIG_KEY)
    untrusted.check_plain(saved)
    found = {}
    for key in wanted:
        section, _, name = key.partition(".")
        node = saved.get(section) if isinstance(saved, dict) else None
        value: Any = node.get(name) if isinstance(node, dict) else None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not value > 0:
            raise CheckpointError(f"{path} has no number for {key}=auto: set {key} to a number")
        found[key] = value
        print(f"from the checkpoint: {key}={value}", flush=True)
    return found


def _search(config: DictConfig, wanted: list[str]) -> dict[str, Any]:
    trial = DictConfig(escape_interpolations(to_plain(config)))
    trial.scheduler = {"_target_": None}
    found: dict[str, Any] = {}
    if _RATE in wanted:
        trial.optim.lr = _MIN_RATE
    if _SIZE in wanted:
        trial.data.batch_size = 1
    arguments = to_plain(config.trainer)
    options = {name: arguments[name] for name in _TRAINER_ARGUMENTS if name in arguments}
    data = factory.build_data(trial)
    trial = fill(trial, data)
    factory.fill_class_counts(trial, data)

    def make_module() -> pl.LightningModule:
        pl.seed_everything(config.seed, workers=True, verbose=False)
        return factory.build_task(trial)

    with lightning_errors_as_config_errors():
        if _SIZE in wanted:
            size = find_batch_size(make_module, data, **options)
            found[_SIZE] = trial.data.batch_size = size.batch_size
            print(f"{_SIZE}={size.batch_size}: {size.reason}", flush=True)
            data = factory.build_data(trial)
        if _RATE in wanted:
            rate = find_learning_rate(make_module, data, min_lr=_MIN_RATE, **options)
            found[_RATE] = rate.lr
            print(
                f"{_RATE}={rate.lr}: a tenth of the rate with the lowest loss, of {len(rate.rates)} from "
                f"{rate.rates[0]:.0e} to {rate.rates[-1]:.2g}",
                flush=True,
            )
    return found


def _set(config: DictConfig, key: str, value: Any) -> None:
    with read_write(config):
        OmegaConf.update(config, key, value)
