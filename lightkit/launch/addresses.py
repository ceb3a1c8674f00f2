"""Network interfaces and IPv4 addresses of this machine, and its routes to other machines."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import time

from lightkit.errors import ConfigError

# Linux's request for the IPv4 address of an interface.
_SIOCGIFADDR = 0x8915

# Seconds between two attempts to resolve a name.
_RESOLVE_INTERVAL = 0.5

# Seconds for one connection.
CONNECT_TIMEOUT = 4.0


def interfaces() -> dict[str, str | None]:
    """Returns the first IPv4 address of each interface by the interface's name; None if the interface has none."""
    return {name: _address_of(name) for _, name in socket.if_nameindex()}


def interface_and_address(interface: str | None, host: str, seconds: float = 0.0) -> tuple[str, str]:
    """Returns the name of the interface that a job uses, and this machine's IPv4 address on that interface.

    Args:
        interface: the name of the interface; None for the interface that leads to ``host``.
        host: the name or the address of the first node.
        seconds: the time in seconds in which the name must resolve; the name of a new pod takes a while.

    Raises:
        ConfigError: the interface does not exist or has no address, the name does not resolve, or no route leads to
            ``host``.
    """
    have = interfaces()
    if interface is not None:
        if interface not in have:
            raise ConfigError(f"there is no network interface {interface} on this machine; there are {', '.join(have)}")
        if (found := have[interface]) is None:
            raise ConfigError(f"the network interface {interface} has no IPv4 address")
        return interface, found
    target = resolve(host, seconds)[0]
    try:
        address = source_address(target)
    except OSError as error:
        raise ConfigError(f"no route leads from this machine to {host} ({target}): {error.strerror}") from None
    for name, own in have.items():
        if own == address:
            return name, address
    raise ConfigError(f"the interface of {address}, by which this machine reaches {host}, is unknown: pass --interface")


def resolve(host: str, seconds: float = 0.0) -> list[str]:
    """Returns the IPv4 addresses of a host.

    Args:
        host: the name or the address of the host.
        seconds: the time in seconds for which a failed look-up is repeated; 0 looks up once.

    Raises:
        ConfigError: the name does not resolve within ``seconds``.
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
        time.sleep(_RESOLVE_INTERVAL)


def wait_for(host: str, port: int, end: float) -> str | None:
    """Waits until a program listens on ``port`` of ``host``, at most until ``time.monotonic()`` reaches ``end``.

    Returns:
        None if a connection was made, else the reason why the last attempt failed.
    """
    reason = "there was no time for an answer"
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), timeout=min(left, CONNECT_TIMEOUT)).close()
            return None
        except TimeoutError:
            reason = "no answer; a firewall drops packets, or the address is of another network"
        except ConnectionRefusedError:
            reason = "that machine is there, but nothing listens on the port"
        except OSError as error:
            reason = f"{error.strerror}; the address is wrong, or the link is down"
        time.sleep(min(0.2, max(end - time.monotonic(), 0)))
    return reason


def source_address(target: str) -> str:
    """Returns the IPv4 address from which this machine sends packets to the address ``target``.

    Raises:
        OSError: there is no route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: the kernel looks up the route.
        probe.connect((target, 9))
        return str(probe.getsockname()[0])


def is_own(address: str) -> bool:
    """Returns True if the IPv4 address is one of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def is_loopback(address: str) -> bool:
    """Returns True if the address is a loopback address, which each machine reaches only on itself."""
    return ipaddress.ip_address(address).is_loopback


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
