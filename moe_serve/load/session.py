"""From options to a report: checks all that can be checked, finds the server, measures it."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO, cast

from moe_serve.errors import ConfigError, nearest
from moe_serve.load.arrivals import ArrivalOptions
from moe_serve.load.connection import Address, ConnectionPool
from moe_serve.load.figures import read_goals, report_of
from moe_serve.load.open_files import allow_open_files
from moe_serve.load.run import LoadRun, RunLimits
from moe_serve.load.server_check import find_model
from moe_serve.load.trace_file import TraceRow, read_trace_file
from moe_serve.load.workload import (
    PATHS,
    Asked,
    Endpoint,
    Template,
    TokenRange,
    file_requests,
    random_requests,
    trace_requests,
)
from moe_serve.text.progress import progress_bar
from moe_serve.text.prompt_lines import PromptLine, read_prompt_lines

DEFAULT_NUM_PROMPTS = 100
DEFAULT_LEN = 128
DEFAULT_VOCAB_SIZE = 1000
DEFAULT_FIRST_TOKEN_ID = 10  # special tokens are often the first ones

_ARRIVALS = {"request_rate", "burstiness", "burst_every", "burst_size"}
_IDS = {"vocab_size", "first_token_id"}
# what each dataset takes; anything else of these is refused, as it would have no effect
_TAKES: dict[str, set[str]] = {
    "random": {"input_len", "output_len", "range_ratio", "num_prompts"} | _IDS | _ARRIVALS,
    "file": {"prompts", "limit", "output_len", "num_prompts"} | _ARRIVALS,
    "trace": {"trace", "time_scale", "max_len", "limit"} | _IDS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """The flags of `bench serve`, by their names; None is what was not given."""

    base_url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    model: str | None = None
    endpoint: str = "completions"
    dataset: str = "random"
    input_len: int | None = None
    output_len: int | None = None
    range_ratio: float | None = None
    vocab_size: int | None = None
    first_token_id: int | None = None
    prompts: Path | None = None
    trace: Path | None = None
    time_scale: float | None = None
    max_len: int | None = None
    limit: int | None = None
    request_rate: float | None = None
    burstiness: float | None = None
    burst_every: float | None = None
    burst_size: int | None = None
    max_concurrency: int | None = None
    duration: float | None = None
    num_prompts: int | None = None
    timeout: float = 600.0
    seed: int = 0
    ignore_eos: bool = False
    temperature: float | None = None
    extra_body: str | None = None
    goodput: list[str] | None = None
    save_requests: Path | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for names that are not known, and for flags without effect."""
        for flag, value, known in (
            ("--endpoint", self.endpoint, PATHS),
            ("--dataset", self.dataset, _TAKES),
        ):
            if value not in known:
                raise ConfigError(
                    f"{flag} is {value!r}{nearest(value, known)} (there are: {', '.join(known)})"
                )
        for name in sorted(set.union(*_TAKES.values()) - _TAKES[self.dataset]):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} has no effect with --dataset {self.dataset}"
                )
        for name in ("prompts", "trace"):
            if name in _TAKES[self.dataset] and getattr(self, name) is None:
                raise ConfigError(f"--dataset {self.dataset} needs --{name} FILE")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ConfigError(f"--num-prompts is {self.num_prompts}; it must be at least 1")
        if self.time_scale is not None and not 0 < self.time_scale < math.inf:
            raise ConfigError(f"--time-scale is {self.time_scale}; it must be above 0")

    @property
    def arrivals(self) -> ArrivalOptions:
        return ArrivalOptions(
            request_rate=math.inf if self.request_rate is None else self.request_rate,
            burstiness=1.0 if self.burstiness is None else self.burstiness,
            burst_every_s=self.burst_every,
            burst_size=self.burst_size,
        )

    @property
    def limits(self) -> RunLimits:
        return RunLimits(
            max_concurrency=self.max_concurrency,
            duration_s=math.inf if self.duration is None else self.duration,
            timeout_s=self.timeout,
        )

    def template(self, model: str) -> Template:
        extra: Any = {}
        if self.extra_body is not None:
            try:
                extra = json.loads(self.extra_body)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"--extra-body is not JSON: {error}") from error
            if not isinstance(extra, dict):
                raise ConfigError("--extra-body must be a JSON object")
        return Template(
            endpoint=cast(Endpoint, self.endpoint),
            model=model,
            temperature=self.temperature,
            ignore_eos=self.ignore_eos,
            extra=extra,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what was given, without the key and the files' names."""
        hidden = ("api_key", "prompts", "trace", "save_requests")
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v for k, v in given.items() if v is not None and k not in hidden}


@dataclass(frozen=True, slots=True)
class _Source:
    """What a dataset's file holds; nothing of random prompts."""

    rows: list[TraceRow]
    lines: list[PromptLine]

    @classmethod
    def read(cls, options: LoadOptions, run_options: Collection[str]) -> _Source:
        rows: list[TraceRow] = []
        lines: list[PromptLine] = []
        if options.trace is not None:
            rows = read_trace_file(options.trace, options.limit)
        if options.prompts is not None:
            lines = read_prompt_lines(options.prompts, options.limit, run_options)
        return cls(rows, lines)

    def num_requests(self, options: LoadOptions) -> int | None:
        """Return how many there will be at most; None: as many as the duration allows."""
        if self.rows:
            return len(self.rows)
        if options.num_prompts is not None or options.duration is not None:
            return options.num_prompts
        return len(self.lines) or DEFAULT_NUM_PROMPTS

    def requests(self, options: LoadOptions, template: Template) -> Iterator[Asked]:
        def or_else(value: int | None, default: int) -> int:
            return default if value is None else value

        output_len = or_else(options.output_len, DEFAULT_LEN)
        if self.lines:
            return file_requests(template, self.lines, output_len=output_len)
        tokens = TokenRange(
            first=or_else(options.first_token_id, DEFAULT_FIRST_TOKEN_ID),
            end=or_else(options.vocab_size, DEFAULT_VOCAB_SIZE),
        )
        if self.rows:
            return trace_requests(
                template, tokens, self.rows, max_len=options.max_len, seed=options.seed
            )
        return random_requests(
            template,
            tokens,
            input_len=or_else(options.input_len, DEFAULT_LEN),
            output_len=output_len,
            range_ratio=options.range_ratio or 0.0,
            seed=options.seed,
        )

    def offsets_s(self, options: LoadOptions) -> Iterable[float] | None:
        """Return when requests are due; None: a closed loop."""
        if self.rows:
            scale = 1.0 if options.time_scale is None else options.time_scale
            return [row.offset_s * scale for row in self.rows]
        arrivals = options.arrivals
        if arrivals.is_at_once and options.max_concurrency is not None:
            return None
        return arrivals.offsets_s(random.Random(f"arrivals {options.seed}"))


def measure(
    options: LoadOptions, command: str, run_options: Collection[str] = ()
) -> dict[str, Any]:
    """Put the load on the server and return the report.

    command: what the report says it came from. run_options: names that a line of --prompts may not
    have. Raises ConfigError, RequestError, and CommError without a server. SIGINT ends the
    measurement early; the report says so.
    """
    address = Address.parse(options.base_url)
    goals = read_goals(options.goodput or ())
    limits = options.limits
    source = _Source.read(options, run_options)
    num_requests = source.num_requests(options)
    offsets_s = source.offsets_s(options)
    if num_requests is None and offsets_s is not None and options.arrivals.is_at_once:
        raise ConfigError(
            "--duration with all requests at once has no end; give --request-rate, "
            "--max-concurrency or --num-prompts"
        )
    source.requests(options, options.template(""))  # its faults before the server is asked
    headers = {"accept": "text/event-stream", "user-agent": "moe-serve-bench"}
    if options.api_key:
        headers["authorization"] = f"Bearer {options.api_key}"
    pool = ConnectionPool(address, headers)
    with ExitStack() as stack:
        records_file = _opened(stack, options.save_requests)
        allow_open_files(options.max_concurrency or num_requests)
        bar = stack.enter_context(progress_bar(num_requests))

        async def measured() -> tuple[LoadRun, str]:
            try:
                model = await find_model(pool, options.model)
                requests: Iterable[Asked] = source.requests(options, options.template(model))
                if num_requests is not None:  # made now, not while answers come
                    requests = list(itertools.islice(requests, num_requests))
                run = LoadRun(
                    pool=pool,
                    path=PATHS[options.endpoint],
                    requests=requests,
                    offsets_s=offsets_s,
                    limits=limits,
                    on_end=lambda record: bar.advance(record.output_tokens),
                )
                await run.run()
                return run, model
            finally:
                await pool.close()

        run, model = asyncio.run(measured())
        if records_file is not None:
            for record in run.records:
                records_file.write(json.dumps(record.to_json(run.start_s)) + "\n")
    settings = {**options.to_json(), "model": model, "loop": "open" if offsets_s else "closed"}
    return report_of(run, goals, command, settings)


def _opened(stack: ExitStack, path: Path | None) -> TextIO | None:
    if path is None:
        return None
    try:
        return stack.enter_context(path.open("w", encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
