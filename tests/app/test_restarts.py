"""The record of a job across restarts, and the detection of a lost process."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch.distributed import HashStore

from lightkit.app.restarts import Restarts
from lightkit.errors import CheckpointError, ConfigError
from lightkit.runtime import keepalive
from lightkit.runtime.restart_record import DIRECTORY


@pytest.fixture
def torchrun(tmp_path, monkeypatch):
    """Returns a function that sets torchrun's variables and returns the `Restarts` of a new process in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def set_variables(run_id="job", count=0, most=3, nodes=1, arguments=("+experiment=cnn",)):
        variables = {
            "TORCHELASTIC_RUN_ID": run_id,
            "TORCHELASTIC_RESTART_COUNT": str(count),
            "TORCHELASTIC_MAX_RESTARTS": str(most),
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "GROUP_WORLD_SIZE": str(nodes),
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.argv", ["train", *arguments])
        return Restarts()

    return set_variables


def config_in(directory):
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    return OmegaConf.create({"run_dir": str(directory), "ckpt_path": None})


def test_a_first_start_changes_nothing(torchrun, tmp_path):
    """The first start adds no argument and searches no checkpoint."""
    restarts, config = torchrun(), config_in(tmp_path / "run")
    assert restarts.arguments() == ["+experiment=cnn"]
    assert restarts.begin(config) and config.ckpt_path is None


@pytest.mark.parametrize("count", [0, 2])
def test_goes_on_in_the_same_directory(torchrun, tmp_path, capsys, count):
    """The id identifies the job even if torchrun counts no restart, as when a machine joins or after a requeue."""
    run = tmp_path / "a run, 'x'=1 \\ \u00e9 \\\n"
    torchrun().begin(config_in(run))
    (run / "checkpoints" / "last.ckpt").touch()
    restarts, config = torchrun(count=count), config_in(run)
    *_, added = restarts.arguments()
    (override,) = OverridesParser.create().parse_overrides([added])
    assert (override.key_or_group, override.value()) == ("hydra.run.dir", str(run))
    assert restarts.begin(config)
    assert config.ckpt_path == str(run / "checkpoints" / "last.ckpt")
    assert capsys.readouterr().out == f"continuing {config.ckpt_path}\n"


def test_another_job_of_the_same_id(torchrun, tmp_path):
    """A job with other arguments begins anew, and the first job's restart then raises an error."""
    first = torchrun()
    first.begin(config_in(tmp_path / "run"))
    assert len(torchrun().arguments()) == 2
    assert len(torchrun(arguments=["+experiment=rnn"]).arguments()) == 1
    # The other job's record has replaced the first one's; a restart of the first job must not resume the other's run.
    torchrun(arguments=["+experiment=rnn"]).begin(config_in(tmp_path / "other"))
    with pytest.raises(ConfigError, match="another job uses --rdzv-id=job too, with the arguments"):
        torchrun(count=1)


@pytest.mark.parametrize("arguments", [["+experiment=cnn"], ["+experiment=rnn"]])
def test_a_finished_job_of_the_same_id(torchrun, tmp_path, arguments):
    """A restarted job that failed before it had a run ignores the record of a finished job with the same id."""
    first = torchrun()
    first.begin(config_in(tmp_path / "run"))
    first.finish()
    torchrun(arguments=arguments)
    again = torchrun(count=1, arguments=arguments)
    assert again.arguments() == arguments and again.begin(config_in(tmp_path / "another"))


def test_a_job_without_an_id(torchrun, tmp_path):
    """Without an id, as torchrun starts a job on one machine, only a counted restart resumes the run."""
    torchrun(run_id="none").begin(config_in(tmp_path / "run"))
    assert len(torchrun(run_id="other", count=1).arguments()) == 1
    assert len(torchrun(run_id="none", count=1).arguments()) == 2
    assert len(torchrun(run_id="none").arguments()) == 1


def test_done_runs_stay_done(torchrun, tmp_path, capsys):
    """After a restart a sweep does not repeat its finished runs and has their objectives."""
    restarts, config = torchrun(), config_in(tmp_path / "0")
    restarts.begin(config)
    restarts.end(0.25)
    again = torchrun(count=1)
    assert not again.begin(config) and again.result() == 0.25
    assert "done before the restart" in capsys.readouterr().out
    restarts.finish()
    assert torchrun(count=1).arguments() is None
    assert "done before the restart" in capsys.readouterr().out


@pytest.mark.parametrize("is_done", [False, True])
def test_other_parameters_begin_anew(torchrun, tmp_path, monkeypatch, is_done):
    """A run with other overrides in the same directory takes neither the result nor the checkpoints of the earlier one.

    A sampler without a seed proposes other parameters after a restart.
    """
    from lightkit.app import restarts as module

    run = tmp_path / "0"
    monkeypatch.setattr(module, "overrides_of_run", lambda: ["optim.lr=0.1"])
    restarts, config = torchrun(), config_in(run)
    older = run / "pretrained" / "older.ckpt"
    older.parent.mkdir()
    older.touch()
    restarts.begin(config)
    newer = run / "checkpoints" / "best.ckpt"
    newer.touch()
    if is_done:
        restarts.end(0.25)
    monkeypatch.setattr(module, "overrides_of_run", lambda: ["optim.lr=0.2"])
    again = torchrun(count=1)
    assert again.begin(config) and config.ckpt_path is None and again.result() is None
    # The job must not remove the checkpoints of another job.
    assert older.exists() and not newer.exists()
    # The record now has the new parameters.
    assert torchrun(count=2).begin(config)


@pytest.mark.parametrize("checkpoint", [None, "elsewhere.ckpt"])
def test_the_run_of_another_job_stays(torchrun, tmp_path, checkpoint):
    """A job of a sweep whose directory holds a run of an earlier sweep writes nothing there."""
    run = tmp_path / "0"
    config = config_in(run)
    (run / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    config.ckpt_path = checkpoint
    with pytest.raises(ConfigError, match=r"run_dir=0 holds another run already \(checkpoints/best\.ckpt\)"):
        torchrun().begin(config)
    assert [path.name for path in run.rglob("*") if path.is_file()] == ["best.ckpt"]
    config.ckpt_path = str(run / "checkpoints" / "best.ckpt")
    assert torchrun().begin(config)


def test_half_written_checkpoints_are_removed(torchrun, tmp_path):
    """A restart removes unfinished checkpoint files, whose names differ each time."""
    run = tmp_path / "run"
    torchrun().begin(config_in(run))
    for name in ("last.ckpt", ".best.ckpt.sf4l308q", ".hidden.ckpt"):
        (run / "checkpoints" / name).touch()
    torchrun(count=1).begin(config_in(run))
    assert sorted(os.listdir(run / "checkpoints")) == [".hidden.ckpt", "last.ckpt"]


def test_an_unknown_run_is_not_passed_over(torchrun, tmp_path, capsys):
    """A restart that finds no run prints a message, since its directory may not be shared."""
    assert torchrun(count=1).begin(config_in(tmp_path / "run"))
    assert "finds no run of this job below" in capsys.readouterr().err


def test_a_damaged_record(torchrun):
    """The error has the name of the damaged file."""
    DIRECTORY.mkdir(parents=True)
    (DIRECTORY / "job.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"job\.json, which says what this job did .* is damaged"):
        torchrun()


def test_ids_of_any_kind(torchrun, tmp_path):
    """Any id becomes a file name; different ids become different names."""
    for run_id in ("../../x", "a/b", "a_b", "x" * 300):
        torchrun(run_id=run_id).begin(config_in(tmp_path / "run"))
    assert len(list(DIRECTORY.iterdir())) == 4


def test_several_machines_need_an_id(torchrun):
    """The job rejects a missing id at its start, not at its first restart."""
    with pytest.raises(ConfigError, match="restarts need --rdzv-id=NAME"):
        torchrun(run_id="none", nodes=2)
    torchrun(run_id="none", nodes=2, most=0)


@pytest.fixture
def lines(monkeypatch):
    """Returns the `Keepalive` of ranks 0 and 1, the list of lost ranks, and the store."""
    given_up = []
    monkeypatch.setattr(keepalive, "_give_up", given_up.append)
    store = HashStore()
    return keepalive.Keepalive(store, 0, "127.0.0.1"), keepalive.Keepalive(store, 1, "127.0.0.1"), given_up, store


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_lost_process_is_noticed(lines):
    """Both sides give up when a connection ends without a goodbye."""
    first, second, given_up, _ = lines
    assert wait_for(lambda: first._connections)
    second._connections[0].shutdown(socket.SHUT_RDWR)
    assert wait_for(lambda: sorted(given_up) == [0, 1])


def test_an_orderly_end_is_no_loss(lines):
    """Nobody gives up after both sides released their connections."""
    first, second, given_up, _ = lines
    assert wait_for(lambda: first._connections)
    second.release()
    first.release()
    second._connections[0].shutdown(socket.SHUT_RDWR)
    time.sleep(0.3)
    assert given_up == []


def test_strangers_are_not_missed(lines):
    """A foreign connection to the port that closes again is no lost process."""
    import json

    first, _, given_up, store = lines
    port, _ = json.loads(store.get("keepalive"))
    for said in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\xff\xfe\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(said)
    time.sleep(0.3)
    assert given_up == [] and len(first._connections) == 1


def test_giving_up_ends_the_process():
    """Giving up ends the process while the main thread waits."""
    pid = os.fork()
    if pid == 0:
        os.environ["RANK"] = "1"
        keepalive._GRACE = 0.0
        threading.Thread(target=keepalive._give_up, args=(0,), daemon=True).start()
        threading.Event().wait()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 1
