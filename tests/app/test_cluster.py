"""A process that a user starts trains, whatever a cluster manager's variables say of other processes."""

from __future__ import annotations

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment
from support.commands import the_error
from support.trainers import bare_trainer

from lightkit.app import cluster
from lightkit.errors import ConfigError

TASK = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}
JSRUN = {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/none", "JSM_NAMESPACE_LOCAL_RANK": "0", "JSM_NAMESPACE_RANK": "0"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def variables(monkeypatch):
    def set_all(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("values", "is_plain"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "1"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", **TASK}, True),
        ({"SLURM_NTASKS": "1", **TASK}, False),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, True),
        ({"JSM_NAMESPACE_SIZE": "1", **JSRUN}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "127.0.0.1"}, False),
        ({"SLURM_NTASKS": "4", **TORCHRUN}, False),
    ],
)
def test_one_process(variables, values, is_plain):
    """The Trainer takes one process for one; a task of SLURM keeps what requeues it, and so do torchrun's."""
    variables(values)
    plugins = cluster.plugins()
    assert [type(plugin) for plugin in plugins] == ([LightningEnvironment] if is_plain else [])
    if "RANK" not in values:
        assert bare_trainer(plugins=plugins, devices=1).world_size == 1


def test_several_devices_in_one_task(variables):
    """SLURM's single task may start a process for each device, which Lightning's own environment would reject."""
    variables({"SLURM_NTASKS": "1", **TASK})
    assert cluster.plugins(1) == [] and len(cluster.plugins(2)) == 1


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_in_the_shell_of_an_allocation(call, variables, tmp_path, command):
    """The variables of SLURM's interactive shell change nothing."""
    arguments = ["+experiment=cnn", "+debug=quick", "hydra.run.dir=out", "logger=none"]
    if command == "train":
        variables({"SLURM_NTASKS": "4"})
    assert call("train", *arguments, cwd=tmp_path).returncode == 0
    if command == "evaluate":
        variables({"SLURM_NTASKS": "4"})
        assert call("evaluate", "ckpt_path=out/checkpoints/best.ckpt", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("values", "arguments", "expected"),
    [
        ({"WORLD_SIZE": "4"}, [], "WORLD_SIZE=4 in the environment, but no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, [], "but no LOCAL_RANK: start the"),
        (
            {"SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "3"},
            ["trainer.devices=2", "strategy=ddp", "trainer.accelerator=cpu"],
            "SLURM_STEP_NUM_TASKS=3: srun has started this command 3 times, and each of them would start 2 processes",
        ),
    ],
)
def test_variables_that_ask_for_other_processes(call, variables, tmp_path, values, arguments, expected):
    """The error names the variable and says how the processes are started."""
    variables(values)
    assert expected in the_error(call("train", "+experiment=cnn", *arguments, cwd=tmp_path))


def test_torchruns_variables_are_complete(variables):
    """A process of torchrun is accepted."""
    variables(TORCHRUN)
    cluster.check_world_size()
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_SIZE=2: mpirun has started"):
        variables({"OMPI_COMM_WORLD_SIZE": "2"})
        cluster.check_single_start(2)
