"""Errors in what the user gave, which entry points print in one line without a traceback; and the ends of a process."""


class LightkitError(Exception):
    """Something the user gave cannot be used; the message names it and says what was expected."""


class ConfigError(LightkitError, ValueError):
    """A configuration that names something unknown or gives it wrong arguments."""


class DataError(LightkitError, ValueError):
    """Data that is missing, damaged or not what it claims to be."""


class CheckpointError(LightkitError, ValueError):
    """A checkpoint that is missing, damaged or of something else."""


class CarriedError(BaseException):
    """Carries an error in the input, its only argument, past Hydra, which would print its own words on an Exception."""


class Terminated(SystemExit):
    """Ends a process that got SIGTERM, once what it does is in order."""


class ArgumentError(ValueError, RuntimeError):
    """An argument of an op does not fit. It is a ValueError and a RuntimeError: torch raises either."""
