"""`AsyncLLM`: an engine in other processes, and prompts to texts through it from an event loop.

Tokenising, seeds and texts are here; the engine, and who starts lost ranks again, is in a host
process below this one. Many tasks may use one `AsyncLLM`; all of them in the loop it was made in.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from moe_serve.config import EngineConfig
from moe_serve.engine.engine import EngineStats
from moe_serve.errors import CapacityError, CommError, ConfigError, MoeServeError, RequestError
from moe_serve.launch.environment import read_environment
from moe_serve.launch.host_process import HostProcess
from moe_serve.launch.messages import Failure
from moe_serve.launch.named_model import NamedModel, find_model
from moe_serve.server.engine_client import EngineClient, Running, Unavailable
from moe_serve.server.limits import DEFAULT_LIMITS
from moe_serve.server.messages import SILENT_AFTER_S, Welcome
from moe_serve.text.prompts import Message, PreparedRequest, Prompt
from moe_serve.text.tokenizer import Tokenizer
from moe_serve.types import RequestOutput, SamplingParams

logger = logging.getLogger(__name__)

# whoever asks is this very program, which may ask for as much as it likes
_LIMITS = dataclasses.replace(DEFAULT_LIMITS, queue_requests=2**62, queue_tokens=2**62)
# below, tokenising takes less time than handing it to a thread is worth
_INLINE_CHARS = 4096
_TICK_S = 1.0
# ticks without a sign of life of the host, after SILENT_AFTER_S, and it is taken for frozen
_MOST_SILENT_TICKS = 10
_END_S = 5.0

Make = Callable[[int], PreparedRequest]


class Creation:
    """An `AsyncLLM` to be: await it, or enter it (`async with`), and it is there."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._llm: AsyncLLM | None = None

    def __await__(self) -> Generator[Any, None, AsyncLLM]:
        made: Generator[Any, None, AsyncLLM] = self._make().__await__()
        return made

    async def __aenter__(self) -> AsyncLLM:
        self._llm = await self
        return self._llm

    async def __aexit__(self, *error: object) -> None:
        assert self._llm is not None
        await self._llm.close()


class AsyncLLM:
    """A model that writes for many tasks of an event loop at once.

        async with AsyncLLM.create("demo-moe") as llm:
            async for output in llm.stream("Once upon a time"):
                print(output.outputs[0].text)

    Made by `create` only, and then complete. It belongs to the event loop and the process that it
    was made in. A lost rank is started again, and streams pause meanwhile, with no token lost;
    CommError is raised when the engine is lost for good.
    """

    _client: EngineClient
    _host: HostProcess
    numerics_id: str
    max_model_len: int

    def __init__(self, *args: Any, **options: Any) -> None:
        raise ConfigError(
            "an AsyncLLM is there only once its engine is: write "
            "`llm = await AsyncLLM.create(...)` or `async with AsyncLLM.create(...) as llm`"
        )

    @classmethod
    def create(
        cls,
        model: str | Path | None = None,
        *,
        config: EngineConfig | None = None,
        chat_template: str | Path | None = None,
        **options: Any,
    ) -> Creation:
        """Return what gives an `AsyncLLM` when it is awaited, or entered with `async with`.

        The arguments are those of `LLM`, and so is what it raises. Under torchrun it is refused,
        with ConfigError: several ranks are asked for by ep_size.
        """
        return Creation(lambda: cls._create(model, config, chat_template, options))

    @classmethod
    async def _create(
        cls,
        model: str | Path | None,
        config: EngineConfig | None,
        chat_template: str | Path | None,
        options: Mapping[str, Any],
    ) -> Self:
        environment = read_environment()
        if environment is not None and environment.world_size > 1:
            raise ConfigError(
                f"this is one of {environment.world_size} processes of torchrun, and an AsyncLLM "
                "starts its own: start the script without torchrun and give ep_size, or use LLM"
            )
        named = await asyncio.to_thread(find_model, model, config, options, chat_template)
        client = EngineClient(
            named.texts.tokenizer, limits=_LIMITS, on_end=lambda why: client.close()
        )
        host = HostProcess(named.config, named.folder)
        try:
            loop = asyncio.get_running_loop()
            await loop.create_unix_connection(lambda: client, sock=host.connection)
            welcome = await client.wait_until_welcome()
        except BaseException as error:
            client.close()
            host.end()
            if isinstance(error, Unavailable):
                raise _end_of(client) from None
            raise
        llm = cls.__new__(cls)
        llm._adopt(named, client, host, welcome)
        return llm

    def _adopt(
        self, named: NamedModel, client: EngineClient, host: HostProcess, welcome: Welcome
    ) -> None:
        self.config = named.given
        self.max_model_len = welcome.max_model_len
        self.numerics_id = welcome.numerics_id
        self.requests = named.texts.maker(welcome.max_model_len, named.config.runtime.seed)
        self._texts = named.texts
        self._client = client
        self._host = host
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._num_made = 0
        self._open: dict[str, Running] = {}
        self._is_closed = False
        self._watcher = self._loop.create_task(self._watch())

    async def close(self) -> None:
        """End the engine, which writes traces and profiles that were asked for; twice is no harm.

        What still runs ends with finish_reason "abort". Raises TraceError for what cannot be
        written.
        """
        if self._is_closed:
            return
        self._check()
        self._is_closed = True
        client, had_ended = self._client, self._client.ended is not None
        try:
            for running in self._open.values():
                client.cancel(running)
            client.leave()
            await client.wait_until_closed()
            await asyncio.to_thread(self._host.end, _END_S)
        finally:
            self._watcher.cancel()
            client.close()
            self._host.end()
        if client.failed is not None and not had_ended:
            raise _end_of(client)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @property
    def model(self) -> str:
        """The model's name, as it was given."""
        return self.config.weights.model

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._texts.tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self.requests.chat_template is not None

    def default_sampling_params(self) -> SamplingParams:
        """Return what the model's generation_config suggests; else the defaults of the class."""
        return self._texts.default_sampling_params()

    # -- requests ----------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
    ) -> RequestOutput:
        """Return a prompt's outputs, whole; for the arguments see `LLM.generate`.

        request_id: for `abort`, and of the output. A prompt without a seed gets one from the `seed`
        option and how many prompts began before it, as with `LLM`: the same calls in the same order
        give the same tokens. Cancelling the task aborts the request. Raises RequestError, or
        CapacityError, for what is refused.
        """
        make = self._maker_of(prompt, sampling_params, priority, request_id)
        return await self._whole(make, _num_chars(prompt))

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        request_id: str | None = None,
    ) -> RequestOutput:
        """Return the assistant's next words: as `generate`, after the model's chat template."""
        make = self._chat_maker_of(messages, sampling_params, priority, cache_salt, request_id)
        return await self._whole(make, None)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield a prompt's outputs whenever they grew: each time all there is since the start.

        It begins when it is first asked; who asks seldom gets more each time. As `generate`
        otherwise; leaving the loop aborts the request.
        """
        make = self._maker_of(prompt, sampling_params, priority, request_id)
        return self._stream(make, _num_chars(prompt))

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """As `stream`, after the model's chat template."""
        make = self._chat_maker_of(messages, sampling_params, priority, cache_salt, request_id)
        return self._stream(make, None)

    def abort(self, request_id: str) -> bool:
        """End a request with finish_reason "abort"; return whether it was running."""
        self._check()
        running = self._open.get(request_id)
        return running is not None and self._client.cancel(running)

    async def stats(self) -> EngineStats:
        """Return the engine's latest counts: while there are steps about a second old."""
        self._check()
        while self._client.report is None:
            if self._client.ended is not None:
                raise _end_of(self._client)
            await asyncio.sleep(0.02)
        return self._client.report.stats

    # -- their course ------------------------------------------------------------------------------

    def _maker_of(
        self, prompt: Prompt, sampling: SamplingParams | None, priority: int, request_id: str | None
    ) -> Make:
        params = sampling or self.default_sampling_params()

        def make(index: int) -> PreparedRequest:
            return self.requests.make(
                prompt, params, index=index, priority=priority, request_id=request_id
            )

        return make

    def _chat_maker_of(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None,
        priority: int,
        cache_salt: str | None,
        request_id: str | None,
    ) -> Make:
        params = sampling or self.default_sampling_params()

        def make(index: int) -> PreparedRequest:
            prompt = self.requests.chat_prompt(messages, cache_salt=cache_salt)
            return self.requests.make(
                prompt, params, index=index, priority=priority, request_id=request_id
            )

        return make

    async def _whole(self, make: Make, num_chars: int | None) -> RequestOutput:
        with self._running(await self._prepared(make, num_chars)) as running:
            while not running.is_over:
                await running.changed()
            return _output_of(running)

    async def _stream(self, make: Make, num_chars: int | None) -> AsyncIterator[RequestOutput]:
        with self._running(await self._prepared(make, num_chars)) as running:
            num_told = 0
            while True:
                await running.changed()
                num_tokens = sum(len(output.token_ids) for output in running.state.outputs)
                if running.is_over or num_tokens > num_told:
                    num_told = num_tokens
                    output = _output_of(running)
                    yield output
                    if output.finished:
                        return

    async def _prepared(self, make: Make, num_chars: int | None) -> PreparedRequest:
        """Make a request in its turn. num_chars: of its text; None: a template, which may be slow.

        A prompt that is refused takes no number.
        """
        self._check()
        async with self._turn:
            if num_chars is not None and num_chars <= _INLINE_CHARS:
                prepared = make(self._num_made)
            else:
                prepared = await asyncio.to_thread(make, self._num_made)
            self._num_made += 1
        await self._hear()
        self._check()
        return prepared

    async def _hear(self) -> None:
        """Let in what the host has said, where this loop was busy for long."""
        client, end_s = self._client, time.monotonic() + SILENT_AFTER_S
        while client.silent_s > SILENT_AFTER_S and time.monotonic() < end_s:
            if client.ended is not None:
                return
            await asyncio.sleep(0.01)

    @contextlib.contextmanager
    def _running(self, prepared: PreparedRequest) -> Iterator[Running]:
        """Have the engine serve a request, until it is over or nobody waits for it any more."""
        request = dataclasses.replace(prepared.request, arrival_s=time.monotonic())
        request_id = request.request_id
        if not isinstance(request_id, str):
            raise RequestError(f"request_id is {request_id!r:.80}; it must be a string")
        present = self._open.get(request_id)
        if present is not None and not present.is_over:
            raise RequestError(
                f"request_id {request_id!r:.80} is in use by an unfinished request; "
                "give another, or abort that one"
            )
        try:
            running = self._client.start(dataclasses.replace(prepared, request=request))
        except Unavailable as error:
            raise (_end_of(self._client) if self._client.ended else CommError(str(error))) from None
        except (ValueError, OverflowError, TypeError) as error:
            raise RequestError(f"a request that cannot be sent to the engine: {error}") from error
        self._open[request_id] = running
        try:
            yield running
        finally:
            if self._open.get(request_id) is running:
                del self._open[request_id]
            if not running.is_over:
                self._client.cancel(running)

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise ConfigError(
                "an AsyncLLM does not go along into a process that was forked; make one there"
            )
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigError("an AsyncLLM belongs to the event loop in which it was made")
        if self._is_closed:
            raise ConfigError("the AsyncLLM was closed; make another one")

    async def _watch(self) -> None:
        """Give a frozen host up. A tick that comes late says that this loop was busy, not the host.

        Also at the end, when it may be writing: it gives signs of life meanwhile.
        """
        num_silent = 0
        while self._client.ended is None:
            before_s = time.monotonic()
            await asyncio.sleep(_TICK_S)
            is_late = time.monotonic() - before_s > 2 * _TICK_S
            is_silent = self._client.silent_s > SILENT_AFTER_S and not is_late
            num_silent = num_silent + 1 if is_silent else 0
            if num_silent > _MOST_SILENT_TICKS:
                silent_s = self._client.silent_s
                self._client.lose(f"it has given no sign of life for {silent_s:.0f} s")
                self._host.end()


def _output_of(running: Running) -> RequestOutput:
    """Return what there is. Raises why there will be no more."""
    failure = running.failure
    if failure is None:
        return running.state.output()
    if isinstance(failure, Unavailable):
        raise CommError(str(failure))
    raise _REFUSALS[failure.kind](failure.message)


_REFUSALS: dict[str, type[MoeServeError]] = {
    "request": RequestError,
    "capacity": CapacityError,
    "engine": MoeServeError,
}


def _end_of(client: EngineClient) -> MoeServeError:
    """Return why there is no engine: as it said it, if it did."""
    failed = client.failed
    if failed is not None:
        return Failure(failed.kind, failed.message).error()
    return CommError(f"the engine has ended: {client.ended}")


def _num_chars(prompt: Prompt) -> int:
    """Return how much there is to tokenise: 0 where there is nothing."""
    text: object = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return len(text) if isinstance(text, str) else 0
