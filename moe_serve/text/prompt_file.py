"""Prompts in a file: one JSON object a line, with "prompt", "prompt_token_ids" or "messages".

A line may also have a "priority" and a "cache_salt".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from moe_serve.errors import ConfigError, RequestError
from moe_serve.text.prompts import Message, Prompt, RequestMaker, read_messages

FORMS = ("prompt", "prompt_token_ids", "messages")


def read_prompt_file(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the first `limit` lines of a file, each an object with one of FORMS.

    Other fields are left alone; blank lines are passed over. A fault is a ConfigError or a
    RequestError that names file and line.
    """
    entries: list[dict[str, Any]] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(entries) == limit:
                    break
                if line.strip():
                    entries.append(_read_line(line, f"{path}:{number}"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if not entries:
        raise ConfigError(f"{path}: has no prompts; write one JSON object a line")
    return entries


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise RequestError(f"{where}: not a JSON object; write {{'prompt': ...}}")
    given = [form for form in FORMS if form in entry]
    if len(given) != 1:
        has = " and ".join(given) or "none"
        raise RequestError(f"{where}: needs one of {', '.join(FORMS)}; it has {has}")
    return entry


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
