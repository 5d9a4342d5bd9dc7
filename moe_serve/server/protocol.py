"""HTTP/1.1 on one connection: uvicorn's protocol with the deadlines and sizes it does not have.

h11 takes the bytes apart, uvicorn runs the application; here is what neither bounds. Whatever a
client does, its connection ends, and is told of once.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import re
import sys
import termios
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, Literal

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from moe_serve.server.limits import Limits
from moe_serve.server.refusals import Refusal

# what uvicorn warns of is what clients do; that is counted, not logged
_UVICORN = logging.getLogger("moe_serve.server.uvicorn")
_UVICORN.setLevel(logging.ERROR)

_BLANK_LINE = re.compile(rb"\n\r?\n")
_SMALL_CHUNK_BYTES = 64
# h11 takes apart all it is given before anybody else has a turn
_PIECE_BYTES = 2**14
# of a refused body: read to let its sender see the answer, as a multiple of what is allowed
_LINGER_BODIES = 4

_Event = h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]
_Phase = Literal["head", "body", "idle", "response"]


class CommonHeaders:
    """Headers of all responses, as bytes: h11 would check each again for each response."""

    def __init__(self) -> None:
        self.lines = b""

    def set_date(self, now: float) -> None:
        """now: seconds since the epoch."""
        date = formatdate(now, usegmt=True).encode("ascii")
        self.lines = b"date: " + date + b"\r\nx-content-type-options: nosniff\r\n"


class GuardedConnection(h11.Connection):
    """h11's state of a connection, which also refuses what is too large or means two things.

    refusal: why `next_event` raised RemoteProtocolError. num_sent: bytes given to the transport.
    on_held: called when `send` kept the head of a response for what follows it: if nothing does at
    once, it is to be fetched with `take_held`. One packet is cheaper than two.
    """

    def __init__(self, limits: Limits, common: CommonHeaders, on_held: Callable[[], None]) -> None:
        super().__init__(h11.SERVER, limits.header_bytes)
        self._limits = limits
        self._common = common
        self._on_held = on_held
        self._held = b""
        self._num_body_bytes = 0
        self._num_small_chunks = 0
        self.has_partial_head = False
        self.num_requests = 0
        self.num_sent = 0
        self.refusal: Refusal | None = None

    def next_event(self) -> _Event:
        if self.their_state is h11.IDLE:
            self._check_head()
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            if self.refusal is None:
                is_too_long = error.error_status_hint == 431
                self.refusal = _headers_too_large(self._limits) if is_too_long else _NOT_HTTP
            raise
        if isinstance(event, h11.Data):
            self._check_data(event)
        elif isinstance(event, h11.Request):
            self._check_request(event)
        return event

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        output = super().send(event)
        if output is None:
            return None
        if type(event) is h11.Response:
            # before the blank line
            output = output[:-2] + self._common.lines + b"\r\n"
            self.num_sent += len(output)
            self._held = output
            self._on_held()
            return b""
        self.num_sent += len(output)
        return self.take_held() + output if self._held else output

    def take_held(self) -> bytes:
        """Return what `send` kept, for the transport."""
        held, self._held = self._held, b""
        return held

    def _refuse(self, refusal: Refusal) -> None:
        self.refusal = refusal
        raise h11.RemoteProtocolError(refusal.message, refusal.status)

    def _check_head(self) -> None:
        """Refuse too large a head before h11 takes each of its lines apart."""
        data, _ = self.trailing_data
        self.has_partial_head = bool(data)
        if not data:
            return
        blank = _BLANK_LINE.search(data)
        num_bytes = blank.end() if blank else len(data)
        # beside the headers: the request line and the blank one
        num_headers = data.count(b"\n", 0, num_bytes) - 2
        if num_bytes > self._limits.header_bytes or num_headers > self._limits.header_count:
            self._refuse(_headers_too_large(self._limits))

    def _check_request(self, request: h11.Request) -> None:
        self.num_requests += 1
        self._num_body_bytes = self._num_small_chunks = 0
        self.has_partial_head = False
        if request.http_version not in (b"1.1", b"1.0"):
            self._refuse(Refusal(400, "only HTTP/1.1 and HTTP/1.0 are spoken here"))
        if not request.target.startswith(b"/"):
            # a whole URL, an authority or *: no route of ours, and two meanings of the host
            self._refuse(Refusal(400, "the target of a request must be a path"))
        length = None
        is_chunked = False
        for name, value in request.headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                is_chunked = True
            elif name == b"upgrade" and b"websocket" in value.lower():
                self._refuse(Refusal(400, "there are no websockets here"))
        if is_chunked and (length is not None or request.http_version == b"1.0"):
            # read otherwise by a proxy before us, its rest would be a request of somebody else
            self._refuse(Refusal(400, "the length of the body is given in two ways"))
        if length is not None and length > self._limits.body_bytes:
            self._refuse(_body_too_large(self._limits))

    def _check_data(self, data: h11.Data) -> None:
        size = len(data.data)
        self._num_body_bytes += size
        if self._num_body_bytes > self._limits.body_bytes:
            self._refuse(_body_too_large(self._limits))
        if data.chunk_start and data.chunk_end and size < _SMALL_CHUNK_BYTES:
            self._num_small_chunks += 1
            if self._num_small_chunks > self._limits.small_chunks:
                self._refuse(Refusal(400, "the body comes in too many small chunks"))


class GuardedProtocol(H11Protocol):
    """One connection. For the event loop's thread; `check` is to be called several times a second.

    on_gone: called once, when the connection is no more (or never was: `release`).
    refused: counts what was refused here, by status.
    The application finds in its scope's state "cut_connection", a function that ends the connection
    at once, without the rest of a response, and "is_refused", True, where its client was refused
    here while it ran.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        limits: Limits,
        common: CommonHeaders,
        on_gone: Callable[[], None],
        refused: Counter[int],
    ) -> None:
        super().__init__(config, server_state, {**app_state, "cut_connection": self.cut})
        self.logger = _UVICORN
        # it would log queries, whatever they hold
        self.access_log = False
        self.conn: GuardedConnection = GuardedConnection(limits, common, self._on_held)
        self._limits = limits
        self._on_gone = on_gone
        self._refused = refused
        self._is_released = False
        self._is_refused = False
        self._phase: _Phase = "head"
        self._num_requests = 0
        self._deadline_s: float | None = self.loop.time() + limits.header_s
        self._num_dropped = 0
        # when the client last took something of what waits for it, and how much it had taken then
        self._taken: int | None = None
        self._taken_at_s = 0.0

    # -- what asyncio calls ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            self._drop(len(data))
            return
        for start in range(0, len(data), _PIECE_BYTES):
            self.conn.receive_data(data[start : start + _PIECE_BYTES])
            self.handle_events()
            if self._is_refused or self.transport.is_closing():
                return
        self._note_phase()

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            super().connection_lost(exc)
        finally:
            self.release()

    def release(self) -> None:
        """Tell that the connection is gone, if that was not told."""
        if not self._is_released:
            self._is_released = True
            self._on_gone()

    # -- what uvicorn calls ------------------------------------------------------------------------

    def _should_upgrade(self) -> bool:
        # an offer of another protocol (h2c) may be ignored: the request is served as HTTP/1.1
        return False

    def send_400_response(self, msg: str) -> None:
        self._refuse(self.conn.refusal or _NOT_HTTP)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.DONE:
            self.conn.start_next_cycle()
            # the next request may be here already
            self.handle_events()
        self._note_phase()

    def shutdown(self) -> None:
        """Close now, or after the response that is under way."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
            return
        self.cycle.keep_alive = False
        if not self.cycle.response_started:
            self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]

    def _on_held(self) -> None:
        self.loop.call_soon(self._write_held)

    def _write_held(self) -> None:
        held = self.conn.take_held()
        if held and not self.transport.is_closing():
            self.transport.write(held)

    # -- deadlines ---------------------------------------------------------------------------------

    def check(self, now_s: float) -> None:
        """End the connection if its client is too slow. now_s: the loop's time."""
        if self._is_stalled(now_s):
            self.cut()
        elif self._deadline_s is not None and now_s >= self._deadline_s:
            self._expire()

    def cut(self) -> None:
        """End the connection at once; what was not sent yet never is."""
        self._disconnect()
        self.transport.abort()

    def _is_stalled(self, now_s: float) -> bool:
        """Tell whether for write_s the client took nothing of what waits to be sent."""
        waiting = self.transport.get_write_buffer_size()
        if not waiting:
            self._taken = None
            return False
        taken = self.conn.num_sent - waiting - _unacknowledged(self.transport)
        if taken != self._taken:
            self._taken, self._taken_at_s = taken, now_s
        return now_s - self._taken_at_s > self._limits.write_s

    def _note_phase(self) -> None:
        """See what the client owes us now, and until when."""
        phase: _Phase = "response"
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            phase = "body"
        elif state is h11.IDLE:
            is_head = self.conn.has_partial_head or not self.conn.num_requests
            phase = "head" if is_head else "idle"
        if phase == self._phase and self.conn.num_requests == self._num_requests:
            return
        limits = self._limits
        self._phase, self._num_requests = phase, self.conn.num_requests
        match phase:
            case "head":
                self._deadline_s = self.loop.time() + limits.header_s
            case "body":
                self._deadline_s = self.loop.time() + limits.body_s
            case "idle":
                self._deadline_s = self.loop.time() + limits.idle_s
            case _:
                self._deadline_s = None

    def _expire(self) -> None:
        if self._is_refused:
            self.transport.abort()
        elif self._phase == "body":
            # not while the application leaves what came where it is: then the client cannot
            if not self.flow.read_paused:
                self._refuse(Refusal(408, f"the body took more than {self._limits.body_s:g} s"))
        elif self.conn.has_partial_head:
            self._refuse(Refusal(408, f"the headers took more than {self._limits.header_s:g} s"))
        else:
            self.transport.close()

    # -- refusals ----------------------------------------------------------------------------------

    def _refuse(self, refusal: Refusal) -> None:
        """Answer with an error if there is no response yet, and close."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        is_ours = cycle is not None and not cycle.response_complete
        if is_ours:
            cycle.scope["state"]["is_refused"] = True
        self._refused[refusal.status] += 1
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # a response has begun or was sent already: nothing else can be said
            self._disconnect()
            self.transport.close()
            return
        self._disconnect()
        answer = refusal.wire(is_head=is_ours and cycle.scope["method"] == "HEAD")
        self.conn.num_sent += len(answer)
        self.transport.write(answer)
        # to close with bytes unread would reset the connection, and could take the answer away
        self._is_refused = True
        self._deadline_s = self.loop.time() + self._limits.linger_s
        self.transport.write_eof()
        self.flow.resume_reading()

    def _drop(self, num_bytes: int) -> None:
        self._num_dropped += num_bytes
        if self._num_dropped > _LINGER_BODIES * self._limits.body_bytes:
            self.transport.abort()

    def _disconnect(self) -> None:
        """Let the application see that nobody waits for its response."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.flow.resume_writing()


def _unacknowledged(transport: asyncio.Transport) -> int:
    """Return how many bytes the kernel holds that the client's has not taken; 0 if it cannot say.

    Without it a slow client would seem to take nothing: the kernel takes more from us only when a
    third of what it may hold is free.
    """
    count = bytearray(4)
    try:
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, count)
    except OSError:
        return 0
    return int.from_bytes(count, sys.byteorder)


_NOT_HTTP = Refusal(400, "this is no HTTP/1.1 request")


def _headers_too_large(limits: Limits) -> Refusal:
    message = (
        f"the request line and headers may have {limits.header_bytes} bytes, and be "
        f"{limits.header_count}"
    )
    return Refusal(431, message)


def _body_too_large(limits: Limits) -> Refusal:
    message = f"the body of a request may have {limits.body_bytes} bytes"
    return Refusal(413, message, code="body_too_large")
