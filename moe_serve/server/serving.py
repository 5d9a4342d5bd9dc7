"""An application on accepted connections: uvicorn's server without its sockets and signals.

Whoever accepts gives connections here; this keeps their deadlines, and ends them gracefully.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from moe_serve.errors import MoeServeError
from moe_serve.server.limits import Limits
from moe_serve.server.protocol import CommonHeaders, GuardedProtocol

logger = logging.getLogger(__name__)

# applications whose clients are gone, to see that and end
_CLEAN_UP_S = 1.0


async def serving(
    app: Any, limits: Limits, on_gone: Callable[[], None], *, has_lifespan: bool = False
) -> Serving:
    """Return `app` ready to be given connections, on the running loop.

    app: ASGI 3. on_gone: called for each connection given, once, when it is no more. has_lifespan:
    the application is told of start and end. Raises MoeServeError if it then fails to start.
    """
    server = Serving(app, limits, on_gone, has_lifespan)
    await server.start()
    return server


class Serving:
    """The connections of one application. For the event loop's thread.

    refused: what was refused before the application saw it, by status.
    """

    def __init__(
        self, app: Any, limits: Limits, on_gone: Callable[[], None], has_lifespan: bool
    ) -> None:
        self.refused: Counter[int] = Counter()
        self._app = app
        self._limits = limits
        self._on_gone = on_gone
        self._config = uvicorn.Config(
            self._run,
            http=GuardedProtocol,
            ws="none",
            interface="asgi3",
            lifespan="on" if has_lifespan else "off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        self._config.load()
        self._lifespan = self._config.lifespan_class(self._config)
        self._state = ServerState()
        self._common = CommonHeaders()
        self._connecting: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._is_cut = False

    @property
    def num_connections(self) -> int:
        return len(self._state.connections)

    @property
    def num_requests(self) -> int:
        """How many responses were completed."""
        return self._state.total_requests

    async def start(self) -> None:
        await self._lifespan.startup()
        if self._lifespan.should_exit:
            raise MoeServeError("the application failed to start; its reason is in the log")
        self._common.set_date(time.time())
        self._ticker = asyncio.create_task(self._tick())

    def take(self, sock: socket.socket) -> None:
        """Serve an accepted connection, without waiting for it to be there."""
        task = asyncio.get_running_loop().create_task(self.connect(sock))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def connect(self, sock: socket.socket) -> None:
        """Serve an accepted, non-blocking connection. Returns when it is known here."""
        protocol = GuardedProtocol(
            self._config,
            self._state,
            self._lifespan.state,
            self._limits,
            self._common,
            self._on_gone,
            self.refused,
        )
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, sock)
        except OSError:  # it was gone before it was here
            sock.close()
            protocol.release()

    async def stop(self, limit_s: float) -> None:
        """Let responses that are under way end within limit_s, and cut the rest.

        Connections that wait for a request are closed at once, others after their response.
        """
        self._state.default_headers = [(b"connection", b"close")]
        for connection in list(self._state.connections):
            connection.shutdown()
        await self._wait_until_idle(limit_s)
        self._is_cut = True
        for connection in list(self._state.connections):
            assert isinstance(connection, GuardedProtocol)
            connection.cut()
        await self._wait_until_idle(_CLEAN_UP_S)
        left = [*self._state.tasks, *self._connecting]
        for task in left:
            task.cancel()
        if left:
            logger.warning("%d requests did not end with their connections", len(left))
            await asyncio.wait(left, timeout=_CLEAN_UP_S)
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.wait([self._ticker])
        await self._lifespan.shutdown()

    async def _wait_until_idle(self, limit_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        while self._state.connections or self._state.tasks or self._connecting:
            left_s = end - loop.time()
            if left_s <= 0:
                return
            await asyncio.sleep(min(0.05, left_s))

    async def _run(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._is_cut:
                raise

    async def _tick(self) -> None:
        limits = self._limits
        shortest_s = min(limits.header_s, limits.body_s, limits.idle_s, limits.write_s)
        period_s = min(0.5, max(0.02, shortest_s / 10))
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(period_s)
            self._common.set_date(time.time())
            now_s = loop.time()
            for connection in list(self._state.connections):
                assert isinstance(connection, GuardedProtocol)
                try:
                    connection.check(now_s)
                except Exception:
                    # one connection's trouble must not end the deadlines of all others
                    logger.exception("a connection's deadlines could not be checked; it is cut")
                    connection.transport.abort()
