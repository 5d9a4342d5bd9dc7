"""The host of an engine without an engine, that does what a script says: for tests and benchmarks.

`FakeHost` listens on a unix socket in a thread of its own; `in_process` makes a client whose host
is in the same event loop, for tests that call an application directly. As a program it is a host in
a process of its own:

    python -m tests.server.fake_host SOCKET [--step-s S] [--max-model-len N]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import msgspec

from moe_serve.server.engine_client import EngineClient
from moe_serve.server.limits import DEFAULT_LIMITS, Limits
from moe_serve.server.messages import (
    Beat,
    Cancel,
    Drain,
    Drained,
    EngineState,
    ErrorKind,
    Failed,
    FrontBeat,
    Join,
    Outputs,
    Refused,
    Start,
    StopOutput,
    ToFront,
    ToHost,
    Welcome,
)
from moe_serve.text.tokenizer import Tokenizer
from moe_serve.types import FinishReason, Request, StepOutput, TokenLogprobs

_LENGTH = struct.Struct("<I")
NUMERICS_ID = "fake"


@dataclass(frozen=True, kw_only=True)
class Script:
    """What happens to one request.

    reply: its tokens, over again until max_tokens. first_s: before its first step; step_s: before
    each. refusal: it is not taken. error: its outputs end so after `error_after` tokens;
    is_refused: it is the request's own fault.
    is_frozen: nothing comes. num_cached: prompt tokens said to have been in the cache.
    tokens_per_step: of each output. is_aligned: steps are at whole multiples of step_s, so that all
    requests have theirs together, as an engine's batch has.
    """

    reply: Sequence[int] = ()
    first_s: float = 0.0
    step_s: float = 0.0
    refusal: tuple[ErrorKind, str] | None = None
    error: str | None = None
    error_after: int = 0
    is_refused: bool = False
    is_frozen: bool = False
    num_cached: int = 0
    tokens_per_step: int = 1
    is_aligned: bool = False


Scripted = Callable[[Request], Script]


def echo(request: Request) -> Script:
    """Say the prompt again."""
    return Script(reply=request.prompt_ids)


def logprobs_of(token_id: int, num_top: int) -> TokenLogprobs:
    """Return what this model says of a token: the more likely, the lower its id's last digit."""
    logprob = -0.25 * (1 + token_id % 10)
    top = ((token_id, logprob), *((other, logprob - 1 - other) for other in range(40, 60)))
    return TokenLogprobs(token_id, logprob, 1, top[:num_top])


@dataclass
class FakeModel:
    """The engine: all that is asked of it is in `started`, `cancelled` and `stopped`."""

    script: Scripted = echo
    max_model_len: int = 256
    started: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    stopped: list[tuple[str, int]] = field(default_factory=list)
    num_steps: int = 0

    def welcome(self) -> Welcome:
        return Welcome(self.max_model_len, NUMERICS_ID, "")

    def outputs(self, request: Request, script: Script, start: int) -> list[StepOutput]:
        """Return the step that begins with token `start` of every output."""
        self.num_steps += 1
        sampling = request.sampling
        most = sampling.max_tokens or 64
        most = min(most, self.max_model_len - len(request.prompt_ids))
        found = []
        for index in range(sampling.n):
            count = min(script.tokens_per_step, most - start)
            if script.error is not None and start >= script.error_after:
                ended = StepOutput(request.request_id, index, (), (), "error", error=script.error,
                                   is_refused=script.is_refused)  # fmt: skip
                found.append(ended)
                continue
            reply = script.reply
            ids = tuple(reply[(index + start + i) % len(reply)] for i in range(count))
            reason: FinishReason | None = "length" if start + count >= most else None
            ends = request.eos_token_ids if not sampling.ignore_eos else frozenset()
            for place, token_id in enumerate(ids):
                if token_id in ends or token_id in sampling.stop_token_ids:
                    ids, reason = ids[: place + 1], "stop"
                    break
            entries: tuple[TokenLogprobs, ...] = ()
            if sampling.logprobs is not None:
                entries = tuple(logprobs_of(token_id, sampling.logprobs) for token_id in ids)
            prompt = None
            if start == 0 and index == 0 and sampling.prompt_logprobs is not None:
                num_top = sampling.prompt_logprobs
                prompt = (None, *(logprobs_of(i, num_top) for i in request.prompt_ids[1:]))
            found.append(
                StepOutput(
                    request.request_id,
                    index,
                    ids,
                    entries,
                    reason,
                    prompt,
                    num_cached_tokens=script.num_cached,
                )
            )
        return found


class Session:
    """One front end's connection. `say` sends it a message."""

    def __init__(self, model: FakeModel, say: Callable[[ToFront], None]) -> None:
        self.model = model
        self.say = say
        self.has_joined = False
        self.is_drained = False
        self.state: EngineState = "serving"
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ended: set[tuple[str, int]] = set()
        self._emitted: list[StepOutput] = []
        self._decoder: msgspec.msgpack.Decoder[ToHost] = msgspec.msgpack.Decoder(cast(Any, ToHost))
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take in bytes of the front end."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if len(self._buffer) < 4 + length:
                return
            message = self._decoder.decode(bytes(self._buffer[4 : 4 + length]))
            del self._buffer[: 4 + length]
            self._take(message)

    def _take(self, message: ToHost) -> None:
        match message:
            case Join():
                self.welcome()
            case Start(request):
                self.model.started.append(request)
                task = asyncio.get_running_loop().create_task(self._run(request))
                self._tasks[request.request_id] = task
            case Cancel(request_id):
                self.model.cancelled.append(request_id)
                task_ = self._tasks.pop(request_id, None)
                if task_ is not None:
                    task_.cancel()
            case StopOutput(request_id, index):
                self.model.stopped.append((request_id, index))
                self._ended.add((request_id, index))
            case Drained():
                self.is_drained = True
            case FrontBeat():
                pass

    async def _run(self, request: Request) -> None:
        script = self.model.script(request)
        if script.refusal is not None:
            self.say(Refused(request.request_id, *script.refusal))
            return
        await asyncio.sleep(script.first_s)
        if script.is_frozen:
            await asyncio.Event().wait()
        start = 0
        while True:
            steps = self.model.outputs(request, script, start)
            steps = [step for step in steps if (step.request_id, step.index) not in self._ended]
            for step in steps:
                if step.finish_reason is not None:
                    self._ended.add((step.request_id, step.index))
            if steps:
                self._emit(steps)
            ids = [(request.request_id, index) for index in range(request.sampling.n)]
            if self._ended.issuperset(ids):
                break
            start += script.tokens_per_step
            rest_s = script.step_s
            if script.is_aligned:
                rest_s -= asyncio.get_running_loop().time() % script.step_s
            await asyncio.sleep(rest_s)
        self._ended.difference_update(ids)
        self._tasks.pop(request.request_id, None)

    def _emit(self, steps: list[StepOutput]) -> None:
        """Send steps, together with those of other requests that come at the same time."""
        if not self._emitted:
            asyncio.get_running_loop().call_soon(self._flush)
        self._emitted += steps

    def _flush(self) -> None:
        self.say(Outputs(tuple(self._emitted)))
        self._emitted = []

    def welcome(self) -> None:
        self.has_joined = True
        self.say(self.model.welcome())
        self.beat()

    def beat(self) -> None:
        """Give a sign of life."""
        self.say(Beat(self.state, 1, self.model.num_steps))

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()


def _framed(message: ToFront) -> bytes:
    data = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(data)) + data


class FakeHost:
    """A host on a unix socket, in a thread. Use as a context manager.

    state: what its beats say. is_silent: it sends no beats.
    """

    def __init__(self, path: Path, model: FakeModel | None = None, *, beat_s: float = 0.2) -> None:
        self.path = path
        self.model = model or FakeModel()
        self.sessions: list[Session] = []
        self.state: EngineState = "serving"
        self.is_silent = False
        self._beat_s = beat_s
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._is_up = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._is_up.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def tell(self, message: ToFront) -> None:
        """Say something to every front end, from any thread."""

        def say() -> None:
            for session in self.sessions:
                session.say(message)

        self._loop.call_soon_threadsafe(say)

    def drain(self, limit_s: float = 5.0) -> None:
        self.state = "draining"
        self.tell(Drain(limit_s))

    def fail(self, why: str) -> None:
        self.tell(Failed(why))

    def hang_up(self) -> None:
        """Close all connections."""

        def close() -> None:
            for connection in list(self._open):
                connection.hang_up()

        self._loop.call_soon_threadsafe(close)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._open: set[_Connection] = set()
        self._loop.run_until_complete(self._start())
        self._is_up.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        assert self._server is not None
        self._server.close()
        for connection in list(self._open):
            connection.hang_up()
        self._loop.run_until_complete(asyncio.sleep(0.01))
        self._loop.close()

    async def _start(self) -> None:
        self._server = await self._loop.create_unix_server(
            lambda: _Connection(self), path=str(self.path)
        )
        self._beat()

    def _beat(self) -> None:
        for session in self.sessions:
            session.state = self.state
            if not self.is_silent and session.has_joined:
                session.beat()
        self._loop.call_later(self._beat_s, self._beat)


class _Connection(asyncio.Protocol):
    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        host = self._host
        self._session = Session(host.model, lambda message: self._transport.write(_framed(message)))
        host.sessions.append(self._session)
        host._open.add(self)

    def data_received(self, data: bytes) -> None:
        self._session.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._session.close()
        self._host._open.discard(self)
        self._host.sessions.remove(self._session)

    def hang_up(self) -> None:
        self._transport.close()


class _Looped:
    """A transport whose other end is a `Session` in whatever event loop runs."""

    def __init__(self, client: EngineClient, model: FakeModel) -> None:
        self._client = client
        self.session = Session(model, self._say)

    def _say(self, message: ToFront) -> None:
        data = _framed(message)
        if isinstance(message, Welcome | Beat):  # a client is being made, maybe without a loop
            self._client.data_received(data)
        else:
            asyncio.get_running_loop().call_soon(self._client.data_received, data)

    def write(self, data: bytes) -> None:
        self.session.feed(data)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        self.session.close()


class InProcessClient(EngineClient):
    """A client that is welcome as soon as it is made, and whose host never is silent."""

    def __init__(
        self,
        model: FakeModel | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(tokenizer, limits=limits)
        self.model = model or FakeModel()
        self.looped = _Looped(self, self.model)
        self._transport = cast(asyncio.Transport, self.looped)
        self.looped.session.welcome()

    @property
    def silent_s(self) -> float:
        return 0.0


async def connect(
    host: FakeHost, tokenizer: Tokenizer | None = None, **options: Any
) -> EngineClient:
    """Return a client of `host`, which has said that it serves."""
    client = EngineClient(tokenizer, **options)
    await asyncio.get_running_loop().create_unix_connection(lambda: client, str(host.path))
    await client.wait_until_welcome()
    while client.beat is None:
        await asyncio.sleep(0.005)
    return client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("socket", type=Path)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--max-model-len", type=int, default=4096)
    options = parser.parse_args()

    def script(request: Request) -> Script:
        step_s = options.step_s
        return Script(reply=request.prompt_ids, step_s=step_s, is_aligned=step_s > 0)

    model = FakeModel(script, options.max_model_len)
    with (
        FakeHost(options.socket, model),
        contextlib.suppress(KeyboardInterrupt),
    ):
        threading.Event().wait()


if __name__ == "__main__":
    main()
