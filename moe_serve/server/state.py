"""What all routes of a front end share: engine, texts of the model, limits, who is served."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from moe_serve.server.answers import ApiError
from moe_serve.server.engine_client import EngineClient
from moe_serve.server.limits import Limits
from moe_serve.server.options import ServerConfig
from moe_serve.text.model_texts import ModelTexts
from moe_serve.text.openai_form import Kind
from moe_serve.text.openai_logprobs import TokenNames
from moe_serve.text.prompts import RequestMaker

# Tokenising frees the lock of the interpreter, templates do not: more threads gain nothing.
TEXT_THREADS = 2
# what a double holds exactly: a program in JavaScript can send it back
SEED_LIMIT = 2**53


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """One request for text that has ended. status: of HTTP, 499 where the client went away.

    Times are seconds since the request came, first_token_s None where there was none. is_event: it
    is a stream's that ended with an error as its last event, of that status. key_id: of the key it
    came with, "" without.
    """

    kind: Kind
    status: int
    is_streamed: bool
    is_event: bool
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    first_token_s: float | None
    total_s: float
    finish_reasons: tuple[str, ...]
    key_id: str


class Abortable(Protocol):
    """A request that is being served. key_id: of whom."""

    key_id: str

    def abort(self) -> int: ...


@dataclass(kw_only=True)
class FrontState:
    """What the routes of one front end share.

    model: its name in the API. seed: from which the seeds of requests that bring none are drawn, in
    the order in which they come; None: at random. created: when it was loaded, in seconds since
    1970. ping_s: after so long without a chunk of a stream a comment is sent. on_started,
    on_finished: told of each request for text. metrics: returns the body and the content type of
    GET /metrics. serving: requests by the ids of their answers.
    """

    client: EngineClient
    texts: ModelTexts
    server: ServerConfig
    model: str
    created: int
    version: str
    seed: int | None = None
    ping_s: float = 15.0
    on_started: Callable[[Kind], None] = lambda kind: None
    on_finished: Callable[[Finished], None] = lambda finished: None
    metrics: Callable[[], tuple[bytes, str]] | None = None
    serving: dict[str, list[Abortable]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.limits: Limits = self.server.limits
        self.defaults = self.texts.default_sampling_params()
        self.names = TokenNames(self.texts.tokenizer)
        self.pool = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="texts")
        # who waits for a thread does so here, where it can be ended, and holds no place in a queue
        self.turns = asyncio.Semaphore(TEXT_THREADS)
        self._maker: RequestMaker | None = None
        self._seeds = random.SystemRandom() if self.seed is None else random.Random(self.seed)

    def draw_seed(self) -> int:
        """Return a seed for a request that brings none. For any thread."""
        return self._seeds.randrange(SEED_LIMIT)

    @property
    def maker(self) -> RequestMaker:
        """What makes requests. Raises ApiError 503 before the model is there."""
        if self._maker is None:
            welcome = self.client.welcome
            if welcome is None:
                why = self.client.why_not_ready or "not ready"
                raise ApiError(503, why, code="not_ready", retry_after_s=5)
            self._maker = self.texts.maker(welcome.max_model_len)
        return self._maker

    @property
    def fingerprint(self) -> str:
        """What answers depend on beside the request: this program's version, and the kernels."""
        welcome = self.client.welcome
        numerics_id = "" if welcome is None else welcome.numerics_id
        return f"moe-serve-{self.version}-{numerics_id}"

    def register(self, response_id: str, call: Abortable) -> None:
        """Let `abort` find a request by the id of its answer."""
        self.serving.setdefault(response_id, []).append(call)

    def unregister(self, response_id: str, call: Abortable) -> None:
        calls = self.serving.get(response_id, [])
        if call in calls:
            calls.remove(call)
        if not calls:
            self.serving.pop(response_id, None)

    def abort(self, request_id: str, key_id: str) -> int:
        """End all requests of that id and key; return how many of the engine's there were."""
        ids = (request_id, f"cmpl-{request_id}", f"chatcmpl-{request_id}")
        calls = [call for name in ids for call in self.serving.get(name, ())]
        return sum(call.abort() for call in calls if call.key_id == key_id)

    def close(self) -> None:
        """Stop the threads; what they do now is not waited for."""
        self.pool.shutdown(wait=False, cancel_futures=True)
