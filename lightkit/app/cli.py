"""What the entry points share: composing by Hydra, and errors a person can act on."""

from __future__ import annotations

import functools
import math
import os
import re
import signal
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import hydra
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import lightkit
from lightkit._util.installation import find_conflict, how_to_install
from lightkit._util.printable import printable
from lightkit.app.hydra_patches import change_hydra
from lightkit.app.log_filters import quiet, with_quiet_lightning
from lightkit.config import check_types, nearest
from lightkit.errors import CarriedError, ConfigError, LightkitError
from lightkit.runtime import processes

CONFIG_SOURCE = "pkg://lightkit.conf"

# Characters that a message of several lines is laid out with.
_LAYOUT = "\n\t"

# Characters of a message: a file may have millions of columns to list.
_LONGEST_MESSAGE = 4000

# The flags of Hydra for several jobs.
_SWEEP = ("-m", "--multirun")


def _lightnings(name: str) -> tuple[type[BaseException], ...]:
    """Lightning's exception of that name, if Lightning has been imported: else nobody has raised it."""
    module = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return () if module is None else (getattr(module, name),)


def user_errors() -> tuple[type[BaseException], ...]:
    """What an error in the input looks like; anything else is a fault of the program and keeps its traceback."""
    misconfiguration = _lightnings("MisconfigurationException")
    return (LightkitError, HydraException, OmegaConfBaseException, OSError, *misconfiguration)


def entry_point(
    config_name: str, keys: type, several_processes: bool = False
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], int]]:
    """Makes a console command of a function of a configuration, which imports what takes long itself.

    The command composes ``conf/<config_name>.yaml`` with the overrides on the command line and returns the
    exit status: 0, or 1 after one message on standard error, 130 and 143 as a shell has them after Ctrl-C and SIGTERM.
    ``HYDRA_FULL_ERROR=1`` shows tracebacks too. ``keys`` says by its annotations which type the values of the command's
    own keys have; what belongs to a key of texts is taken as it was typed. With ``several_processes`` the function runs
    in as many as the configuration has devices: see `lightkit.runtime.processes`.
    """
    hints = typing.get_type_hints(keys)

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], int]:
        function = with_quiet_lightning(function)

        def checked(config: DictConfig) -> Any:
            if conflict := find_conflict():
                warnings.warn(conflict, stacklevel=1)
            # Not as the Exception it is: Hydra would print its own words on it first.
            try:
                check_top_level(config, config_name)
                check_types({name: config[name] for name in hints}, hints)
                if several_processes:
                    # Without arguments: they follow the process that starts them.
                    result = processes.lead(function, config, [sys.executable, "-m", f"lightkit.{config_name}"])
                    return for_sweeper(config, result)
                return function(config)
            except user_errors() as error:
                raise CarriedError(error) from error

        command = hydra.main(version_base="1.3", config_path=CONFIG_SOURCE, config_name=config_name)(checked)

        def run() -> int:
            show_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
            # With it Hydra raises instead of printing, which leaves the printing to us.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            if "--version" in sys.argv[1:]:
                print(f"lightkit {lightkit.__version__} (hydra {hydra.__version__})")
                return 0
            _flags_first()
            quiet()
            change_hydra()
            try:
                if not several_processes:
                    _refuse_sweep(config_name)
                _keep_texts([name for name, hint in hints.items() if hint in (str, str | None)])
                if several_processes and processes.follows():
                    processes.follow(function)
                elif not several_processes:
                    _leave_hydra_as_it_was(command)
                elif (arguments := processes.command_line()) is not None:
                    sys.argv[1:] = arguments
                    _leave_hydra_as_it_was(command)
                if several_processes:
                    processes.finish()
            except (CarriedError, *user_errors()) as error:
                if show_traceback:
                    traceback.print_exc()
                _print_error(explain(error, config_name))
                return 1
            except ValueError as error:
                # Any other than Hydra's answer to GROUP=null is a fault of the program.
                if not str(error).startswith("Config group override must be") or not (message := _explain_null()):
                    raise
                if show_traceback:
                    traceback.print_exc()
                _print_error(message)
                return 1
            except _lightnings("SIGTERMException"):
                # A SystemExit that says nothing of a status: who counts on it would take the job for done.
                print("ended by SIGTERM: ckpt_path=last goes on from the last checkpoint", file=sys.stderr)
                return 128 + signal.SIGTERM
            except (KeyboardInterrupt, SystemExit) as error:
                if not _is_interrupt(error):
                    if several_processes and not error.code:
                        # The end of --help: those that follow must not wait for a job.
                        processes.finish()
                    raise
                advice = ": ckpt_path=last goes on from the last checkpoint" if config_name == "train" else ""
                print(f"interrupted{advice}", file=sys.stderr)
                return 130
            return 0

        def main() -> int:
            _look_here()
            is_started = several_processes and processes.is_started()
            status = _run_started(function, config_name) if is_started else run()
            if status != 0:
                processes.leave_at_once(status)
            return status

        main.__doc__ = function.__doc__
        return main

    return decorate


def _leave_hydra_as_it_was(command: Callable[[], None]) -> None:
    """Calls a command of Hydra's, and lets a program that goes on afterwards find no job in `HydraConfig`.

    Hydra itself keeps the configuration of a sweep for ever.
    """
    before = HydraConfig.instance().cfg
    try:
        command()
    finally:
        HydraConfig.instance().cfg = before


def _run_started(function: Callable[[DictConfig], Any], config_name: str) -> int:
    """Runs the job of the process that started this one, which is told what goes wrong, and prints it."""
    quiet()
    try:
        processes.follow(function)
        processes.finish()
    except user_errors() as error:
        processes.tell(explain(error, config_name))
        return 1
    except _lightnings("SIGTERMException"):
        processes.end_by(signal.SIGTERM)
    except (KeyboardInterrupt, SystemExit) as error:
        if not _is_interrupt(error):
            raise
        return 130
    except Exception as error:
        processes.tell(f"{type(error).__name__}: {error}", traceback.format_exc())
        return 1
    return 0


def _print_error(message: str) -> None:
    """Prints an error, in which names may be somebody else's."""
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]} ... ({len(message):,} characters)"
    print(f"error: {printable(message, keep=_LAYOUT)}", file=sys.stderr)


def _is_interrupt(error: BaseException) -> bool:
    """Whether it is Ctrl-C, which Lightning turns into a SystemExit once it has put things in order."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)


def _look_here() -> None:
    """Lets a console script find what LIGHTKIT_TARGETS names in the current directory, as ``python -m`` does."""
    is_wanted = os.environ.get("LIGHTKIT_TARGETS") and not getattr(sys.flags, "safe_path", False)
    if is_wanted and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _flags_first() -> None:
    """Lets -m stand anywhere: Hydra's parser takes no overrides after it when there were some before."""
    flags = [word for word in sys.argv[1:] if word in _SWEEP]
    sys.argv[1:] = flags + [word for word in sys.argv[1:] if word not in flags]


def _refuse_sweep(config_name: str) -> None:
    """Where results have no directory of their own, Hydra would leave one that has nothing of them."""
    if any(word in _SWEEP for word in sys.argv[1:]):
        raise ConfigError(f"-m is for lightkit.train: lightkit.{config_name} does one thing at a time")


def _keep_texts(names: list[str]) -> None:
    """Puts what Hydra would make a number or a truth value in quotes, where it is for a key of texts: 1.50, true."""
    parser = OverridesParser.create()
    for index, word in enumerate(sys.argv[1:], start=1):
        key, _, typed = word.partition("=")
        if key.lstrip("+") in names:
            (override,) = parser.parse_overrides([word])
            if isinstance(override.value(), (int, float)):
                sys.argv[index] = f"{key}='{typed}'"


def explain(error: BaseException, config_name: str) -> str:
    """The message of an error in the input, with the nearest right names where one was misspelt."""
    if isinstance(error, CarriedError):
        return explain(error.args[0], config_name)
    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return _no_choice(group, name, error.options)
    if isinstance(error, ConfigCompositionException):
        cause = str(error.__cause__).partition("\n")[0] if error.__cause__ else ""
        key = re.search(r"Could not (?:override|append|delete) '([^'@]+)", message)
        hint = nearest(key[1], [name for name in _known_names(config_name) if name != key[1]]) if key else ""
        return ". ".join(part for part in (message.replace("\n", " "), cause) if part) + hint
    if isinstance(error, OSError) and not isinstance(error, LightkitError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (OmegaConfBaseException, HydraException)):
        return message.replace("\n", " ")
    return message or type(error).__name__


def _no_choice(group: str, name: str, choices: list[str]) -> str:
    """That a group has no such choice, and which it has."""
    if (group, name) == ("hydra/sweeper", "optuna"):
        return f"hydra/sweeper=optuna needs a package that is not installed: {how_to_install('sweep')}"
    hint = nearest(name, choices) or ("; did you mean none?" if name == "null" and "none" in choices else ".")
    return f"there is no {group}={name}{hint} Choices: {', '.join(choices)}"


def _explain_null() -> str | None:
    """What to say of the ``GROUP=null`` on the command line, which Hydra answers with a traceback; None without one."""
    with _config_loader() as loader:
        for word in sys.argv[1:]:
            name, _, value = word.lstrip("+").partition("=")
            group = name.partition("@")[0]
            if group in loader.list_groups("") and "null" in value.lower().split(","):
                return _no_choice(group, "null", loader.get_group_options(group))
    return None


def check_top_level(config: Mapping[str, Any], config_name: str) -> None:
    """Refuses keys that nothing reads, and their lack: Hydra's ``+key=value`` and ``~key`` do as they are told."""
    known, groups, optional = top_level(config_name)
    # Iterated over: for a value that must yet be given, `in` says no.
    if missing := set(known).difference(map(str, config), optional):
        raise ConfigError(f"the configuration needs {', '.join(sorted(missing))}, which cannot be removed")
    for key in config:
        if key not in known:
            raise ConfigError(f"{key!r} is not a key of the configuration{nearest(str(key), [*known, *groups])}")


def top_level(config_name: str) -> tuple[list[str], list[str], list[str]]:
    """Returns the keys of the configuration, its groups, and those of both that may be missing."""
    with _config_loader() as loader:
        return _top_level(loader, config_name)


@functools.lru_cache(maxsize=1)
def _top_level(loader: ConfigLoader, config_name: str) -> tuple[list[str], list[str], list[str]]:
    # Read, not composed, which would take longer than anything else that comes before a job of a sweep.
    primary = loader.repository.load_config(config_name)
    defaults = [default.group for default in primary.defaults_list if isinstance(default, GroupDefault)]
    known = [*map(str, primary.config), *(group for group in defaults if "/" not in group)]
    groups = loader.list_groups("")
    # Hydra's own is not handed on; a group that may be none may as well be away.
    return known, groups, ["hydra", *(group for group in groups if "none" in loader.get_group_options(group))]


def for_sweeper(config: Mapping[str, Any], result: float | None) -> float | None:
    """The result of a job as a sweeper takes it that chooses the next ones by it.

    Raises:
        ConfigError: there is none. Hydra's own sweeper, which runs all jobs in any case, asks for none.
    """
    job = HydraConfig.get()
    sweeper = job.runtime.choices["hydra/sweeper"]
    if job.mode != RunMode.MULTIRUN or sweeper == "basic":
        return result
    if result is None:
        raise ConfigError(
            f"objective={config['objective']}: the job has logged no such figure, and hydra/sweeper={sweeper} needs "
            f"one; {config['run_dir']}/metrics.json has those that it has logged"
        )
    # A training that diverged is a bad one, not the end of the sweep, which Optuna's sweeper makes of NaN.
    worst = -math.inf if "maximize" in str(job.sweeper.get("direction")) else math.inf
    return worst if math.isnan(result) else result


@contextmanager
def _config_loader() -> Iterator[ConfigLoader]:
    """Hydra's loader: the running command's, or one of its own after that has ended in an error."""
    if GlobalHydra.instance().is_initialized():
        yield GlobalHydra.instance().config_loader()
    else:
        with initialize_config_module("lightkit.conf", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()


def _defaults(loader: ConfigLoader, config_name: str) -> DictConfig:
    """The configuration without any override."""
    return loader.load_configuration(config_name, overrides=[], run_mode=RunMode.RUN)


def _known_names(config_name: str) -> list[str]:
    """Every key and group that may stand left of an equals sign."""
    with _config_loader() as loader:
        names = [*_dotted(OmegaConf.to_container(_defaults(loader, config_name))), *loader.list_groups("")]
    return list(dict.fromkeys(names))


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield prefix + str(key)
            yield from _dotted(value, f"{prefix}{key}.")
