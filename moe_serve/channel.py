"""Messages over a stream socket: length, then msgpack. No pickle: data and nothing else."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Any, Generic, TypeVar

import msgspec

from moe_serve.errors import CommError, RequestError

_LENGTH = struct.Struct("<I")
MOST_BYTES = 2**30

Incoming = TypeVar("Incoming")


class Closed(CommError):
    """The other side is gone."""


def encoded(message: msgspec.Struct) -> bytes:
    """Return a message as it travels. Raises RequestError for what cannot be said."""
    try:
        data = msgspec.msgpack.encode(message)
    except (ValueError, OverflowError, TypeError) as error:
        raise RequestError(f"a request that cannot be sent to a rank: {error}") from error
    if len(data) > MOST_BYTES:
        raise RequestError(f"a request of {len(data)} bytes; {MOST_BYTES} are the most")
    return data


class Channel(Generic[Incoming]):
    """One end of a connection. Any thread may send; one may receive."""

    def __init__(self, connection: socket.socket, incoming: Any) -> None:
        """incoming: the type, a union of Structs, of what the other side may say."""
        self._socket = connection
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._sending = threading.Lock()
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: msgspec.Struct) -> None:
        """Send one message. Raises Closed."""
        self.send_encoded(encoded(message))

    def send_encoded(self, data: bytes) -> None:
        """Send what `encoded` gave. Raises Closed."""
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise Closed(f"the connection is gone ({error.strerror or error})") from error

    def receive(self, limit_s: float | None = None) -> Incoming:
        """Wait for one message. Raises Closed at the end, CommError for what is no message.

        limit_s: TimeoutError is raised after so long without a byte.
        """
        self._socket.settimeout(limit_s)
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > MOST_BYTES:
            raise CommError(f"a message of {length} bytes; {MOST_BYTES} are the most")
        try:
            return self._decoder.decode(self._exactly(length))
        except msgspec.DecodeError as error:
            raise CommError(f"not a message: {error}") from error

    def check(self) -> None:
        """Raise Closed if the other side is gone, as far as what it said was read."""
        try:
            is_gone = self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return
        except OSError:
            is_gone = True
        if is_gone:
            raise Closed("the connection was closed")

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Close it; who receives at the other end, or at this one, gets Closed."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._socket.recv(min(size - len(parts), 2**20))
            except TimeoutError:
                raise
            except OSError as error:
                raise Closed(f"the connection is gone ({error.strerror or error})") from error
            if not part:
                raise Closed("the connection was closed")
            parts += part
        return bytes(parts)
