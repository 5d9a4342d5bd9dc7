"""Connections to one HTTP/1.1 server, kept open between requests.

Own code instead of a client library, because the instrument often shares its cores with the server
it measures: a library costs several times as much for each chunk, and what it costs shows up as the
server's latency. The bytes come by asyncio's transports and not its streams: the time of a chunk is
then taken when the socket is read, not when a task wakes up for it. docs/log.md has the figures.

Redirects are not followed, nothing is compressed, no proxy is used.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from dataclasses import dataclass, field
from typing import Self, cast
from urllib.parse import urlsplit

from moe_serve.errors import ConfigError
from moe_serve.load.framing import AnswerFramer, AnswerSink, BadAnswer

__all__ = ["Address", "BadAnswer", "ConnectionFailed", "ConnectionPool"]


class ConnectionFailed(Exception):
    """A connection that cannot be made, or was lost before the answer's end."""


@dataclass(frozen=True, slots=True)
class Address:
    """A server's base URL. prefix: its path, without a slash at the end."""

    host: str
    port: int
    is_tls: bool
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read http://HOST:PORT, with a path or without; /v1 at its end is dropped.

        Raises ConfigError.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--base-url is {url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--base-url is {url!r}; write http://HOST:PORT or https://HOST")
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError(
                "--base-url has a user, a query or a fragment; write http://HOST:PORT"
            )
        if not url.isascii() or any(c.isspace() for c in url):
            raise ConfigError(f"--base-url is {url!r}; it must be ASCII without spaces")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(parts.hostname, port or (443 if is_tls else 80), is_tls, prefix)

    @property
    def name(self) -> str:
        """Return host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.is_tls else 'http'}://{self.name}{self.prefix}"


class _Connection(asyncio.Protocol):
    """One connection, which serves one request at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self.num_answers = 0
        self.has_answered = False  # at least a byte, to the request under way
        self._transport: asyncio.Transport | None = None
        self._framer: AnswerFramer | None = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        framer = self._framer
        if framer is None or framer.is_complete:  # nobody asked: it serves no further request
            self.close()
            return
        self.has_answered = True
        try:
            framer.feed(data)
        except BadAnswer as error:
            self._settle(error)
            self.close()
            return
        if framer.is_complete:
            self.num_answers += 1
            if not framer.keeps_open:
                self.close()
            self._settle(None)

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._framer is not None and not self._framer.is_complete:
            if error is None and self._framer.end():
                self._settle(None)
            else:
                where = "in the middle of" if self.has_answered else "before"
                why = f" ({error})" if error is not None else ""
                self._settle(ConnectionFailed(f"connection lost {where} the answer{why}"))

    async def exchange(self, request: bytes, sink: AnswerSink) -> None:
        """Send a request and give its answer to `sink`. Raises ConnectionFailed, BadAnswer.

        Cancelled, it closes the connection.
        """
        assert self._transport is not None
        self._framer = AnswerFramer(sink)
        self._done = asyncio.get_running_loop().create_future()
        self.has_answered = False
        if not self.is_open:
            raise ConnectionFailed("connection lost before the answer")
        self._transport.write(request)
        try:
            await self._done
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._framer = None
            self._done = None

    def close(self) -> None:
        """Close at once; what was not sent is dropped."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def _settle(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)


@dataclass
class ConnectionPool:
    """Sends requests to one server, over as many connections as there are requests at once.

    headers: sent with every request. num_connections: how many were made so far; num_resent:
    requests that met a kept connection which the server had closed, and were sent once more.
    """

    address: Address
    headers: dict[str, str]
    num_connections: int = 0
    num_resent: int = 0
    _idle: list[_Connection] = field(default_factory=list)
    _resolved: str | None = None  # the name server is asked once, not for every connection
    _tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        for name, value in self.headers.items():
            if not value.isascii() or not value.isprintable():
                raise ConfigError(f"the value of {name} has characters that no header can have")
        if self.address.is_tls:
            self._tls = ssl.create_default_context()
        lines = [f"host: {self.address.name}", *(f"{k}: {v}" for k, v in self.headers.items())]
        self._common = "\r\n".join(lines).encode("ascii")

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Return the bytes of a request for a path below the base URL."""
        of_body = b""
        if body is not None:
            of_body = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        first = f"{method} {self.address.prefix}{path} HTTP/1.1\r\n".encode("ascii")
        return b"%s%s\r\n%s\r\n%s" % (first, self._common, of_body, body or b"")

    async def exchange(self, request: bytes, sink: AnswerSink) -> None:
        """Send what `request` made and give the answer to `sink`.

        Raises ConnectionFailed, BadAnswer. The caller sets the deadline, by cancelling.
        """
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            try:
                await connection.exchange(request, sink)
            except ConnectionFailed:
                if connection.has_answered:
                    raise
                # it was closed while it was idle: that says nothing about this request
                self.num_resent += 1
                break
            self._keep(connection)
            return
        connection = await self._connect()
        await connection.exchange(request, sink)
        self._keep(connection)

    async def close(self) -> None:
        """Close the idle connections, and let the loop finish with them."""
        while self._idle:
            self._idle.pop().close()
        await asyncio.sleep(0)

    def _keep(self, connection: _Connection) -> None:
        if connection.is_open:
            self._idle.append(connection)

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            if self._resolved is None:
                self._resolved = await self._first_that_answers()
            _, connection = await loop.create_connection(
                _Connection,
                self._resolved,
                self.address.port,
                ssl=self._tls,
                server_hostname=self.address.host if self._tls is not None else None,
            )
        except OSError as error:
            raise ConnectionFailed(_why_not(error)) from error
        self.num_connections += 1
        return connection

    async def _first_that_answers(self) -> str:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(
            self.address.host, self.address.port, type=socket.SOCK_STREAM
        )
        hosts = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for host in hosts[:-1]:
            try:
                transport, _ = await loop.create_connection(
                    asyncio.Protocol, host, self.address.port
                )
            except OSError:  # such as ::1 of localhost where a server listens on 127.0.0.1 alone
                continue
            transport.abort()
            return host
        return hosts[-1]


def _why_not(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name is not known ({error.strerror})"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files: raise `ulimit -n`, or use --max-concurrency"
    # asyncio's own text names the address once more, or joins several
    return os.strerror(error.errno).lower() if error.errno else str(error)
