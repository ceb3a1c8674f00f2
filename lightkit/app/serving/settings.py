"""The settings of a server, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import get_type_hints

from lightkit.errors import ConfigError
from lightkit.targets import check_types

_MAX_PORT = 65535

# The server and a worker hold a body in memory as a whole.
_MAX_BODY_MB = 2000


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server, which are keys of ``conf/serve.yaml``.

    Args:
        host: the name or address of the interface on which the server listens; ``"0.0.0.0"`` means all of IPv4.
        port: the port; 0 takes a free one.
        devices: ``"auto"`` for all GPUs or, without any, the CPU; ``"cpu"``; or the number of GPUs.
        workers: the number of processes for each device, of which each has a model of its own.
        max_batch_size: the largest number of requests that one call of the model answers.
        batch_timeout: the seconds that a request waits for others to fill a batch. 0 takes what has arrived while the
            worker was busy.
        max_waiting: the largest number of requests that the server holds; the next ones get the status 503.
        max_body_mb: the largest body of a request in megabytes of 2^20 bytes; a larger one gets the status 413.
        timeout: the seconds after which a request that has no answer gets the status 504. A worker that computes for
            longer is started again.
        max_length: the largest number of bytes that a request may add to a text.

    Raises:
        ConfigError: a setting has another type or is out of its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    devices: int | str = "auto"
    workers: int = 1
    max_batch_size: int = 16
    batch_timeout: float = 0.0
    max_waiting: int = 256
    max_body_mb: float = 32.0
    timeout: float = 60.0
    max_length: int = 4096

    def __post_init__(self) -> None:
        check_types({field.name: getattr(self, field.name) for field in fields(self)}, get_type_hints(ServerSettings))
        for name in ("workers", "max_batch_size", "max_waiting", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.port <= _MAX_PORT:
            raise ConfigError(f"port must be from 0 to {_MAX_PORT}, got {self.port}")
        if not 0 <= self.batch_timeout < math.inf:
            raise ConfigError(f"batch_timeout must be a number of seconds from 0 on, got {self.batch_timeout}")
        if not 0 < self.timeout < math.inf:
            raise ConfigError(f"timeout must be a number of seconds above 0, got {self.timeout}")
        if not 0 < self.max_body_mb <= _MAX_BODY_MB:
            raise ConfigError(f"max_body_mb must be above 0 and at most {_MAX_BODY_MB}, got {self.max_body_mb}")
        if isinstance(self.devices, str) and self.devices not in ("auto", "cpu"):
            raise ConfigError(f"devices must be auto, cpu or a number of GPUs, got {self.devices!r}")
        if isinstance(self.devices, int) and self.devices < 1:
            raise ConfigError(f"devices must be at least 1, got {self.devices}")

    @property
    def max_body_bytes(self) -> int:
        """The largest body of a request in bytes."""
        return int(self.max_body_mb * (1 << 20))
