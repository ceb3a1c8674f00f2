"""Connections between workers and servers: signed frames over a TCP socket.

A receiver checks every size before it reads the content of a frame, so that a bad peer loses its own connection and
does no other harm. A key of the connection signs the header of each frame together with the content, except the bytes
of tensors: an attacker who changes packets can read and change elements of a gradient, and cannot add, repeat, drop or
reorder frames.
"""

from __future__ import annotations

import contextlib
import hmac
import select
import socket
import struct
import threading
import time
from enum import IntEnum
from typing import Any

from torch import Tensor

from lightkit.errors import LightkitError
from lightkit.parameter_server.encoding import bytes_of, decode, encode

# Integers in the header of a request or a reply: see `lightkit.parameter_server.protocol`.
HEADER = struct.Struct("<4q")

# Kind of the frame, bytes of its content, signature.
_FRAME = struct.Struct("<BQ16s")
# The signed part: sequence number, kind, bytes of the content.
_SIGNED = struct.Struct("<QBQ")

# The most bytes of a message without its tensors: a description of 100,000 parameters takes about as many.
_MAX_TEXT_BYTES = 1 << 24

# A frame may take its bytes over this rate in seconds, beyond the timeout.
_MIN_BYTES_PER_SECOND = 1 << 20

# Bounds of the seconds between two heartbeats, whatever the timeout is.
_MIN_HEARTBEAT_INTERVAL = 0.05
_MAX_HEARTBEAT_INTERVAL = 60.0


class TransportError(LightkitError, ConnectionError):
    """The peer is gone, is silent, or cannot be understood."""


class SilenceError(TransportError):
    """The peer sent nothing, or received nothing, for longer than the timeout."""


class ProtocolError(TransportError):
    """The peer sent a frame or a message that the protocol does not allow at this point."""


class FrameKind(IntEnum):
    """The kinds of frames: a heartbeat is empty, a header has the integers of `HEADER`, a message has JSON."""

    HEARTBEAT = 0
    HEADER = 1
    MESSAGE = 2
    TENSOR = 3


class Connection:
    """A connection that sends and receives frames in order.

    One thread at a time may receive, one thread may send, and another one may send heartbeats. After an error the
    caller has to close the connection.

    Args:
        connected: a TCP socket after the handshake.
        keys: the key that signs sent frames, and the key that checks received frames: 32 bytes each.
        timeout: the seconds without a byte from the peer after which this process gives up the connection.

    Attributes:
        heartbeat_interval: the seconds between two heartbeats to the peer.
        last_sent: the `time.monotonic` of the latest sent frame.
    """

    def __init__(self, connected: socket.socket, keys: tuple[bytes, bytes], timeout: float) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.settimeout(timeout)
        self._socket = connected
        self._sending_key, self._receiving_key = keys
        self._timeout = timeout
        self._sent = self._received = 0
        self._sending = threading.Lock()
        self._header = memoryview(bytearray(_FRAME.size))
        self._header_filled = 0
        self._last_received = time.monotonic()
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connected, select.POLLIN)
        self._writable.register(connected, select.POLLOUT)
        self.heartbeat_interval = heartbeat_interval(timeout)
        self.last_sent = time.monotonic()

    # Sending.

    def send(self, *tensors: Tensor) -> None:
        """Sends the elements of contiguous CPU tensors, whose dtypes and shapes the peer must know.

        Raises:
            TransportError: the connection is lost, or the peer receives nothing for ``timeout`` seconds.
        """
        for tensor in tensors:
            if tensor.numel():
                self._send(FrameKind.TENSOR, bytes_of(tensor))

    def send_header(self, *numbers: int) -> None:
        """Sends a header: up to four 64-bit integers ``numbers``, padded with zeros."""
        self._send(FrameKind.HEADER, memoryview(HEADER.pack(*numbers, *[0] * (4 - len(numbers)))))

    def send_message(self, value: Any) -> None:
        """Sends a value of JSON's types and tensors of any shapes and dtypes; the peer receives tuples as lists.

        Raises:
            ProtocolError: the message is longer than a peer accepts.
            TransportError: the connection is lost, or the peer receives nothing for ``timeout`` seconds.
        """
        text, tensors = encode(value)
        if len(text) > _MAX_TEXT_BYTES:
            raise ProtocolError(
                f"a message of {len(text)} bytes without its tensors is too long: at most {_MAX_TEXT_BYTES}"
            )
        self._send(FrameKind.MESSAGE, memoryview(text))
        self.send(*tensors)

    def send_heartbeat(self) -> None:
        """Sends a heartbeat; does nothing while another thread sends a frame. Any thread may call the method.

        Raises:
            TransportError: the connection is lost.
        """
        if not self._sending.acquire(blocking=False):
            return
        try:
            # A full buffer already holds bytes that serve as heartbeats.
            if self._writable.poll(0):
                self._write(FrameKind.HEARTBEAT, memoryview(b""))
        finally:
            self._sending.release()

    def _send(self, kind: FrameKind, content: memoryview) -> None:
        with self._sending:
            self._write(kind, content)

    def _write(self, kind: FrameKind, content: memoryview) -> None:
        signature = self._sign(self._sending_key, self._sent, kind, len(content), content)
        self._sent += 1
        parts = [memoryview(_FRAME.pack(kind, len(content), signature)), content]
        deadline = self._deadline(len(content))
        try:
            while parts:
                count = self._socket.sendmsg(parts)
                while parts and count >= len(parts[0]):
                    count -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][count:]
                    self._check_deadline(deadline, "received")
        except OSError as error:
            # The peer may have a part of a frame: nothing can follow it.
            self.close()
            raise _transport_error(error, "received", self._timeout) from None
        self.last_sent = time.monotonic()

    # Receiving.

    def receive(self, *tensors: Tensor) -> None:
        """Receives the elements of ``tensors``, contiguous CPU tensors, in place.

        Raises:
            ProtocolError: the peer sent no tensors, or tensors of another size.
            TransportError: the connection is lost, or nothing came for ``timeout`` seconds.
        """
        for tensor in tensors:
            if tensor.numel():
                length, signature = self._receive_header(FrameKind.TENSOR)
                if length != tensor.nbytes:
                    raise ProtocolError(f"a tensor of {length} bytes came where one of {tensor.nbytes} was expected")
                self._check_signature(signature, FrameKind.TENSOR, length, memoryview(b""))
                self._fill(bytes_of(tensor), self._deadline(length))

    def receive_header(self) -> list[int]:
        """Returns the four integers of a header.

        Raises:
            TransportError: the connection is lost, or nothing came for ``timeout`` seconds.
        """
        return list(HEADER.unpack(self._receive_content(FrameKind.HEADER, HEADER.size, HEADER.size)))

    def receive_message(self, max_bytes: int = 0) -> Any:
        """Receives a message, and returns the value that the peer passed to `send_message`.

        Args:
            max_bytes: the largest number of bytes of all tensors in the message.

        Raises:
            ProtocolError: the peer sent no message, or a message with more bytes of tensors.
            TransportError: the connection is lost, or nothing came for ``timeout`` seconds.
        """
        text = self._receive_content(FrameKind.MESSAGE, 1, _MAX_TEXT_BYTES)
        try:
            return decode(text, max_bytes, lambda tensors: self.receive(*tensors))
        except (ValueError, RuntimeError) as error:
            # torch raises a RuntimeError where it cannot allocate the tensors.
            raise ProtocolError(f"a message cannot be read: {error}") from None

    def poll(self) -> None:
        """Reads the heartbeats that have arrived, without waiting, while the peer may send nothing except heartbeats.

        Raises:
            ProtocolError: the peer sent another frame.
            TransportError: the connection is lost, or the peer has sent nothing for ``timeout`` seconds, also before
                this call.
        """
        while self._readable.poll(0):
            try:
                if not self._fill_header():
                    continue
            except OSError as error:
                raise _transport_error(error, "sent", self._timeout) from None
            kind, length, signature = self._take_header()
            if kind != FrameKind.HEARTBEAT:
                raise ProtocolError(f"a frame of kind {kind} came where only heartbeats were expected")
            self._check_signature(signature, kind, length, memoryview(b""))
        if time.monotonic() - self._last_received > self._timeout:
            raise SilenceError(f"the peer sent nothing for {self._timeout:g} s")

    def _receive_content(self, kind: FrameKind, min_length: int, max_length: int) -> bytes:
        length, signature = self._receive_header(kind)
        if not min_length <= length <= max_length:
            raise ProtocolError(
                f"a {kind.name.lower()} of {length} bytes was announced, at most {max_length} are accepted"
            )
        content = bytearray(length)
        self._fill(memoryview(content), self._deadline(length))
        self._check_signature(signature, kind, length, memoryview(content))
        return bytes(content)

    def _receive_header(self, expected: FrameKind) -> tuple[int, bytes]:
        """Returns the length in bytes and the signature of the next frame, of kind ``expected``; skips heartbeats."""
        while True:
            deadline = time.monotonic() + self._timeout
            try:
                while not self._fill_header():
                    self._check_deadline(deadline, "sent")
            except OSError as error:
                raise _transport_error(error, "sent", self._timeout) from None
            kind, length, signature = self._take_header()
            if kind == expected:
                return length, signature
            if kind != FrameKind.HEARTBEAT:
                raise ProtocolError(f"a frame of kind {kind} came where one of kind {int(expected)} was expected")
            self._check_signature(signature, kind, length, memoryview(b""))

    def _fill_header(self) -> bool:
        """Reads from the socket once; returns True when the header of a frame is complete."""
        self._header_filled += self._read(self._header[self._header_filled :])
        return self._header_filled == _FRAME.size

    def _take_header(self) -> tuple[int, int, bytes]:
        self._header_filled = 0
        return _FRAME.unpack(self._header)

    def _fill(self, buffer: memoryview, deadline: float) -> None:
        try:
            while buffer:
                buffer = buffer[self._read(buffer) :]
                if buffer:
                    self._check_deadline(deadline, "sent")
        except OSError as error:
            raise _transport_error(error, "sent", self._timeout) from None

    def _read(self, buffer: memoryview) -> int:
        count = self._socket.recv_into(buffer)
        if count == 0:
            raise TransportError("the peer closed the connection")
        self._last_received = time.monotonic()
        return count

    # Both.

    def close(self) -> None:
        """Ends the connection; calls that wait for it on either side raise an exception. Any thread may call this."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def release(self, seconds: float = 0.0) -> None:
        """Ends the connection and releases its descriptor; only the receiving thread may call this.

        Args:
            seconds: the seconds in which the peer may still read the latest frames; frames of the peer are discarded.
        """
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while (left := end - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(1 << 16):
                    break
        self.close()
        with self._sending:
            self._socket.close()

    def _check_signature(self, signature: bytes, kind: int, length: int, content: memoryview) -> None:
        expected = self._sign(self._receiving_key, self._received, kind, length, content)
        self._received += 1
        if not hmac.compare_digest(signature, expected):
            raise ProtocolError("a frame is not signed by the peer")

    @staticmethod
    def _sign(key: bytes, sequence: int, kind: int, length: int, content: memoryview) -> bytes:
        signed = b"" if kind == FrameKind.TENSOR else content
        return hmac.digest(key, b"".join([_SIGNED.pack(sequence, kind, length), signed]), "sha256")[:16]

    def _deadline(self, length: int) -> float:
        return time.monotonic() + self._timeout + length / _MIN_BYTES_PER_SECOND

    def _check_deadline(self, deadline: float, verb: str) -> None:
        if time.monotonic() > deadline:
            raise SilenceError(f"the peer {verb} too little for {self._timeout:g} s")


def heartbeat_interval(timeout: float) -> float:
    """Returns the seconds between two heartbeats to a peer: a fifth of ``timeout``, at least 0.05 and at most 60.

    Args:
        timeout: the seconds without a byte after which the peer gives up the connection.
    """
    return min(max(timeout / 5, _MIN_HEARTBEAT_INTERVAL), _MAX_HEARTBEAT_INTERVAL)


def _transport_error(error: OSError, verb: str, timeout: float) -> TransportError:
    if isinstance(error, TransportError):
        return error
    if isinstance(error, TimeoutError):
        return SilenceError(f"the peer {verb} nothing for {timeout:g} s")
    return TransportError(error.strerror or str(error) or type(error).__name__)
