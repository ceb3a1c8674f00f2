"""The processes of a job: all train with one resolved configuration, whoever started them.

A job of several devices is led by the process that composed its configuration. It starts one process a device, each
the same command without arguments, and watches them; torchrun's own processes are led by that of rank 0. The others
run no Hydra: a sweep is not run again in them, and a time in a directory's name is not asked for twice. What is started
again goes on with the run that it had begun: see `lightkit.app.resume`.
"""

from __future__ import annotations

import json
import logging.config
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from lightkit._util.strategy_traits import traits_of
from lightkit.app.log_filters import quiet_lightning
from lightkit.app.resume import Restarts
from lightkit.config import find_class
from lightkit.errors import ConfigError, LightkitError
from lightkit.runtime.keepalive import Lifeline

# Set for processes that are started from here; not for those that these may start in turn.
_STARTED = "LIGHTKIT_STARTED"
_is_started = os.environ.pop(_STARTED, None) is not None

# Seconds that the others are given to say what they died of, when one has ended in an error.
_GRACE = 1.0

# Seconds for putting things in order after Ctrl-C; what is on the disk is whole at any time.
_ORDER = 8.0

# Seconds for the batch at hand after SIGTERM: whoever sends it kills after 30, as SLURM and Kubernetes do.
_BATCH = 25.0

# Jobs may take their time.
_FOREVER = timedelta(days=365)


def is_started() -> bool:
    """Whether this process was started from here, and its errors are told by the one that did."""
    return _is_started


def follows() -> bool:
    """Whether this process trains with the configuration of another."""
    return is_started() or (is_under_torchrun() and os.environ["RANK"] != "0")


def lead(function: Callable[[DictConfig], Any], config: DictConfig, command: list[str]) -> Any:
    """Runs a job in as many processes as its configuration asks for, or torchrun has started.

    Args:
        function: runs the job in one process; under torchrun all of them call it.
        config: of the job.
        command: starts a further process of the program, which must come to `follow`.

    Returns:
        What the function returned: here, or in the process of rank 0, whose result must be made of JSON's types.

    Raises:
        LightkitError: what went wrong in one of the processes; the others have been ended.
    """
    unresolved = config
    if is_under_torchrun():
        config = with_torchruns_processes(config)
    restarts = _restarts()
    if not restarts.begin(config, unresolved):
        return restarts.result(config)
    # Hydra's sweepers draw from it too, what is next after a job that was done before being what was next after it.
    state = random.getstate()
    try:
        result = _run(function, config, command)
        restarts.end(config, result)
    finally:
        random.setstate(state)
        restarts.leave()
    return result


def _run(function: Callable[[DictConfig], Any], config: DictConfig, command: list[str]) -> Any:
    if is_under_torchrun():
        _publish(_torchrun_store(), config)
        return function(config)
    if (count := count_processes(config)) > 1:
        return _start_and_watch(config, count, command)
    return function(config)


def restarted_directory() -> str | None:
    """Returns Hydra's directory of the job that torchrun has started again; None if it has not."""
    return _restarts().directory() if is_under_torchrun() else None


def command_line() -> list[str] | None:
    """The arguments for the process that leads; after a restart by torchrun, with the directory of the run begun.

    None where nothing was left to do before the restart.

    Raises:
        LightkitError: torchrun was started so that a restart could not work.
    """
    return _restarts().arguments() if is_under_torchrun() else sys.argv[1:]


def finish() -> None:
    """After the last job: under torchrun, tells those that follow that there is no further one."""
    if is_under_torchrun() and not is_started() and os.environ["RANK"] == "0":
        store = _torchrun_store()
        _publish(store, None)
        # This process may be the one that serves the store: it stays until all have read that.
        store.wait([f"left/{rank}" for rank in range(1, int(os.environ["WORLD_SIZE"]))], timedelta(minutes=1))
        _restarts().finish()
    if _lifeline is not None:
        _lifeline.release()
    _leave_group()


def follow(function: Callable[[DictConfig], Any]) -> None:
    """Runs the jobs of the process that leads this one, as they come."""
    if os.environ["RANK"] != "0":
        # Said once is enough.
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    if is_started():
        threading.Thread(target=_die_with_leader, daemon=True).start()
    store = _torchrun_store()
    while (job := _next_job(store)) is not None:
        if os.environ["RANK"] == "0" and job["logging"]:
            logging.config.dictConfig(job["logging"])
        result = function(OmegaConf.create(job["config"]))
        if is_started():
            if os.environ["RANK"] == "0":
                store.set("result", json.dumps(result))
            return
    store.set(f"left/{os.environ['RANK']}", "")


def tell(message: str, trace: str = "") -> None:
    """Says what this process dies of to the one that started it."""
    report = {"time": time.time(), "message": message, "trace": trace}
    _torchrun_store().set(f"error/{os.environ['RANK']}", json.dumps(report))


def end_by(number: signal.Signals) -> None:
    """Ends this process by a signal that was caught to put things in order: who started it sees no error of its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def leave_at_once(status: int) -> None:
    """Ends this process if it is one of a group: an orderly end would wait for what the others do not send any more."""
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def count_processes(config: DictConfig) -> int:
    """The processes that a configuration asks for on this machine.

    Raises:
        ConfigError: several machines, which somebody must start processes on.
    """
    if config.trainer.get("num_nodes", 1) != 1:
        raise ConfigError(
            f"trainer.num_nodes={config.trainer.num_nodes}: start the processes of several machines with torchrun, "
            "which sets the number of nodes"
        )
    if config.trainer.devices == 1:
        return 1
    quiet_lightning()
    from lightning.pytorch.strategies import ParallelStrategy

    from lightkit.app.factory import build_trainer

    # What `auto` and lists of devices come to, Lightning knows.
    trainer = build_trainer(config, logger=False)
    return trainer.num_devices if isinstance(trainer.strategy, ParallelStrategy) else 1


def is_under_torchrun() -> bool:
    """Returns whether torchrun, or somebody who sets its variables, has started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def with_torchruns_processes(config: DictConfig) -> DictConfig:
    """The configuration, resolved, with the devices and nodes that torchrun has started processes for.

    Raises:
        ConfigError: it asks for other devices, or the nodes have different numbers of processes.
    """
    world = int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes, rest = divmod(world, local)
    if rest:
        raise ConfigError(f"torchrun started {world} processes, which {local} a node does not divide")
    asked = config.trainer.devices
    if asked not in (1, -1, "auto", local, str(local)):
        raise ConfigError(f"trainer.devices={asked}, but torchrun started {local} processes on this node")
    config = OmegaConf.create(_resolved(config))
    with open_dict(config):
        config.trainer.devices = local
        config.trainer.num_nodes = nodes
    return config


def _resolved(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def _leave_group() -> None:
    """Ends the process group: its threads must not outlive the interpreter, and Lightning ends it for NCCL alone."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


_store: Any = None
_lifeline: Lifeline | None = None


def _torchrun_store() -> Any:
    """The store that the processes meet at, by torch's variables; from then on each notices when another is gone."""
    global _store, _lifeline
    if _store is None:
        from torch.distributed import PrefixStore, rendezvous

        _meet_anew()
        # Kept: process 0 may be its server, which the process group of the training then shares.
        _store = PrefixStore("lightkit", next(iter(rendezvous("env://")))[0])
        if not is_started():
            _lifeline = Lifeline(_store, int(os.environ["RANK"]), os.environ["MASTER_ADDR"])
    return _store


_new_server: Any = None


def _meet_anew() -> None:
    """After a restart on one machine, makes a store of its own for the processes that are there now.

    That of torchrun still holds the addresses of the processes of before. Between machines, where the numbers of
    restarts may differ, `lightkit.app.resume` wants torchrun to make the new store.
    """
    global _new_server
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or attempt == "0":
        return
    from torch.distributed import PrefixStore, TCPStore, rendezvous

    agents = PrefixStore(f"lightkit/restart/{attempt}", next(iter(rendezvous("env://")))[0])
    if os.environ["RANK"] == "0":
        _new_server = TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False)
        agents.set("port", str(_new_server.port))
    os.environ["MASTER_PORT"] = agents.get("port").decode()


_own_restarts: Restarts | None = None


def _restarts() -> Restarts:
    global _own_restarts
    if _own_restarts is None:
        _own_restarts = Restarts()
    return _own_restarts


def _publish(store: Any, config: DictConfig | None) -> None:
    job = None
    if config is not None:
        setup = HydraConfig.get().job_logging if HydraConfig.initialized() else None
        job = {"config": _resolved(config), "logging": OmegaConf.to_container(setup, resolve=True) if setup else None}
    store.set(f"job/{store.add('jobs', 1)}", json.dumps(job))


_taken = 0


def _next_job(store: Any) -> dict[str, Any] | None:
    global _taken
    _taken += 1
    store.wait([f"job/{_taken}"], _FOREVER)
    return json.loads(store.get(f"job/{_taken}"))


def _die_with_leader() -> None:
    """Ends this process when the other end of its standard input is gone."""
    # Past Python's own buffer, whose lock would be held when the interpreter ends.
    while os.read(0, 4096):
        pass
    os._exit(1)


@contextmanager
def _raise_on_sigterm() -> Iterator[None]:
    """Makes a SIGTERM an exception, as Ctrl-C is one: otherwise it would end this process at once."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    def stop(number: int, frame: FrameType | None) -> None:
        raise SIGTERMException

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _pass_on(processes: list[subprocess.Popen], number: signal.Signals, seconds: float) -> None:
    """Sends a signal to all, and waits for so long until they have ended."""
    for process in processes:
        process.send_signal(number)
    _wait(processes, seconds)


@_raise_on_sigterm()
def _start_and_watch(config: DictConfig, count: int, command: list[str]) -> Any:
    from lightning.pytorch.utilities.exceptions import SIGTERMException
    from torch.distributed import PrefixStore, TCPStore

    # Held here, its port cannot be taken by another program between being found and being used.
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = PrefixStore("lightkit", server)
    _publish(store, config)
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(count):
            processes.append(_start(command, rank, count, server.port))
        _watch(processes, store, _survives_lost_workers(config))
        if not store.check(["result"]):
            raise LightkitError("process 0 ended without a result")
        return json.loads(store.get("result"))
    except KeyboardInterrupt:
        _pass_on(processes, signal.SIGINT, _ORDER)
        raise
    except SIGTERMException:
        _pass_on(processes, signal.SIGTERM, _BATCH)
        raise
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _start(command: list[str], rank: int, count: int, port: int) -> subprocess.Popen:
    # As torchrun tells its processes, Lightning and torch.distributed read it.
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_RUN_ID": "lightkit",
        _STARTED: 1,
    }
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    if "lo" in (name for _, name in socket.if_nameindex()):
        # Works where the machine's own name does not resolve, and keeps the port to this machine.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # A session of its own: Ctrl-C at the terminal reaches the leader alone, who passes it on once.
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)


def _survives_lost_workers(config: DictConfig) -> bool:
    """Whether the strategy goes on without a process that was killed, if it is not the first."""
    target = config.strategy.get("_target_")
    return target is not None and traits_of(find_class(target)).tolerates_worker_loss


def _watch(processes: list[subprocess.Popen], store: Any, survives: bool) -> None:
    """Returns when all have ended well, or those without which the others go on were killed."""

    def has_failed(rank: int, status: int | None) -> bool:
        return bool(status) and not (survives and rank > 0 and status < 0)

    told: set[int] = set()
    # Of all of them, each time: `any` would look no further than the first that is there.
    while None in [process.poll() for process in processes]:
        for rank, process in enumerate(processes):
            if survives and rank > 0 and (process.returncode or 0) < 0 and rank not in told:
                told.add(rank)
                name = signal.Signals(-process.returncode).name
                print(f"process {rank} of {len(processes)} was ended by {name}: going on without it", file=sys.stderr)
        if any(has_failed(rank, process.returncode) for rank, process in enumerate(processes)):
            break
        time.sleep(0.05)
    if any(has_failed(rank, process.returncode) for rank, process in enumerate(processes)):
        _wait(processes, _GRACE)
        raise _cause(processes, store)


def _wait(processes: list[subprocess.Popen], seconds: float) -> None:
    """Waits until all have ended, for so long."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.05)


def _cause(processes: list[subprocess.Popen], store: Any) -> LightkitError:
    """What went wrong first: where one process fails, the others fail for missing it."""
    told = [rank for rank in range(len(processes)) if store.check([f"error/{rank}"])]
    killed = [rank for rank, process in enumerate(processes) if (process.returncode or 0) < 0 and rank not in told]
    if killed:
        number = -processes[killed[0]].returncode
        hint = "; the machine may be out of memory" if number == signal.SIGKILL else ""
        return LightkitError(
            f"process {killed[0]} of {len(processes)} was ended by {signal.Signals(number).name}{hint}; the others "
            "were stopped. ckpt_path=last goes on from the last checkpoint"
        )
    reports = {rank: json.loads(store.get(f"error/{rank}")) for rank in told}
    if not reports:
        rank, status = next((rank, p.returncode) for rank, p in enumerate(processes) if p.returncode)
        return LightkitError(f"process {rank} of {len(processes)} ended with status {status}")
    first = min(reports, key=lambda rank: reports[rank]["time"])
    report = reports[first]
    if not report["trace"]:
        return LightkitError(report["message"])
    print(report["trace"], file=sys.stderr)
    return LightkitError(f"process {first} of {len(processes)}: {report['message']}")
