"""An application on uvicorn in a thread, its client connected to a fake host."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path
from typing import Any, Self

import uvicorn

from moe_serve.server.routes import build_app
from moe_serve.server.state import FrontState
from tests.server.fake_host import FakeHost, FakeModel, connect
from tests.server.fronts import demo_texts, state_of


class Served:
    """Use as a context manager; `url` is where it listens."""

    def __init__(self, folder: Path, model: FakeModel | None = None, **options: Any) -> None:
        self.model = model or FakeModel()
        self.host = FakeHost(folder / "host.sock", self.model)
        self._options = options
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.state: FrontState
        self._server: uvicorn.Server

    def __enter__(self) -> Self:
        self.host.__enter__()
        self._thread.start()
        assert self._is_up.wait(20)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self.host.__exit__()
        self._socket.close()

    async def _serve(self) -> None:
        client = await connect(self.host, demo_texts().tokenizer)
        self.state = state_of(client, **self._options)
        config = uvicorn.Config(
            build_app(self.state), http="h11", loop="asyncio", lifespan="off", log_config=None
        )
        self._server = uvicorn.Server(config)
        self._is_up.set()
        await self._server.serve(sockets=[self._socket])
        self.host.hang_up()
        await client.wait_until_closed()
        await asyncio.sleep(0.005)  # the socket is closed after the client was told
        self.state.close()
