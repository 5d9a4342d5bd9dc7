"""What is asked: bodies of requests, made before they are due."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from moe_serve.errors import ConfigError, RequestError
from moe_serve.load.trace_file import TraceRow
from moe_serve.text.prompt_lines import PromptLine, first_open_turn

Endpoint = Literal["completions", "chat"]
PATHS: dict[str, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# what this instrument asks for itself; n: a latency is that of one output
_RESERVED = ("prompt", "messages", "stream", "stream_options", "n", "best_of")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request's body, and its lengths in tokens where they are known before."""

    body: bytes
    input_len: int | None
    output_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """What all bodies have in common. Raises ConfigError for an extra that a flag sets."""

    endpoint: Endpoint
    model: str
    temperature: float | None = None
    ignore_eos: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = {*_RESERVED, "model", "max_tokens"}
        taken |= {"temperature"} if self.temperature is not None else set()
        taken |= {"ignore_eos"} if self.ignore_eos else set()
        for name in self.extra:
            if name in taken:
                raise ConfigError(f"--extra-body has {name!r}, which is set here already; drop it")

    def body(self, prompt: Mapping[str, Any], output_len: int) -> bytes:
        """Return the body for a prompt, which is a part of it."""
        common: dict[str, Any] = {"model": self.model, **prompt, "max_tokens": output_len}
        if self.temperature is not None:
            common["temperature"] = self.temperature
        if self.ignore_eos:
            common["ignore_eos"] = True
        common |= {"stream": True, "stream_options": {"include_usage": True}, **self.extra}
        return msgspec.json.encode(common)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRange:
    """Ids of random prompts: from `first` up to, without it, `end`."""

    first: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.end:
            raise ConfigError(
                f"--first-token-id is {self.first} and --vocab-size {self.end}; "
                "the one must be below the other"
            )

    def prompt(self, noise: random.Random, length: int) -> dict[str, Any]:
        return {"prompt": noise.choices(range(self.first, self.end), k=length)}


def random_requests(
    template: Template,
    tokens: TokenRange,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float,
    seed: int,
) -> Iterator[Asked]:
    """Yield without end: random ids, lengths even between (1 - range_ratio) and (1 + ...) of those
    asked.
    """
    for flag, value in (("--input-len", input_len), ("--output-len", output_len)):
        if value < 1:
            raise ConfigError(f"{flag} is {value}; it must be at least 1")
    if not 0 <= range_ratio < 1:
        raise ConfigError(f"--range-ratio is {range_ratio}; it must be at least 0 and below 1")
    _refuse_chat(template, "random token ids")
    noise = random.Random(f"lengths {seed}")

    def length(middle: int) -> int:
        least, most = int(middle * (1 - range_ratio)), round(middle * (1 + range_ratio))
        return noise.randint(max(1, least), most)

    def made() -> Iterator[Asked]:
        while True:
            num_input, num_output = length(input_len), length(output_len)
            body = template.body(tokens.prompt(noise, num_input), num_output)
            yield Asked(body, num_input, num_output)

    return made()


def trace_requests(
    template: Template,
    tokens: TokenRange,
    rows: Sequence[TraceRow],
    *,
    max_len: int | None,
    seed: int,
) -> Iterator[Asked]:
    """Yield a request of random ids for each row; a length is at least 1.

    max_len: of prompt and output together; the output is cut first, to not less than half of it.
    """
    if max_len is not None and max_len < 2:
        raise ConfigError(f"--max-len is {max_len}; it must be at least 2")
    _refuse_chat(template, "a trace's prompts, random token ids,")
    noise = random.Random(f"prompts {seed}")

    def made() -> Iterator[Asked]:
        for row in rows:
            num_input, num_output = clipped(row.input_len, row.output_len, max_len)
            body = template.body(tokens.prompt(noise, num_input), num_output)
            yield Asked(body, num_input, num_output)

    return made()


def clipped(input_len: int, output_len: int, max_len: int | None) -> tuple[int, int]:
    """Return both lengths, at least 1, such that they fit into max_len together."""
    input_len, output_len = max(1, input_len), max(1, output_len)
    if max_len is None or input_len + output_len <= max_len:
        return input_len, output_len
    output_len = min(output_len, max(max_len // 2, max_len - input_len))
    return min(input_len, max_len - output_len), output_len


def file_requests(
    template: Template, lines: Sequence[PromptLine], *, output_len: int
) -> Iterator[Asked]:
    """Yield a request for each line, and again from the first, without end.

    Raises ConfigError or RequestError, at once, for a line that the endpoint cannot take.
    """
    if output_len < 1:
        raise ConfigError(f"--output-len is {output_len}; it must be at least 1")
    made = []
    for line in lines:
        prompt, num_input = _prompt_of(line, template.endpoint)
        made.append(Asked(template.body(prompt, output_len), num_input, output_len))
    return itertools.cycle(made)


def _prompt_of(line: PromptLine, endpoint: Endpoint) -> tuple[dict[str, Any], int | None]:
    entry = line.entry
    prompt: dict[str, Any] = {k: entry[k] for k in ("priority", "cache_salt") if k in entry}
    num_input = None
    if "messages" in entry:
        if endpoint != "chat":
            raise ConfigError(f"{line.where}: messages need --endpoint chat")
        messages = entry["messages"]
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and "role" in message for message in messages
        ):
            raise RequestError(f"{line.where}: messages must be a list of objects with a role")
        prompt["messages"] = first_open_turn(messages)
    elif "prompt" in entry:
        if not isinstance(entry["prompt"], str):
            raise RequestError(f"{line.where}: prompt must be text")
        if endpoint == "chat":
            prompt["messages"] = [{"role": "user", "content": entry["prompt"]}]
        else:
            prompt["prompt"] = entry["prompt"]
    else:
        if endpoint == "chat":
            raise ConfigError(f"{line.where}: prompt_token_ids need --endpoint completions")
        ids = entry["prompt_token_ids"]
        if not isinstance(ids, list) or not all(type(token_id) is int for token_id in ids):
            raise RequestError(f"{line.where}: prompt_token_ids must be a list of whole numbers")
        prompt["prompt"], num_input = ids, len(ids)
    return prompt, num_input


def _refuse_chat(template: Template, what: str) -> None:
    if template.endpoint == "chat":
        raise ConfigError(f"{what} need --endpoint completions; for chat use --dataset file")
