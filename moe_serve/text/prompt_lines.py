"""Lines of a file of prompts: one JSON object each, with one of FORMS. Imports no torch.

A line may also have a "priority" and a "cache_salt". What else it has is the file's own affair (an
id, a reference), but not a name that was meant to be one of these, nor an option of sampling.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_serve.errors import ConfigError, RequestError
from moe_serve.text.json_lines import read_line

FORMS = ("prompt", "prompt_token_ids", "messages")
KNOWN = (*FORMS, "priority", "cache_salt")


@dataclass(frozen=True, slots=True)
class PromptLine:
    """An object of a file; where is "file:line"."""

    where: str
    entry: dict[str, Any]


def read_prompt_lines(
    path: Path, limit: int | None, run_options: Collection[str]
) -> list[PromptLine]:
    """Return the first `limit` lines of a file, each an object with one of FORMS.

    run_options: names that a line may not have. Blank lines are passed over. A fault is a
    ConfigError or a RequestError that names file and line.
    """
    entries: list[PromptLine] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(entries) == limit:
                    break
                if line.strip():
                    where = f"{path}:{number}"
                    entries.append(PromptLine(where, _read_line(line, where, run_options)))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if not entries:
        raise ConfigError(f"{path}: has no prompts; write one JSON object a line")
    return entries


def _read_line(line: bytes, where: str, run_options: Collection[str]) -> dict[str, Any]:
    entry = read_line(line)
    if isinstance(entry, str):
        raise RequestError(f'{where}: {entry}; write {{"prompt": ...}}')
    _check_names(entry, where, run_options)
    given = [form for form in FORMS if form in entry]
    if len(given) != 1:
        has = " and ".join(given) or "none"
        raise RequestError(f"{where}: needs one of {', '.join(FORMS)}; it has {has}")
    if entry[given[0]] in ("", []):
        raise RequestError(f"{where}: {given[0]} is empty; give some text, or leave the line out")
    return entry


def _check_names(entry: Mapping[str, Any], where: str, run_options: Collection[str]) -> None:
    for name in entry:
        if name in run_options:
            raise RequestError(
                f"{where}: {name!r} has no effect in a line; it is an option of the whole run"
            )
        # near enough to be a slip of the pen; "prompt_id" is not
        close = [] if name in KNOWN else difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.85)
        if close:
            raise RequestError(f"{where}: no field {name!r:.80}; did you mean {close[0]!r}?")


def first_open_turn(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return what comes before the first answer of a conversation that is still to be given."""
    for index in range(1, len(messages)):
        if messages[index - 1]["role"] == "user" == messages[index]["role"]:
            return messages[:index]
    return messages
