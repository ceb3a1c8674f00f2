"""Console commands: functions of a configuration, run by Hydra in one or several processes, with readable errors."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightkit._util.installation import find_conflict
from lightkit.app import cross_validation, own_classes, processes, restarts, run_records
from lightkit.app.hydra_patches import patch_hydra
from lightkit.app.log_filters import filter_warnings, with_silent_lightning
from lightkit.app.messages import explain, explain_null, lightning_exceptions, print_error, user_error_types
from lightkit.app.run_directories import remove_unbegun
from lightkit.app.schema import CONFIG_MODULE, check_name, check_top_level, set_tags
from lightkit.app.sweeps import objective_for_sweeper
from lightkit.app.texts import literal_texts
from lightkit.errors import CarriedError, ConfigError, Terminated
from lightkit.runtime.environment import is_follower, is_started, is_under_torchrun
from lightkit.runtime.worker import Worker, end_at_once_in_group, end_by_signal
from lightkit.targets import check_types

# Hydra's flags for a sweep.
_MULTIRUN_FLAGS = ("-m", "--multirun")

_RESUME_HINT = ": ckpt_path=last goes on from the last checkpoint"

_SIGINT_STATUS = 128 + signal.SIGINT


def entry_point(
    config_name: str, keys: type, several_processes: bool = False, uses_lightning: bool = True
) -> Callable[[Callable[[DictConfig], Any]], Command]:
    """Returns a decorator that turns a function of a configuration into a `Command`: see there for the arguments."""

    def decorate(function: Callable[[DictConfig], Any]) -> Command:
        return Command(function, config_name, keys, several_processes, uses_lightning)

    return decorate


class Command:
    """A console command: a callable that runs the command and returns the exit status.

    The command composes ``conf/<config_name>.yaml`` with the overrides on the command line. The exit status is 0 after
    success, 1 after an error in the input (one message on standard error), 130 after Ctrl-C and 143 after SIGTERM.
    ``HYDRA_FULL_ERROR=1`` adds tracebacks.

    Args:
        function: the function that runs a job of the composed configuration, and imports slow modules only then.
        config_name: the name of the configuration and of the command's module, ``lightkit.<config_name>``.
        keys: a class whose annotations are the types of the command's own keys. The command checks the values against
            them, and Hydra takes the value of a str key literally: see `lightkit.app.texts`.
        several_processes: run ``function`` in as many processes as the configuration has devices.
        uses_lightning: import Lightning before ``function`` runs, and silence its messages.
    """

    def __init__(
        self,
        function: Callable[[DictConfig], Any],
        config_name: str,
        keys: type,
        several_processes: bool,
        uses_lightning: bool = True,
    ) -> None:
        self.__doc__ = function.__doc__
        self._function = with_silent_lightning(function) if uses_lightning else function
        self._config_name = config_name
        self._hints = typing.get_type_hints(keys)
        self._worker = Worker() if several_processes else None
        decorate = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=config_name)
        self._run_hydra = decorate(self._run_job)

    def __call__(self) -> int:
        """Runs the command and returns the exit status.

        If a worker fails while torch's process group exists, the method does not return: it ends the process at once
        with the status.
        """
        _add_current_directory()
        if self._worker is not None and is_started():
            status = self._follow_starter(self._worker)
        else:
            status = self._run_and_explain()
        if status != 0 and self._worker is not None:
            end_at_once_in_group(status)
        return status

    def _run_job(self, config: DictConfig) -> Any:
        """Checks a composed configuration, runs the function and returns its result or, for a sweep, the objective.

        Hydra calls this method once for each job.
        """
        if conflict := find_conflict():
            warnings.warn(conflict, stacklevel=1)
        try:
            check_top_level(config, self._config_name)
            check_types({name: config[name] for name in self._hints}, self._hints)
            if "name" in self._hints:
                check_name(config.name)
            if "tags" in self._hints:
                set_tags(config)
            if self._worker is None:
                return self._function(config)
            if own_classes.adapt(config, self._config_name):
                run_records.rewrite_hydra_config(config)
            # The command has no arguments, because this process sends its configuration to the others.
            command = [sys.executable, "-m", f"lightkit.{self._config_name}"]
            return objective_for_sweeper(config, cross_validation.lead(self._function, config, command, self._worker))
        except user_error_types() as error:
            if self._worker is not None:
                remove_unbegun(Path(HydraConfig.get().runtime.output_dir))
            # Hydra prints its own message for every Exception; a CarriedError is none.
            raise CarriedError(error) from error

    def _run_and_explain(self) -> int:
        """Runs the command, explains its errors, and returns the exit status."""
        show_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
        # The variable makes Hydra raise an error instead of printing it.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        if "--version" in sys.argv[1:]:
            # Hydra's own flag prints the version of Hydra.
            from lightkit.native.versions import version_lines

            print(version_lines())
            return 0
        try:
            self._run()
        except (CarriedError, *user_error_types()) as error:
            return _print_explained(explain(error, self._config_name), show_traceback)
        except (TypeError, ValueError) as error:
            # Hydra answers GROUP=null and GROUP=[null] with these errors; any other is a fault of the program.
            known = ("Config group override must be", "argument of type ")
            if not str(error).startswith(known) or not (message := explain_null()):
                raise
            return _print_explained(message, show_traceback)
        except (Terminated, *lightning_exceptions("SIGTERMException")):
            # Lightning's SystemExit has no status, which a caller would read as success.
            print(f"ended by SIGTERM{self._resume_hint()}", file=sys.stderr)
            return 128 + signal.SIGTERM
        except (KeyboardInterrupt, SystemExit) as error:
            if not _is_interrupt(error):
                if self._worker is not None and not getattr(error, "code", None):
                    # --help ends without a job, for which the other processes would wait.
                    self._worker.finish()
                raise
            print(f"interrupted{self._resume_hint()}", file=sys.stderr)
            return _SIGINT_STATUS
        return 0

    def _run(self) -> None:
        """Runs Hydra, or in a following process the jobs of the leading process: see `lightkit.app.processes`."""
        _put_flags_first()
        filter_warnings()
        patch_hydra()
        if self._worker is None:
            self._reject_sweep()
        texts = [name for name, hint in self._hints.items() if hint in (str, str | None)]
        sys.argv[1:] = literal_texts(sys.argv[1:], texts, is_sweep=_is_sweep())
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

    def _resume_hint(self) -> str:
        return _RESUME_HINT if self._config_name == "train" else ""

    def _follow_starter(self, worker: Worker) -> int:
        """Runs the job of the supervisor that started this process, and returns the exit status.

        The method reports errors to the supervisor, which prints them.

        Args:
            worker: this process.
        """
        filter_warnings()
        try:
            processes.follow(self._function, worker)
            worker.finish()
        except user_error_types() as error:
            worker.report_error(explain(error, self._config_name))
            return 1
        except lightning_exceptions("SIGTERMException"):
            end_by_signal(signal.SIGTERM)
        except (KeyboardInterrupt, SystemExit) as error:
            if not _is_interrupt(error):
                raise
            return _SIGINT_STATUS
        except Exception as error:
            worker.report_error(f"{type(error).__name__}: {error}", traceback.format_exc())
            return 1
        return 0

    def _reject_sweep(self) -> None:
        """Rejects the sweep flags for a command that writes no run directory; Hydra would make an empty one."""
        if _is_sweep():
            raise ConfigError(f"-m is for lightkit.train: lightkit.{self._config_name} does one thing at a time")


def _is_sweep() -> bool:
    words = sys.argv[1:]
    return any(word in _MULTIRUN_FLAGS or word.lstrip("+") == "hydra.mode=MULTIRUN" for word in words)


def _print_explained(message: str, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exc()
    print_error(message)
    return 1


def _preserve_hydra_config(command: Callable[[], None]) -> None:
    """Calls a command of Hydra and restores `HydraConfig` afterwards.

    Hydra leaves the configuration of a sweep in `HydraConfig`, where a later job in the same process would read it.
    """
    before = HydraConfig.instance().cfg
    try:
        command()
    finally:
        HydraConfig.instance().cfg = before


def _is_interrupt(error: BaseException) -> bool:
    """Returns True if Ctrl-C caused the error; Lightning converts a KeyboardInterrupt into a SystemExit."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)


def _add_current_directory() -> None:
    """Adds the current directory to ``sys.path`` for the modules in LIGHTKIT_TARGETS, as ``python -m`` does."""
    is_wanted = os.environ.get("LIGHTKIT_TARGETS") and not getattr(sys.flags, "safe_path", False)
    if is_wanted and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _put_flags_first() -> None:
    """Moves -m to the front of the command line, since Hydra's parser rejects it between two overrides."""
    flags = [word for word in sys.argv[1:] if word in _MULTIRUN_FLAGS]
    sys.argv[1:] = flags + [word for word in sys.argv[1:] if word not in flags]
