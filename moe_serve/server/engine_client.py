"""A front end's end of the socket to its engine: requests out, tokens in, all on one event loop.

Nothing is queued for whoever waits: what comes is taken into the request's state at once, and who
asks finds all there is. So a client that reads slowly costs no memory and delays nobody.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import struct
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec

from moe_serve.channel import MOST_BYTES
from moe_serve.errors import MoeServeError
from moe_serve.server.limits import DEFAULT_LIMITS, Limits
from moe_serve.server.messages import (
    SILENT_AFTER_S,
    Beat,
    Cancel,
    Drain,
    Drained,
    EngineState,
    Failed,
    FrontBeat,
    Join,
    Outputs,
    Refused,
    Start,
    StatsReport,
    StopOutput,
    ToFront,
    ToHost,
    Welcome,
)
from moe_serve.server.queue_wait import QueueWait
from moe_serve.text.prompts import PreparedRequest
from moe_serve.text.request_output import RequestState
from moe_serve.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
_MOST_RETRY_S = 60


class Unavailable(MoeServeError):
    """A request that cannot be served now. status: of HTTP; retry_after_s: when it may be."""

    def __init__(self, message: str, *, retry_after_s: int = 1, status: int = 503) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.status = status


class Running:
    """A request that the engine has: `state` is all that came for it so far.

    request_id: the engine's for it, that no other one of this client has had: what was on its way
    when one was dropped is not taken for the next one's of the same name. failure: why it ended
    otherwise than by its outputs, or None. For one reader, who may wait for several requests at
    once by giving them the same `news`.
    """

    def __init__(
        self, request_id: str, state: RequestState, news: asyncio.Event | None = None
    ) -> None:
        self.request_id = request_id
        self.state = state
        self.failure: Refused | Unavailable | None = None
        self.is_queued = True
        self.last_s: float | None = None
        self._news = news or asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self.failure is not None or self.state.is_finished

    async def changed(self) -> None:
        """Return when something came since the last call: maybe many tokens, or `failure`."""
        await self._news.wait()
        self._news.clear()

    def tell(self) -> None:
        """Wake who waits in `changed`."""
        self._news.set()


class EngineClient(asyncio.Protocol):
    """The engine, as a front end sees it. All methods are for the event loop's thread.

    on_gap: told the seconds between two tokens of a request, and of how many it is so: those that
    came together have the same share; on_tokens: how many tokens came. on_drain: called when the
    host says to take nothing new; on_end: when the host is gone or has failed, with the reason.
    max_queue_wait_s: refuse what would wait longer for its turn, as far as the latest first tokens
    tell.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        limits: Limits = DEFAULT_LIMITS,
        max_queue_wait_s: float | None = None,
        on_drain: Callable[[Drain], None] = lambda drain: None,
        on_end: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_queue_wait_s = max_queue_wait_s
        self._on_drain = on_drain
        self._on_end = on_end
        self._decoder: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(
            cast(Any, ToFront)
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._outgoing = bytearray()
        self._running: dict[str, Running] = {}
        self._num_started = 0
        self._queue = QueueWait()
        self._last_s = time.monotonic()
        self._welcomed = asyncio.Event()
        self._closed = asyncio.Event()
        self.welcome: Welcome | None = None
        self.beat: Beat | None = None
        self.report: StatsReport | None = None
        self.failed: Failed | None = None
        self.is_draining = False
        self.on_gap: Callable[[float, int], None] | None = None
        self.on_tokens: Callable[[int], None] | None = None
        self.ended: str | None = None

    # -- what a front end asks ---------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """How many requests the engine has, those that wait for their first token included."""
        return len(self._running)

    @property
    def num_queued(self) -> int:
        """How many requests wait for their first token."""
        return len(self._queue)

    @property
    def queued_tokens(self) -> int:
        """The tokens of their prompts."""
        return self._queue.tokens

    @property
    def silent_s(self) -> float:
        """How long ago the host gave a sign of life, in seconds."""
        return time.monotonic() - self._last_s

    @property
    def state(self) -> EngineState:
        if self.ended is not None:
            return "failed"
        if self.is_draining:
            return "draining"
        if self.welcome is None or self.beat is None:
            return "loading"
        return self.beat.state

    @property
    def why_not_ready(self) -> str | None:
        """Why a request would be refused now; None: it would not be."""
        if self.ended is not None:
            return f"the engine has ended: {self.ended}"
        if self.silent_s > SILENT_AFTER_S:
            return f"the engine has given no sign of life for {self.silent_s:.0f} s"
        told = {
            "loading": "the model is being loaded",
            "reforming": "a process of the engine was lost; the model is being loaded again",
            "draining": "the server is shutting down",
            "failed": "the engine has failed",
        }
        return told.get(self.state)

    async def wait_until_welcome(self) -> Welcome:
        """Return when the engine is there for the first time. Raises Unavailable if it never is."""
        await self._welcomed.wait()
        if self.welcome is None:
            raise Unavailable(f"the engine has ended: {self.ended}")
        return self.welcome

    def check(self, num_tokens: int = 1, num_requests: int = 1) -> None:
        """Raise Unavailable where so many requests could not be taken now.

        num_tokens: of all their prompts.
        """
        if self.state not in ("serving", "reforming") or self.silent_s > SILENT_AFTER_S:
            raise Unavailable(self.why_not_ready or "not ready", retry_after_s=5)
        self._refuse_if_full(num_tokens, num_requests)

    def start(self, prepared: PreparedRequest, news: asyncio.Event | None = None) -> Running:
        """Give the engine a request. Raises Unavailable where it cannot take it now.

        news: set whenever something came, for who waits for several; see `Running`. While a lost
        world is formed anew, requests wait for it as for their turn.
        """
        self.check(len(prepared.request.prompt_ids))
        return self.start_checked(prepared, news)

    def start_checked(
        self, prepared: PreparedRequest, news: asyncio.Event | None = None
    ) -> Running:
        """Give the engine one of the requests that `check` has just let in, as `start` does."""
        request = prepared.request
        self._num_started += 1
        request_id = f"{request.request_id}-{self._num_started}"
        state = RequestState(request, prepared.prompt, self._tokenizer)
        running = Running(request_id, state, news)
        self.send(Start(dataclasses.replace(request, request_id=request_id)))
        self._running[request_id] = running
        self._queue.join(request_id, len(request.prompt_ids))
        return running

    def cancel(self, running: Running) -> bool:
        """Drop a request, wherever it is; return whether it was there. Who waits for it hears."""
        if running.request_id not in self._running:
            return False
        self.send(Cancel(running.request_id))
        running.state.abort()
        self._forget(running)
        running.tell()
        return True

    def cut(self, why: str) -> None:
        """End all that runs with `Unavailable`, and have the engine drop it."""
        for running in list(self._running.values()):
            self.send(Cancel(running.request_id))
            self._fail(running, why)

    def give_up_silent(self) -> None:
        """End all that runs: the host has given no sign of life for too long.

        If it comes back it finds that nobody waits any more, and the next requests are served.
        """
        self.cut(f"the engine has given no sign of life for {self.silent_s:.0f} s")

    async def wait_until_closed(self) -> None:
        """Return when the host has closed the connection."""
        await self._closed.wait()

    def finished_drain(self) -> None:
        """Tell the host that every answer was sent."""
        self.send(Drained())
        self.flush()

    def close(self) -> None:
        """Write what was sent, and close the connection."""
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def leave(self) -> None:
        """Say nothing more: the host hears that nobody is there, and may have last words."""
        self.flush()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    def lose(self, why: str) -> None:
        """Let go of a host that cannot be understood, or is silent: all that runs ends."""
        logger.error("the engine's host: %s", why)
        self._end(why)
        if self._transport is not None:
            self._transport.abort()

    def send_beat(self, num_open: int) -> None:
        """Give the host a sign of life. num_open: HTTP requests begun and not ended."""
        self.send(FrontBeat(num_open))

    def send(self, message: ToHost) -> None:
        """Send a message, with all others of this turn of the event loop in one write."""
        data = self._encoder.encode(message)
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self.flush)
        self._outgoing += _LENGTH.pack(len(data)) + data

    def flush(self) -> None:
        """Write what was sent and waits for the end of the event loop's turn."""
        data, self._outgoing = self._outgoing, bytearray()
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    # -- what the host says ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._last_s = time.monotonic()
        self.send(Join())

    def data_received(self, data: bytes) -> None:
        self._last_s = time.monotonic()
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MOST_BYTES:
                self.lose(f"it said a message of {length} bytes")
                return
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            try:
                self._take(
                    self._decoder.decode(memoryview(self._buffer)[start + _LENGTH.size : end])
                )
            except msgspec.DecodeError as error:
                self.lose(f"it said what is no message: {error}")
                return
            except Exception:  # what it says from now on may not fit what is known here
                logger.exception("a message of the engine's host")
                self.lose("what it said could not be taken in")
                return
            start = end
        del self._buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("the connection to it was closed")
        self._closed.set()

    def _take(self, message: ToFront) -> None:
        match message:
            case Outputs(outputs=outputs):
                self._update(outputs)
            case Beat():
                self.beat = message
            case StatsReport():
                self.report = message
            case Refused(request_id=request_id, message=why):
                running = self._running.get(request_id)
                if running is not None:
                    name = running.state.request.request_id  # as who asked knows it
                    why = why.replace(request_id, name)
                    running.failure = msgspec.structs.replace(message, message=why)
                    self._forget(running)
                    running.tell()
            case Welcome():
                self.welcome = message
                self._welcomed.set()
            case Drain():
                self.is_draining = True
                self._on_drain(message)
            case Failed(message=why):
                self.failed = message
                self._end(why)

    def _update(self, outputs: tuple[Any, ...]) -> None:
        now_s = time.monotonic()
        if self.on_tokens is not None:
            self.on_tokens(sum(len(step.token_ids) for step in outputs))
        for step in outputs:
            running = self._running.get(step.request_id)
            if running is None:
                continue
            if running.is_queued:
                running.is_queued = False
                self._queue.serve(running.request_id)
            elif running.last_s is not None and running.last_s < now_s and self.on_gap is not None:
                num_tokens = max(1, len(step.token_ids))
                self.on_gap((now_s - running.last_s) / num_tokens, num_tokens)
            running.last_s = now_s
            try:
                has_stopped = running.state.update(step, now_s)
            except Exception as error:  # of one request's text, and no other's
                logger.exception("the text of request %s", step.request_id)
                self.send(Cancel(step.request_id))
                why = f"its text could not be made: {type(error).__name__}: {error}"
                running.failure = Refused(step.request_id, "engine", why)
                self._forget(running)
                running.tell()
                continue
            if has_stopped:
                self.send(StopOutput(step.request_id, step.index))
            if running.state.is_finished:
                self._forget(running)
            running.tell()

    def _end(self, why: str) -> None:
        if self.ended is not None:
            return
        self.ended = why
        self._welcomed.set()
        told = "the server is shutting down" if self.is_draining else f"the engine was lost: {why}"
        for running in list(self._running.values()):
            self._fail(running, told)
        self._on_end(why)

    def _fail(self, running: Running, why: str) -> None:
        running.failure = Unavailable(why, retry_after_s=5)
        self._forget(running)
        running.tell()

    # -- books -------------------------------------------------------------------------------------

    def _forget(self, running: Running) -> None:
        running.is_queued = False
        self._queue.leave(running.request_id)
        self._running.pop(running.request_id, None)

    def _refuse_if_full(self, num_tokens: int, num_requests: int) -> None:
        limits = self._limits
        wait_s = self._queue.guess_s()
        if self.num_queued + num_requests > limits.queue_requests:
            why = (
                f"{self.num_queued} requests wait for their first token, and "
                f"{limits.queue_requests} may"
            )
            if num_requests > 1:
                why += f"; here are {num_requests} more"
        elif self.num_queued and self.queued_tokens + num_tokens > limits.queue_tokens:
            why = (
                f"prompts of {self.queued_tokens} tokens wait, and with these {num_tokens} "
                f"they would be more than {limits.queue_tokens}"
            )
        elif self._max_queue_wait_s is not None and wait_s > self._max_queue_wait_s:
            why = f"the queue takes about {wait_s:.1f} s, and may take {self._max_queue_wait_s:g} s"
        else:
            return
        retry_s = min(_MOST_RETRY_S, max(1, math.ceil(wait_s)))
        raise Unavailable(f"{why}; try again later", retry_after_s=retry_s)
