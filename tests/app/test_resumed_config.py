"""A resumed job has the settings of its command line, else those of the checkpoint, and nothing else of it."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from lightkit.app.resumed_config import check_optimizer, saved_config, take_settings
from lightkit.errors import CheckpointError

ADAM = {"_target_": "lightkit.optim.Adam", "_partial_": True, "lr": 0.001, "betas": [0.9, 0.999]}
COSINE = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "_partial_": True, "T_max": None, "eta_min": 0.0}
NONE = {"_target_": None}


def config(**sections):
    whole = {"optim": ADAM, "scheduler": NONE, "trainer": {"max_epochs": 5}, "strategy": NONE, "callbacks": {}}
    return OmegaConf.create({**whole, **sections}, flags={"struct": True})


@pytest.fixture
def resume(tmp_path):
    """Returns a function that resumes from a checkpoint of a configuration and returns the resulting configuration."""

    def run(saved, mine, *overrides):
        path = tmp_path / "a.ckpt"
        torch.save({"state_dict": {}, "lightkit_config": OmegaConf.to_container(saved)}, path)
        changed = take_settings([mine], path, overrides)
        assert changed is not None
        return OmegaConf.to_container(mine, resolve=True)

    return run


def test_not_given(resume, capsys):
    """What the command line leaves out is the checkpoint's, with a line that says so."""
    saved = config(optim={**ADAM, "lr": 0.01, "amsgrad": True}, scheduler=COSINE)
    found = resume(saved, config(), "trainer.max_epochs=7", "data.batch_size=3")
    assert found["optim"] == {**ADAM, "lr": 0.01, "amsgrad": True} and found["scheduler"] == COSINE
    assert found["trainer"] == {"max_epochs": 5}
    line = (
        "from the checkpoint: optim.lr=0.01, optim.amsgrad=True, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR"
    )
    assert capsys.readouterr().out.splitlines() == [line]


@pytest.mark.parametrize(
    ("overrides", "taken"),
    [
        (["optim.lr=0.5"], {"betas": [0.8, 0.9]}),
        (["++optim.lr=0.5", "optim.betas=[0.1,0.2]"], {}),
        # The choice of a group gives all of its keys.
        (["optim=adam"], {}),
        (["optim@optim=adam"], {}),
        (["~optim.lr"], {"betas": [0.8, 0.9]}),
        # Another key with the same beginning.
        (["optim.lr_of_another=1"], {"lr": 0.01, "betas": [0.8, 0.9]}),
    ],
)
def test_given(resume, overrides, taken):
    """What the command line gives counts, in every form of Hydra's overrides."""
    found = resume(config(optim={**ADAM, "lr": 0.01, "betas": [0.8, 0.9]}), config(), *overrides)
    assert found["optim"] == {**ADAM, **taken}


def test_average_by_a_callback(resume):
    """callbacks=[default,ema] sets optim.ema_decay, as the command line says; without it the checkpoint decides."""
    mine = {**ADAM, "ema_decay": 0.999}
    saved = config(optim={**ADAM, "ema_decay": None})
    assert resume(saved, config(optim=mine), "callbacks=[default,ema]")["optim"]["ema_decay"] == 0.999
    assert resume(saved, config(optim=mine), "callbacks=[default,swa]")["optim"]["ema_decay"] is None
    assert resume(config(optim=mine), config(optim=ADAM))["optim"]["ema_decay"] == 0.999


def test_early_stopping(resume):
    """What early stopping counts as an improvement is the checkpoint's, unless it is given."""
    nodes = [
        {"early_stopping": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "patience": n, "min_delta": d}}
        for n, d in ((7, 0.5), (3, 0.0))
    ]
    saved, mine = (config(callbacks=node) for node in nodes)
    # The list of the callbacks must be given again, and gives no values.
    found = resume(saved, mine, "callbacks.early_stopping.patience=3", "callbacks=[default,early_stopping]")
    assert found["callbacks"]["early_stopping"]["min_delta"] == 0.5
    assert found["callbacks"]["early_stopping"]["patience"] == 3


def test_schedule(resume):
    """A schedule that follows from other settings goes on to do so; one that was chosen stays."""
    first_edition = config(scheduler={**COSINE, "T_max": 5})
    assert resume(first_edition, config(scheduler=COSINE))["scheduler"]["T_max"] is None
    interpolated = config(scheduler={**COSINE, "T_max": "${trainer.max_epochs}"}, trainer={"max_epochs": 9})
    assert resume(config(scheduler={**COSINE, "T_max": 5}), interpolated)["scheduler"]["T_max"] == 9
    assert resume(config(scheduler={**COSINE, "T_max": 3}), config(scheduler=COSINE))["scheduler"]["T_max"] == 3
    assert resume(config(scheduler=COSINE), config(), "scheduler=none")["scheduler"] == NONE
    # A single key of a schedule that the checkpoint chooses.
    mine = config(scheduler={**NONE, "eta_min": 0.1})
    assert resume(config(scheduler=COSINE), mine, "+scheduler.eta_min=0.1")["scheduler"] == {**COSINE, "eta_min": 0.1}


def test_single_keys_of_other_groups(resume):
    """Of strategies and callbacks only what their states hold is taken, and only by the same class."""
    diloco = {"_target_": "lightkit.strategies.DiLoCo", "period": 4, "outer_lr": 0.5, "outer_momentum": 0.1}
    early = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "patience": 9}
    saved = config(strategy=diloco, callbacks={"early": early})
    mine = config(
        strategy={**diloco, "period": 16, "outer_lr": 0.7, "outer_momentum": 0.9},
        callbacks={"early": {**early, "monitor": "val/mae", "patience": 3}},
    )
    found = resume(saved, mine, "strategy.outer_lr=0.7")
    assert found["strategy"] == {**diloco, "period": 16, "outer_lr": 0.7, "outer_momentum": 0.1}
    assert found["callbacks"]["early"] == {**early, "monitor": "val/mae"}
    other = config(strategy={**diloco, "_target_": "lightkit.strategies.Other", "outer_lr": 0.7})
    assert resume(saved, other)["strategy"]["outer_lr"] == 0.7


@pytest.mark.parametrize(
    "value", ["${oc.env:HOME}", ["${oc.env:HOME}"], {"_target_": "pathlib.Path"}, {"a": "${optim.lr}"}]
)
def test_a_strangers_values_are_plain(resume, value):
    """An interpolation or an object in a stranger's checkpoint does not enter the configuration."""
    found = resume(config(optim={**ADAM, "lr": value, "extra": value}), config())
    assert found["optim"] == ADAM
    found = resume(config(scheduler={**COSINE, "extra": value}), config())
    assert found["scheduler"] == COSINE


@pytest.mark.parametrize("section", ["optim", "scheduler"])
@pytest.mark.parametrize(
    "target", ["os.system", "lightning.pytorch.Trainer", "torch.optim.swa_utils.x.y", "torch.load"]
)
def test_a_strangers_classes(resume, section, target):
    """A checkpoint may name optimizers and schedulers alone."""
    with pytest.raises(CheckpointError, match=f"^the checkpoint names '{target}' in {section}, which is no class of"):
        resume(config(**{section: {"_target_": target}}), config())


def test_no_configuration(resume, tmp_path):
    """A checkpoint of another program has no settings to take."""
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    assert not take_settings([config()], tmp_path / "a.ckpt", [])
    assert saved_config({"lightkit_config": ["x"]}) == {}
    assert saved_config({"lightkit_config": {"optim": "x"}})["optim"] == {}


@pytest.mark.parametrize(
    ("mine", "theirs", "is_same"),
    [
        ("lightkit.optim.Adam", "lightkit.optim.AdamW", True),
        ("torch.optim.AdamW", "lightkit.optim.Adam", True),
        ("torch.optim.SGD", "lightkit.optim.SGD", True),
        ("lightkit.optim.SGD", "lightkit.optim.Adam", False),
        ("torch.optim.RMSprop", "lightkit.optim.Adam", False),
        # A class that this program does not have.
        ("lightkit.optim.Adam", "elsewhere.Adam", False),
    ],
)
def test_algorithm(mine, theirs, is_same):
    """An optimizer goes on from the states of its own algorithm, and one line refuses others."""
    configs = {"optim": {"_target_": mine}}, {"optim": {"_target_": theirs}}
    if is_same:
        check_optimizer(*configs, "a.ckpt")
        return
    with pytest.raises(CheckpointError, match=r"cannot go on with the states in a.ckpt, which are those of \w+: leave"):
        check_optimizer(*configs, "a.ckpt")
