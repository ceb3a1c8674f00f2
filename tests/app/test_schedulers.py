"""The keys of the group `scheduler` become a schedule, and defaults that were written out change nothing."""

from __future__ import annotations

import pytest

from lightkit.app.schedulers import build_scheduler, settings
from lightkit.errors import ConfigError

STEP = {"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "step_size": 2}
COSINE = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "_partial_": True, "T_max": None}


def test_keys():
    """The three keys reach the schedule and not the class; null stands for the default."""
    schedule = build_scheduler({**STEP, "interval": "step", "frequency": 3, "monitor": None})
    assert schedule is not None
    assert (schedule.interval, schedule.frequency, schedule.monitor) == ("step", 3, "val/loss")
    assert schedule.make.keywords == {"step_size": 2}
    with pytest.raises(ConfigError, match=r"scheduler\.interval must be epoch or step, got 'batch'"):
        build_scheduler({**STEP, "interval": "batch"})


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        # A checkpoint of an earlier release has none of the keys.
        ({**STEP, "interval": "epoch", "frequency": 1, "monitor": "val/loss"}, STEP, True),
        ({**COSINE, "interval": None, "frequency": 1}, COSINE, True),
        ({**STEP, "interval": "step"}, STEP, False),
        ({**STEP, "frequency": 2}, STEP, False),
        # Of a schedule without a length, null may mean steps.
        ({**COSINE, "interval": "epoch"}, COSINE, False),
    ],
)
def test_settings(mine, theirs, same):
    """Configurations of the same schedule have the same settings."""
    assert (settings(mine) == settings(theirs)) == same
