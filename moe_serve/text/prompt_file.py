"""Prompts in a file, in the form of `text.prompt_lines`, as a model takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from moe_serve.errors import RequestError
from moe_serve.text.prompt_lines import PromptLine, first_open_turn, read_prompt_lines
from moe_serve.text.prompts import Prompt, RequestMaker, read_messages
from moe_serve.types import SamplingParams

SAMPLING_OPTIONS = frozenset(field.name for field in fields(SamplingParams))


def read_prompt_file(path: Path, limit: int | None = None) -> list[PromptLine]:
    """Return the first `limit` lines of a file, as `read_prompt_lines` does."""
    return read_prompt_lines(path, limit, SAMPLING_OPTIONS)


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
        return maker.chat_prompt(first_open_turn(messages), cache_salt=salt.get("cache_salt"))
    for message in messages:
        if message["role"] == "user" and isinstance(message["content"], str):
            return cast(Prompt, {"prompt": message["content"], **salt})
    raise RequestError("messages has no message of the user, and there is no chat template")
