"""Prompts in a file: one JSON object a line, with "prompt", "prompt_token_ids" or "messages".

A line may also have a "priority" and a "cache_salt". What else it has is the file's own affair (an
id, a reference), but not a name that was meant to be one of these, nor an option of sampling.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from moe_serve.errors import ConfigError, RequestError
from moe_serve.text.json_lines import read_line
from moe_serve.text.prompts import Message, Prompt, RequestMaker, read_messages
from moe_serve.types import SamplingParams

FORMS = ("prompt", "prompt_token_ids", "messages")
KNOWN = (*FORMS, "priority", "cache_salt")
SAMPLING_OPTIONS = frozenset(field.name for field in fields(SamplingParams))


@dataclass(frozen=True, slots=True)
class PromptLine:
    """An object of a file; where is "file:line"."""

    where: str
    entry: dict[str, Any]


def read_prompt_file(path: Path, limit: int | None = None) -> list[PromptLine]:
    """Return the first `limit` lines of a file, each an object with one of FORMS.

    Blank lines are passed over. A fault is a ConfigError or a RequestError that names file and
    line.
    """
    entries: list[PromptLine] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(entries) == limit:
                    break
                if line.strip():
                    where = f"{path}:{number}"
                    entries.append(PromptLine(where, _read_line(line, where)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if not entries:
        raise ConfigError(f"{path}: has no prompts; write one JSON object a line")
    return entries


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    entry = read_line(line)
    if isinstance(entry, str):
        raise RequestError(f'{where}: {entry}; write {{"prompt": ...}}')
    _check_names(entry, where)
    given = [form for form in FORMS if form in entry]
    if len(given) != 1:
        has = " and ".join(given) or "none"
        raise RequestError(f"{where}: needs one of {', '.join(FORMS)}; it has {has}")
    if entry[given[0]] in ("", []):
        raise RequestError(f"{where}: {given[0]} is empty; give some text, or leave the line out")
    return entry


def _check_names(entry: Mapping[str, Any], where: str) -> None:
    for name in entry:
        if name in SAMPLING_OPTIONS:
            raise RequestError(
                f"{where}: {name!r} has no effect in a line; it is an option of the whole run"
            )
        # near enough to be a slip of the pen; "prompt_id" is not
        close = [] if name in KNOWN else difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.85)
        if close:
            raise RequestError(f"{where}: no field {name!r:.80}; did you mean {close[0]!r}?")


def prompt_of(entry: Mapping[str, Any], maker: RequestMaker) -> Prompt:
    """Return the prompt that a line asks for.

    Of a conversation, what comes before the first answer that is still to be given: later user
    messages would speak of it. Without a chat template its first user message is the prompt.
    """
    salt = {"cache_salt": entry["cache_salt"]} if "cache_salt" in entry else {}
    for form in ("prompt", "prompt_token_ids"):
        if form in entry:
            return cast(Prompt, {form: entry[form], **salt})
    messages = read_messages(entry["messages"])
    if maker.chat_template is not None:
        return maker.chat_prompt(_first_open_turn(messages), cache_salt=salt.get("cache_salt"))
    for message in messages:
        if message["role"] == "user" and isinstance(message["content"], str):
            return cast(Prompt, {"prompt": message["content"], **salt})
    raise RequestError("messages has no message of the user, and there is no chat template")


def _first_open_turn(messages: Sequence[Message]) -> Sequence[Message]:
    for index in range(1, len(messages)):
        if messages[index - 1]["role"] == "user" == messages[index]["role"]:
            return messages[:index]
    return messages
