"""`python -m moe_serve.launch.child front_end FILES ...`: the process that talks to clients.

It has connections, texts and the books of what is being served; the engine is its parent's. It gets
the listening socket and its end of the connection to the host as open files, and over that what it
is made of: keys are on no disk, and in nobody's list of processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from pathlib import Path
from typing import Any

import msgspec

from moe_serve.channel import Channel, Closed
from moe_serve.errors import MoeServeError
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.server.dashboard import dashboard_routes
from moe_serve.server.doorway import Doorway, ensure_descriptors
from moe_serve.server.engine_client import EngineClient
from moe_serve.server.guard import Guard
from moe_serve.server.heap import Heap
from moe_serve.server.messages import BEAT_S, SILENT_AFTER_S, CannotStart, Drain
from moe_serve.server.metrics import Metrics
from moe_serve.server.options import ServerConfig
from moe_serve.server.routes import build_app
from moe_serve.server.serving import Serving, serving
from moe_serve.server.state import FrontState
from moe_serve.text.model_texts import ModelTexts

logger = logging.getLogger(__name__)

# an event loop that is busy for longer is taken to hang
_HANGS_AFTER_S = 15.0
# for answers that end with an error to go out
_LAST_WORDS_S = 2.0


class FrontOptions(msgspec.Struct, frozen=True):
    """What a front end is made of. model, tokenizer: folders; server: leaves of `ServerConfig`.

    seed: see `FrontState`.
    """

    model: str
    name: str
    version: str
    tokenizer: str | None
    chat_template: str | None
    server: dict[str, Any]
    seed: int | None = None


def main(files: str) -> int:
    """Serve until the host is gone or says that it is over; return the exit code.

    files: the descriptors of the listening socket and of the connection to the host, which says
    first, as `FrontOptions`, what this is made of.
    """
    # for the host, which then lets this one drain
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="moe-serve: front end: %(message)s")
    listener, host = (socket.socket(fileno=int(descriptor)) for descriptor in files.split(":"))
    channel: Channel[FrontOptions] = Channel(host, FrontOptions)
    try:
        front = FrontEnd(channel.receive())
    except Closed:
        return 1
    except MoeServeError as error:
        channel.send(CannotStart(type(error).__name__, str(error)))
        return error.exit_code
    return asyncio.run(front.run(listener, host))


class FrontEnd:
    """One front end, from its start to its end. For the event loop's thread."""

    def __init__(self, options: FrontOptions) -> None:
        self._server = ServerConfig.from_options(options.server)
        limits = self._limits = self._server.limits
        folder = Path(options.model)
        texts = ModelTexts.read(
            folder,
            read_spec(HFConfig.read(folder)).vocab_size,
            tokenizer_folder=None if options.tokenizer is None else Path(options.tokenizer),
            chat_template=None if options.chat_template is None else Path(options.chat_template),
        )
        self._client = EngineClient(
            texts.tokenizer,
            limits=limits,
            max_queue_wait_s=self._server.service.max_queue_wait,
            on_drain=self._drain,
            on_end=lambda why: self._over.set(),
        )
        self._state = FrontState(
            client=self._client,
            texts=texts,
            server=self._server,
            model=options.name,
            created=int(time.time()),
            version=options.version,
            seed=options.seed,
        )
        self._metrics = Metrics(self._client, self._state)
        app = build_app(self._state)
        app.router.routes.extend(dashboard_routes(self._metrics.snapshot))
        network = self._server.network
        self._guard = Guard(
            app,
            limits,
            listens_on=network.host,
            keys=network.keys,
            allowed_hosts=network.hosts,
            max_per_key=self._server.service.max_requests_per_key,
        )
        self._over = asyncio.Event()
        self._tick_s = time.monotonic()
        self._heap = Heap()
        self._background: set[asyncio.Task[None]] = set()

    async def run(self, listener: socket.socket, host: socket.socket) -> int:
        """Serve on `listener`, for the host at the other end of `host`; return the exit code."""
        ensure_descriptors(self._limits)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self._client, sock=host)
        connections: Serving

        def hand_over(sock: socket.socket) -> None:
            loop.call_soon_threadsafe(connections.take, sock)

        door = Doorway(listener, self._limits, self.liveness, hand_over)
        connections = await serving(self._guard, self._limits, door.release)
        self._metrics.watch(door, connections, self._guard)
        gc.freeze()  # what is there now stays: it is not looked through again and again
        door.start()
        self._start(self._beat())
        await self._over.wait()
        # who waits for an answer has been told that there is none; let it go out
        await connections.stop(_LAST_WORDS_S)
        door.stop()
        self._client.finished_drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._client.wait_until_closed(), _LAST_WORDS_S)
        self._state.close()
        return 0 if self._client.is_draining else 1

    def liveness(self) -> tuple[bool, str]:
        """Tell whether this process, and the host as far as it can know, are alive. Any thread."""
        busy_s = time.monotonic() - self._tick_s
        if busy_s > _HANGS_AFTER_S:
            return False, f"the event loop has been busy for {busy_s:.0f} s"
        # a busy loop hears nothing of the host: that is no sign of its end
        if busy_s < 2 * BEAT_S and self._client.silent_s > SILENT_AFTER_S + BEAT_S:
            return False, f"the engine's host has been silent for {self._client.silent_s:.0f} s"
        return True, ""

    def _drain(self, drain: Drain) -> None:
        self._start(self._end_after(drain.limit_s))

    async def _end_after(self, limit_s: float) -> None:
        """Wait until nothing runs any more, or so long, and end what is left."""
        end_s = time.monotonic() + limit_s
        while self._guard.num_generating and time.monotonic() < end_s:
            await asyncio.sleep(0.02)
        self._client.cut("the server is shutting down")
        self._over.set()

    async def _beat(self) -> None:
        """Tell the host that this process lives, and end requests when the host does not.

        And give back what memory they have left behind.
        """
        while True:
            self._tick_s = time.monotonic()
            self._client.send_beat(self._guard.num_generating)
            self._heap.tick(self._guard.num_generating)
            if self._client.silent_s > SILENT_AFTER_S:
                self._client.give_up_silent()
            await asyncio.sleep(BEAT_S / 2)

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
