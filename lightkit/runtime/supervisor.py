"""Starts the processes of a job on this machine, watches them, and passes on Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from lightkit.errors import LightkitError, Terminated
from lightkit.runtime.environment import STARTED
from lightkit.runtime.job_store import JobStore
from lightkit.runtime.termination import raising_on_sigterm

# Seconds in which the other processes may report their errors after one process has ended in an error.
_GRACE = 1.0

# Seconds in which the processes may end in order after Ctrl-C; their files are whole at any time.
_AFTER_INTERRUPT = 8.0

# Seconds in which the processes may finish their batch after SIGTERM; SLURM and Kubernetes kill after 30 seconds.
_AFTER_SIGTERM = 25.0

# Seconds between two polls of the processes.
_POLL = 0.05


class Supervisor:
    """Runs one job in several processes of this machine.

    Args:
        command: the command line that starts a process, which must call `lightkit.runtime.worker.Worker.follow`.
        count: the number of processes.
        tolerates_worker_loss: continue the job after a signal has killed a process other than that of rank 0.
    """

    def __init__(self, command: list[str], count: int, tolerates_worker_loss: bool = False) -> None:
        self._command = command
        self._count = count
        self._tolerates_worker_loss = tolerates_worker_loss
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self, job: dict[str, Any]) -> Any:
        """Starts the processes, runs a job in them and returns the result of the process of rank 0.

        Args:
            job: the job that `Worker.follow` passes to its ``run`` in each process; it consists of JSON's types.

        Raises:
            LightkitError: a process has ended in an error; the supervisor has ended the others.
            KeyboardInterrupt: Ctrl-C, which the supervisor has passed on to the processes.
            Terminated: this process received SIGTERM, which the supervisor has passed on to the processes.
        """
        from torch.distributed import PrefixStore, TCPStore

        with raising_on_sigterm():
            # The store holds its port from now on: no other program can take the port before the processes use it.
            server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            jobs = JobStore(PrefixStore("lightkit", server))
            jobs.publish(job)
            try:
                for rank in range(self._count):
                    self._processes.append(self._start(rank, server.port))
                self._watch(jobs)
                return jobs.result()
            except KeyboardInterrupt:
                self._pass_on(signal.SIGINT, _AFTER_INTERRUPT)
                raise
            except Terminated:
                self._pass_on(signal.SIGTERM, _AFTER_SIGTERM)
                raise
            finally:
                for process in self._processes:
                    process.kill()
                    process.wait()

    def _start(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        # The names are torchrun's, which Lightning and torch.distributed read.
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "GROUP_RANK": 0,
            "WORLD_SIZE": self._count,
            "LOCAL_WORLD_SIZE": self._count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_RUN_ID": "lightkit",
            STARTED: 1,
        }
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        if "lo" in (name for _, name in socket.if_nameindex()):
            # Works where the machine's own name does not resolve, and keeps the port to this machine.
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # With a session of its own, a process does not receive Ctrl-C from the terminal; the supervisor passes it on.
        return subprocess.Popen(self._command, env=environment, stdin=subprocess.PIPE, start_new_session=True)

    def _watch(self, jobs: JobStore) -> None:
        """Waits until every process has ended with status 0, or has been lost as ``tolerates_worker_loss`` allows.

        Args:
            jobs: the store to which processes report their errors.

        Raises:
            LightkitError: a process has failed; see `_first_error`.
        """
        announced: set[int] = set()
        # A list polls all processes: `any` would stop at the first one that still runs.
        while None in [process.poll() for process in self._processes]:
            self._announce_losses(announced)
            if self._has_failed():
                break
            time.sleep(_POLL)
        if self._has_failed():
            self._wait(_GRACE)
            raise self._first_error(jobs)

    def _is_tolerated(self, rank: int, status: int | None) -> bool:
        return self._tolerates_worker_loss and rank > 0 and (status or 0) < 0

    def _has_failed(self) -> bool:
        statuses = enumerate(process.returncode for process in self._processes)
        return any(status and not self._is_tolerated(rank, status) for rank, status in statuses)

    def _announce_losses(self, announced: set[int]) -> None:
        for rank, process in enumerate(self._processes):
            if self._is_tolerated(rank, process.returncode) and rank not in announced:
                announced.add(rank)
                name = signal.Signals(-process.returncode).name
                print(f"process {rank} of {self._count} was ended by {name}: going on without it", file=sys.stderr)

    def _wait(self, seconds: float) -> None:
        """Waits until all processes have ended, for ``seconds`` at most."""
        end = time.monotonic() + seconds
        while any(process.poll() is None for process in self._processes) and time.monotonic() < end:
            time.sleep(_POLL)

    def _pass_on(self, number: signal.Signals, seconds: float) -> None:
        """Sends the signal ``number`` to all processes, and waits until they have ended, for ``seconds`` at most."""
        for process in self._processes:
            process.send_signal(number)
        self._wait(seconds)

    def _first_error(self, jobs: JobStore) -> LightkitError:
        """Returns the earliest error among the processes; later errors are consequences of the loss of that process.

        Args:
            jobs: the store to which processes have reported their errors. A process that a signal has ended reports
                nothing, and comes first.
        """
        reports = jobs.errors(range(self._count))
        statuses = {rank: process.returncode or 0 for rank, process in enumerate(self._processes)}
        killed = [rank for rank, status in statuses.items() if status < 0 and rank not in reports]
        if killed:
            number = -statuses[killed[0]]
            hint = "; the machine may be out of memory" if number == signal.SIGKILL else ""
            return LightkitError(
                f"process {killed[0]} of {self._count} was ended by {signal.Signals(number).name}{hint}; the others "
                "were stopped. ckpt_path=last goes on from the last checkpoint"
            )
        if not reports:
            rank, status = next((rank, status) for rank, status in statuses.items() if status)
            return LightkitError(f"process {rank} of {self._count} ended with status {status}")
        first = min(reports, key=lambda rank: reports[rank].time)
        report = reports[first]
        if not report.trace:
            return LightkitError(report.message)
        print(report.trace, file=sys.stderr)
        return LightkitError(f"process {first} of {self._count}: {report.message}")
