"""`LLM`: one engine in this process, and prompts to texts through it.

It tokenises, checks, gives seeds and ids, drives the engine and puts texts together; how a token is
made is the engine's. One `LLM` belongs to one thread; several of its streams may be read in turns.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, cast

from moe_serve.config import EngineConfig
from moe_serve.errors import MoeServeError, RequestError
from moe_serve.launch.coordinator import RankedEngine
from moe_serve.launch.named_model import find_model
from moe_serve.launch.open import open_engine
from moe_serve.launch.worker import Follower
from moe_serve.models.hf_config import GenerationDefaults
from moe_serve.models.spec import ModelSpec
from moe_serve.text.chat_template import ChatTemplate
from moe_serve.text.interrupts import HeldInterrupt
from moe_serve.text.model_texts import ModelTexts
from moe_serve.text.progress import loading_bar, progress_bar
from moe_serve.text.prompts import Message, PreparedRequest, Prompt
from moe_serve.text.request_output import RequestState
from moe_serve.text.run_metrics import EngineStats, RunMeter, RunMetrics
from moe_serve.text.tokenizer import Tokenizer
from moe_serve.types import Request, RequestOutput, SamplingParams, StepOutput

Conversation = Sequence[Message]

logger = logging.getLogger(__name__)


class TokenEngine(Protocol):
    """What `LLM` asks of an engine. See moe_serve/engine/engine.py."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def config(self) -> EngineConfig: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def numerics_id(self) -> str: ...
    @property
    def has_unfinished(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def step(self) -> list[StepOutput]: ...
    def abort(self, request_id: str) -> bool: ...
    def stop(self, request_id: str, index: int) -> bool: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


class LLM:
    """A model that writes.

    model: a folder, a hub name, or "demo-moe", the embedded one. options: the leaves of
    `EngineConfig` by name (block_size=16, ...), which the environment (MOE_SERVE_BLOCK_SIZE) may
    also set; or a whole `config`, which then stands alone. chat_template: a file that replaces the
    model's own. use_tqdm: a progress bar on stderr while weights are read; None: when that is a
    terminal. Raises ConfigError, CheckpointError, or CapacityError when it does not fit.
    """

    last_run: RunMetrics | None = None
    _follower: Follower | None = None
    _end: weakref.finalize[..., LLM]

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: EngineConfig | None = None,
        chat_template: str | Path | None = None,
        use_tqdm: bool | None = None,
        **options: Any,
    ) -> None:
        named = find_model(model, config, options, chat_template)
        with loading_bar(is_shown=use_tqdm) as on_progress:
            engine = open_engine(named.config, named.folder, on_progress=on_progress)
        if isinstance(engine, Follower):
            self._follower = engine
            engine = engine.worker.engine
        self._adopt(engine, named.texts, named.given)

    @classmethod
    def from_parts(
        cls,
        engine: TokenEngine,
        tokenizer: Tokenizer | None = None,
        defaults: GenerationDefaults | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> Self:
        """Make one around an engine that is already there."""
        texts = ModelTexts(
            vocab_size=engine.spec.vocab_size,
            tokenizer=tokenizer,
            chat_template=chat_template,
            defaults=defaults or GenerationDefaults(),
        )
        llm = cls.__new__(cls)
        llm._adopt(engine, texts, engine.config)
        return llm

    def _adopt(self, engine: TokenEngine, texts: ModelTexts, config: EngineConfig) -> None:
        self.engine = engine
        self.config = config  # as it was given: the engine's has names resolved
        if self._follower is None:
            self._end = weakref.finalize(self, _close_quietly, engine)
        self.tokenizer = texts.tokenizer
        self.requests = texts.maker(engine.max_model_len, engine.config.runtime.seed)
        self._texts = texts
        self._num_made = 0
        self._active: dict[str, _Served] = {}
        self._untold: deque[StepOutput] = deque()

    def close(self) -> None:
        """Stop what runs in the background; write traces and profiles that were asked for.

        Also done when the object goes, and at the interpreter's exit; twice does no harm. Raises
        TraceError for what cannot be written. A rank above 0 works on until rank 0 has closed.
        """
        if self._follower is not None:
            self._follower.follow(until_close=True)
        elif self._end.detach() is not None:
            self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def model(self) -> str:
        """The model's name, as it was given."""
        return self.engine.config.weights.model

    @property
    def is_first_rank(self) -> bool:
        """Whether outputs come from this process: under torchrun they do from rank 0 alone."""
        return self._follower is None

    @property
    def has_chat_template(self) -> bool:
        return self.requests.chat_template is not None

    def default_sampling_params(self) -> SamplingParams:
        """Return what the model's generation_config suggests; else the defaults of the class."""
        return self._texts.default_sampling_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Return each prompt's outputs, in the order of the prompts.

        prompts: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; or a list of such.
        A dict may also have a "cache_salt": only prompts of one salt share a prefix cache.
        sampling_params: one for all, or one for each; None: `default_sampling_params()`.
        priority: one for all, or one for each; with scheduling_policy="priority" lower runs first.
        use_tqdm: a progress bar on stderr; None: when that is a terminal.
        All prompts are checked before the first runs: a bad one is a RequestError that names its
        place, and nothing ran. A prompt without a seed gets one from the `seed` option and how many
        prompts this LLM took before, so a program repeats itself.
        Under torchrun every rank must make the same calls; ranks above 0 work meanwhile, and return
        [] when the call of rank 0 has ended.
        """
        if self._followed():
            return []
        with self._released():
            listed = _prompt_list(prompts)
            params = self._params_list(sampling_params, len(listed))
            return self._generate(listed, params, _priorities(priority, len(listed)), use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
        cache_salt: str | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Return the assistant's next words: as `generate`, after the model's chat template.

        messages: one conversation, [{"role": ..., "content": ...}, ...], or a list of such.
        cache_salt is that of all of them.
        """
        if self._followed():
            return []
        with self._released():
            many = (
                isinstance(messages, Sequence) and messages and not isinstance(messages[0], Mapping)
            )
            conversations = cast("list[Conversation]", messages if many else [messages])
            prompts: list[Prompt] = []
            for index, conversation in enumerate(conversations):
                with _naming("conversation", index, len(conversations)):
                    prompts.append(self.requests.chat_prompt(conversation, cache_salt=cache_salt))
            params = self._params_list(sampling_params, len(prompts))
            return self._generate(prompts, params, _priorities(priority, len(prompts)), use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> Iterator[RequestOutput]:
        """Yield a prompt's outputs whenever they grew: each time all there is since the start.

        The prompt is checked at once. Closing the iterator aborts the request.
        """
        if self._followed():
            return iter(())
        try:
            sampling = sampling_params or self.default_sampling_params()
            prepared = self.prepare(prompt, sampling, priority=priority)
        except BaseException:
            self._release()
            raise
        return self._stream(prepared)

    def stream_text(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> Iterator[str]:
        """Yield the new text only, of a request with n = 1; joined it is the output's text."""
        sampling = sampling_params or self.default_sampling_params()
        if sampling.n != 1 and self.is_first_rank:
            raise RequestError(f"n is {sampling.n}; stream_text gives one text: use stream")
        return self._pieces(self.stream(prompt, sampling, priority=priority))

    def prepare(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        index: int | None = None,
        priority: int = 0,
    ) -> PreparedRequest:
        """Check one prompt and make its request.

        index: what its id and seed are made of; None: how many this LLM took before.
        """
        if index is not None:
            return self.requests.make(prompt, sampling, index=index, priority=priority)
        prepared = self.requests.make(prompt, sampling, index=self._num_made, priority=priority)
        self._num_made += 1
        return prepared

    def serve(self, prepared: Iterable[PreparedRequest | None]) -> Iterator[RequestOutput]:
        """Yield each request's outputs when it has finished: first done, first out.

        Requests are taken from `prepared` before each step until it ends or gives None: nothing for
        now, although something is being served. A request that the engine refuses ends with an
        error output; the others go on.
        """
        if self._followed():
            return
        with self._released():
            run = _Run(self, prepared)
            try:
                while changed := run.advance():
                    for served in changed:
                        if served.state.is_finished:
                            yield run.finish(served)
            finally:
                run.close()

    def _generate(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        priorities: Sequence[int],
        use_tqdm: bool | None,
    ) -> list[RequestOutput]:
        first = self._num_made
        prepared = []
        asked = zip(prompts, params, priorities, strict=True)
        for index, (prompt, sampling, priority) in enumerate(asked):
            with _naming("prompt", index, len(prompts)):
                prepared.append(
                    self.prepare(prompt, sampling, index=first + index, priority=priority)
                )
        self._num_made += len(prepared)
        run = _Run(self, prepared)
        try:
            for index, _ in enumerate(prepared):
                with _naming("prompt", index, len(prompts)):
                    run.admit_next()
            finished: dict[str, RequestOutput] = {}
            with progress_bar(len(prepared), is_shown=use_tqdm) as bar:
                while changed := run.advance():
                    for served in changed:
                        if served.state.is_finished:
                            output = run.finish(served)
                            finished[output.request_id] = output
                            bar.advance(sum(len(o.token_ids) for o in output.outputs))
        finally:
            run.close()
        return [finished[p.request.request_id] for p in prepared]

    def _stream(self, prepared: PreparedRequest) -> Iterator[RequestOutput]:
        with self._released():
            run = _Run(self, [prepared])
            try:
                run.admit_next()
                while changed := run.advance():
                    for served in changed:
                        is_finished = served.state.is_finished
                        yield run.finish(served) if is_finished else served.state.output()
            finally:
                run.close()

    def _pieces(self, stream: Iterator[RequestOutput]) -> Iterator[str]:
        num_shown = 0
        for output in stream:
            text = output.outputs[0].text
            if len(text) > num_shown:
                yield text[num_shown:]
                num_shown = len(text)

    def _params_list(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if given is None:
            given = self.default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise RequestError(
                f"sampling_params is of type {type(given).__name__}; it must be SamplingParams"
            )
        if len(given) != count:
            raise RequestError(
                f"{len(given)} sampling_params for {count} prompts; give one, or one for each"
            )
        return given

    def _followed(self) -> bool:
        """On a rank above 0: work until rank 0's run has ended, and return True."""
        if self._follower is None:
            return False
        self._follower.follow()
        return True

    @contextmanager
    def _released(self) -> Iterator[None]:
        """Let the other ranks' scripts go on at the end of a call, however it ends."""
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        if isinstance(self.engine, RankedEngine):
            with HeldInterrupt():
                self.engine.release()

    def _step(self) -> None:
        """Run one step and tell every request it served, whoever waits for it."""
        if not self._untold:
            with HeldInterrupt():  # within a step the engine's books do not agree
                self._untold.extend(self.engine.step())
        now_s = time.monotonic()
        while self._untold:  # an interrupt leaves the rest to whoever steps next
            step = self._untold.popleft()
            served = self._active.get(step.request_id)
            if served is None:
                continue
            if served.state.update(step, now_s):
                with HeldInterrupt():
                    self.engine.stop(step.request_id, step.index)
            if step.token_ids or step.finish_reason is not None:
                served.notify()


class _Served:
    """A request in the engine, and the inbox of the run that waits for it."""

    def __init__(self, state: RequestState, inbox: deque[_Served]) -> None:
        self.state = state
        self._inbox = inbox
        self.is_notified = False

    def notify(self) -> None:
        if not self.is_notified:
            self.is_notified = True
            self._inbox.append(self)


class _Run:
    """Some requests, driven until all have ended; its figures go to `LLM.last_run`."""

    def __init__(self, llm: LLM, prepared: Iterable[PreparedRequest | None]) -> None:
        self._llm = llm
        self._source = iter(prepared)
        self._inbox: deque[_Served] = deque()
        self._mine: dict[str, _Served] = {}
        with HeldInterrupt():
            self._meter = RunMeter(llm.engine.stats())

    def admit_next(self) -> bool:
        """Give the engine the next request; False if there is none. What it refuses is raised."""
        prepared = next(self._source, None)
        if prepared is None:
            return False
        self._add(prepared)
        return True

    def _add(self, prepared: PreparedRequest) -> None:
        """Raises CapacityError or RequestError, and is then as before."""
        llm = self._llm
        request = dataclasses.replace(prepared.request, arrival_s=time.monotonic())
        if request.request_id in llm._active:
            raise RequestError(f"request {request.request_id} is already being served")
        served = _Served(RequestState(request, prepared.prompt, llm.tokenizer), self._inbox)
        # known before the engine has it, so that an interrupt in between leaves no orphan there
        llm._active[request.request_id] = self._mine[request.request_id] = served
        try:
            with HeldInterrupt():
                llm.engine.add(request)
        except RequestError:
            self._forget(served)
            raise

    def advance(self) -> list[_Served]:
        """Take in what is ready, step until something of this run changed, and return what did.

        Empty when all have ended and no request is left.
        """
        while not self._inbox:
            self._fill()
            if self._inbox:
                break
            if not self._mine:
                return []
            llm = self._llm
            assert llm._untold or llm.engine.has_unfinished, "the engine lost a request"
            llm._step()
        changed = list(self._inbox)
        self._inbox.clear()
        for served in changed:
            served.is_notified = False
        return changed

    def _fill(self) -> None:
        while (prepared := next(self._source, None)) is not None:
            try:
                self._add(prepared)
            except RequestError as error:
                self._refuse(prepared, str(error))

    def _refuse(self, prepared: PreparedRequest, why: str) -> None:
        state = RequestState(prepared.request, prepared.prompt, self._llm.tokenizer)
        state.fail(why)
        # not among the active: its id may be that of a request that is being served
        _Served(state, self._inbox).notify()

    def finish(self, served: _Served) -> RequestOutput:
        """Forget a request that has ended and return what it gave."""
        self._forget(served)
        output = served.state.output()
        self._meter.add(output)
        return output

    def _forget(self, served: _Served) -> None:
        request_id = served.state.request.request_id
        if self._mine.get(request_id) is served:
            del self._llm._active[request_id], self._mine[request_id]

    def close(self) -> None:
        """Abort what has not ended, and leave the run's figures."""
        llm = self._llm
        with HeldInterrupt():
            for request_id in self._mine:
                llm.engine.abort(request_id)
                del llm._active[request_id]
            if self._mine and llm._untold:  # an id may come again, and must not get these
                llm._untold = deque(o for o in llm._untold if o.request_id not in self._mine)
            self._mine.clear()
            llm.last_run = self._meter.read(llm.engine.stats())


def _close_quietly(engine: TokenEngine) -> None:
    """Close an engine whose owner is gone: there is nobody to raise to."""
    try:
        engine.close()
    except MoeServeError as error:
        logger.error("%s", error)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Return a list of prompts, also where one was given bare."""
    if isinstance(prompts, str | Mapping):
        return [cast(Prompt, prompts)]
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts is of type {type(prompts).__name__}; it must be text, token ids, or a list"
        )
    if prompts and isinstance(prompts[0], int):
        return [cast(Prompt, prompts)]
    return cast("Sequence[Prompt]", prompts)


def _priorities(given: int | Sequence[int] | None, count: int) -> Sequence[int]:
    if given is None:
        given = 0
    if not isinstance(given, Sequence):
        return [given] * count
    if isinstance(given, str) or len(given) != count:
        raise RequestError(
            f"priority is {given!r:.80} for {count} prompts; give one number, or one for each"
        )
    return given


@contextmanager
def _naming(what: str, index: int, count: int) -> Iterator[None]:
    """Say which of `count` things a RequestError is about."""
    try:
        yield
    except RequestError as error:
        if count == 1:
            raise
        raise type(error)(f"{what} {index}: {error}") from error
