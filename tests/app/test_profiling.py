"""A profiler is a word, prints the head of its profile, and writes all of it to the run directory."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.profilers import SimpleProfiler
from support.trainers import bare_trainer
from torch.utils.data import DataLoader, TensorDataset

from lightkit.app.profiling import build_profiler, print_profile
from lightkit.errors import ConfigError
from lightkit.tasks import ClassificationTask


@pytest.mark.parametrize(
    ("word", "expected"),
    [("simple", "run_training_batch"), ("advanced", "run_training_batch"), ("pytorch", "aten::")],
)
def test_words(tmp_path, capsys, word, expected):
    """The head of the profile is on standard output, with lines that fit, and the path of the file."""
    trainer = bare_trainer(profiler=build_profiler(word, tmp_path))
    data = TensorDataset(torch.zeros(12, 3), torch.zeros(12, dtype=torch.long))
    trainer.fit(ClassificationTask(torch.nn.Linear(3, 2)), DataLoader(data, batch_size=1))
    capsys.readouterr()
    print_profile(trainer, tmp_path)
    *lines, last = capsys.readouterr().out.splitlines()
    assert any(expected in line for line in lines) and len(lines) <= 25
    assert all(len(line) <= 200 for line in lines)
    assert last.endswith("fit-profile.txt") and expected in (tmp_path / "fit-profile.txt").read_text()
    if word == "simple":
        # The time of each action stands beside its name.
        assert any(line.split()[0] == "run_training_epoch" and len(line.split()) == 5 for line in lines)


def test_other_values(tmp_path, capsys):
    """None measures nothing, a class of the user's keeps its own file, and a misspelt word names the right ones."""
    assert build_profiler(None, tmp_path) is None
    own = build_profiler({"_target_": "lightning.pytorch.profilers.SimpleProfiler", "extended": False}, tmp_path)
    assert isinstance(own, SimpleProfiler) and own.filename is None
    for trainer in (bare_trainer(), bare_trainer(profiler=own), bare_trainer(profiler=build_profiler("simple", "x"))):
        print_profile(trainer, tmp_path)
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="simple, advanced, pytorch or null, got 'simpel'; did you mean simple"):
        build_profiler("simpel", tmp_path)
