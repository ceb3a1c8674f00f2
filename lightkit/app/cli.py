"""Makes console commands of functions of a configuration: composing by Hydra, processes, errors a person can act on."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import typing
import warnings
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import lightkit
from lightkit._util.installation import find_conflict
from lightkit.app import processes, restarts
from lightkit.app.hydra_patches import change_hydra
from lightkit.app.log_filters import quiet, with_quiet_lightning
from lightkit.app.messages import explain, explain_null, lightning_exceptions, print_error, user_errors
from lightkit.app.schema import CONFIG_MODULE, check_top_level, quote_texts
from lightkit.app.sweeps import figure_for_sweeper
from lightkit.errors import CarriedError, ConfigError, Terminated
from lightkit.runtime.environment import is_follower, is_started, is_under_torchrun
from lightkit.runtime.worker import Worker, end_at_once_in_group, end_by_signal
from lightkit.targets import check_types

# The flags of Hydra for several jobs.
_SWEEP = ("-m", "--multirun")

_CONTINUE = ": ckpt_path=last goes on from the last checkpoint"

_INTERRUPTED = 128 + signal.SIGINT


def entry_point(
    config_name: str, keys: type, several_processes: bool = False
) -> Callable[[Callable[[DictConfig], Any]], Command]:
    """Decorates a function of a configuration, which becomes a `Command`; see there for the arguments."""

    def decorate(function: Callable[[DictConfig], Any]) -> Command:
        return Command(function, config_name, keys, several_processes)

    return decorate


class Command:
    """A console command; to call it runs the command and returns the exit status.

    The command composes ``conf/<config_name>.yaml`` with the overrides on the command line. The status is 0, or 1 after
    one message on standard error; it is 130 after Ctrl-C and 143 after SIGTERM, as in a shell. ``HYDRA_FULL_ERROR=1``
    shows tracebacks too.

    Args:
        function: of the configuration; imports what takes long itself.
        config_name: of the configuration, and of the module of the command.
        keys: its annotations give the types of the command's own keys; the value of a key of texts is taken as typed.
        several_processes: run the function in as many processes as the configuration has devices.
    """

    def __init__(
        self, function: Callable[[DictConfig], Any], config_name: str, keys: type, several_processes: bool
    ) -> None:
        self.__doc__ = function.__doc__
        self._function = with_quiet_lightning(function)
        self._config_name = config_name
        self._hints = typing.get_type_hints(keys)
        self._worker = Worker() if several_processes else None
        decorate = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=config_name)
        self._run_hydra = decorate(self._run_job)

    def __call__(self) -> int:
        """Runs the command, and returns its exit status."""
        _add_current_directory()
        if self._worker is not None and is_started():
            status = self._follow_starter(self._worker)
        else:
            status = self._run_and_explain()
        if status != 0 and self._worker is not None:
            end_at_once_in_group(status)
        return status

    def _run_job(self, config: DictConfig) -> Any:
        """Checks a composed configuration and runs the function; Hydra calls it once a job."""
        if conflict := find_conflict():
            warnings.warn(conflict, stacklevel=1)
        try:
            check_top_level(config, self._config_name)
            check_types({name: config[name] for name in self._hints}, self._hints)
            if self._worker is None:
                return self._function(config)
            # Without arguments: the further processes get their configuration from this one.
            command = [sys.executable, "-m", f"lightkit.{self._config_name}"]
            return figure_for_sweeper(config, processes.lead(self._function, config, command, self._worker))
        except user_errors() as error:
            # Not as the Exception that it is: Hydra would print its own words on it first.
            raise CarriedError(error) from error

    def _run_and_explain(self) -> int:
        """Runs the command, explains its errors, and returns the exit status."""
        show_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
        # With it Hydra raises instead of printing, which leaves the printing to us.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        if "--version" in sys.argv[1:]:
            print(f"lightkit {lightkit.__version__} (hydra {hydra.__version__})")
            return 0
        try:
            self._run()
        except (CarriedError, *user_errors()) as error:
            return _print_explained(explain(error, self._config_name), show_traceback)
        except ValueError as error:
            # Any other than Hydra's answer to GROUP=null is a fault of the program.
            if not str(error).startswith("Config group override must be") or not (message := explain_null()):
                raise
            return _print_explained(message, show_traceback)
        except (Terminated, *lightning_exceptions("SIGTERMException")):
            # A SystemExit without a status: whoever reads the status would take the job for done.
            print(f"ended by SIGTERM{_CONTINUE}", file=sys.stderr)
            return 128 + signal.SIGTERM
        except (KeyboardInterrupt, SystemExit) as error:
            if not _is_interrupt(error):
                if self._worker is not None and not getattr(error, "code", None):
                    # The end of --help: the processes that follow must not wait for a job.
                    self._worker.finish()
                raise
            print(f"interrupted{_CONTINUE if self._config_name == 'train' else ''}", file=sys.stderr)
            return _INTERRUPTED
        return 0

    def _run(self) -> None:
        _put_flags_first()
        quiet()
        change_hydra()
        if self._worker is None:
            self._reject_sweep()
        quote_texts([name for name, hint in self._hints.items() if hint in (str, str | None)])
        if self._worker is None:
            _preserve_hydra_config(self._run_hydra)
            return
        if is_follower():
            processes.follow(self._function, self._worker)
        elif (arguments := restarts.command_line()) is not None:
            sys.argv[1:] = arguments
            _preserve_hydra_config(self._run_hydra)
        self._worker.finish()
        if is_under_torchrun() and not is_follower():
            restarts.of_this_process().finish()

    def _follow_starter(self, worker: Worker) -> int:
        """Runs the job of the supervisor that started this process, which prints the errors reported to it."""
        quiet()
        try:
            processes.follow(self._function, worker)
            worker.finish()
        except user_errors() as error:
            worker.report_error(explain(error, self._config_name))
            return 1
        except lightning_exceptions("SIGTERMException"):
            end_by_signal(signal.SIGTERM)
        except (KeyboardInterrupt, SystemExit) as error:
            if not _is_interrupt(error):
                raise
            return _INTERRUPTED
        except Exception as error:
            worker.report_error(f"{type(error).__name__}: {error}", traceback.format_exc())
            return 1
        return 0

    def _reject_sweep(self) -> None:
        """Rejects a sweep of a command whose results have no directory: Hydra would leave one that is empty."""
        if any(word in _SWEEP for word in sys.argv[1:]):
            raise ConfigError(f"-m is for lightkit.train: lightkit.{self._config_name} does one thing at a time")


def _print_explained(message: str, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exc()
    print_error(message)
    return 1


def _preserve_hydra_config(command: Callable[[], None]) -> None:
    """Calls a command of Hydra's, and restores `HydraConfig` afterwards.

    Hydra keeps the configuration of a sweep for ever; a program that goes on must not take it for that of its job.
    """
    before = HydraConfig.instance().cfg
    try:
        command()
    finally:
        HydraConfig.instance().cfg = before


def _is_interrupt(error: BaseException) -> bool:
    """Returns True for Ctrl-C, which Lightning turns into a SystemExit once it has put things in order."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)


def _add_current_directory() -> None:
    """Lets a console script find what LIGHTKIT_TARGETS names in the current directory, as ``python -m`` does."""
    is_wanted = os.environ.get("LIGHTKIT_TARGETS") and not getattr(sys.flags, "safe_path", False)
    if is_wanted and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _put_flags_first() -> None:
    """Moves -m to the front of the command line: Hydra's parser takes no overrides after it when some come before."""
    flags = [word for word in sys.argv[1:] if word in _SWEEP]
    sys.argv[1:] = flags + [word for word in sys.argv[1:] if word not in flags]
