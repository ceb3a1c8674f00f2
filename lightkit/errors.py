"""Errors in a user's input, which entry points print without a traceback, and exceptions that end a process."""


class LightkitError(Exception):
    """An error in a user's input; the message names the input and says what was expected."""


class ConfigError(LightkitError, ValueError):
    """An error in a configuration: an unknown name or a wrong value."""


class DataError(LightkitError, ValueError):
    """An error in data: the data is missing, damaged or of another format."""


class CheckpointError(LightkitError, ValueError):
    """An error in a checkpoint: the checkpoint is missing, damaged or of another model."""


class CarriedError(BaseException):
    """An exception that carries an error in the input, its only argument, through Hydra to the command.

    It is no `Exception`, since Hydra would catch an `Exception` and print a message of its own.
    """


class Terminated(SystemExit):
    """An exit of a process after SIGTERM, when the process has ended its work in order."""


class ArgumentError(ValueError, RuntimeError):
    """An error in an argument of an op; a ValueError and a RuntimeError at once, because torch raises either."""
