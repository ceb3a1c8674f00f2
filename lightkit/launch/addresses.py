"""The addresses of this machine, and which one others reach it by."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import time

from lightkit.errors import ConfigError

# Linux's request for the IPv4 address of an interface.
_SIOCGIFADDR = 0x8915

_RESOLVE_PAUSE = 0.5

# Seconds for one connection.
CONNECT = 4.0


def interfaces() -> dict[str, str | None]:
    """The interfaces of this machine, with their first IPv4 address."""
    return {name: _address_of(name) for _, name in socket.if_nameindex()}


def interface_and_address(interface: str | None, host: str, seconds: float = 0.0) -> tuple[str, str]:
    """The interface that a job uses, and this machine's address on it.

    Args:
        interface: its name, if it is known.
        host: the first node; the interface that leads there is taken otherwise.
        seconds: for the name of the host to come to be known, as that of a new pod.

    Raises:
        ConfigError: there is no such interface or it has no address; the host's name does not resolve, or no way
            leads there.
    """
    have = interfaces()
    if interface is not None:
        if interface not in have:
            raise ConfigError(f"there is no network interface {interface} on this machine; there are {', '.join(have)}")
        if have[interface] is None:
            raise ConfigError(f"the network interface {interface} has no IPv4 address")
        return interface, have[interface]
    target = resolve(host, seconds)[0]
    try:
        address = source_address(target)
    except OSError as error:
        raise ConfigError(f"no way leads from this machine to {host} ({target}): {error.strerror}") from None
    for name, own in have.items():
        if own == address:
            return name, address
    raise ConfigError(f"the interface of {address}, by which this machine reaches {host}, is unknown: pass --interface")


def resolve(host: str, seconds: float = 0.0) -> list[str]:
    """The IPv4 addresses of a host.

    Raises:
        ConfigError: it has none, after so many seconds.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
            return list(dict.fromkeys(str(entry[4][0]) for entry in found))
        except OSError as error:
            if time.monotonic() >= end:
                raise ConfigError(
                    f"the name {host} does not resolve on this machine to an address of IPv4: {error.strerror}"
                ) from None
        time.sleep(_RESOLVE_PAUSE)


def wait_for(host: str, port: int, end: float) -> str | None:
    """Waits until somebody listens there, or ``time.monotonic()`` is at the end; returns why nobody does, or None."""
    reason = "there was no time for an answer"
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), timeout=min(left, CONNECT)).close()
            return None
        except TimeoutError:
            reason = "no answer; a firewall takes it, or the address is of another network"
        except ConnectionRefusedError:
            reason = "that machine is there, but nothing listens on the port"
        except OSError as error:
            reason = f"{error.strerror}; the address is wrong, or the link is down"
        time.sleep(min(0.2, max(end - time.monotonic(), 0)))
    return reason


def source_address(target: str) -> str:
    """This machine's address on the way to another; raises an `OSError` where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: the kernel looks for a way.
        probe.connect((target, 9))
        return probe.getsockname()[0]


def is_own(address: str) -> bool:
    """Whether an address is one of this machine's."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def is_loopback(address: str) -> bool:
    """Whether only the machine itself can reach an address."""
    return ipaddress.ip_address(address).is_loopback


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
