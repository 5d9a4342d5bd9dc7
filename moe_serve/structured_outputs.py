"""What an output's text may be asked to be: a schema, an expression, a choice, a grammar.

Checked here as far as that needs nothing but the request; `engine/grammar.py` does the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_serve.errors import RequestError, nearest, shown

# of the text of a grammar, and how deep the brackets of a JSON schema may be in each other
MAX_GRAMMAR_BYTES = 64 * 2**10
MAX_JSON_DEPTH = 64
MAX_GRAMMAR_S = 2.0  # to compile one

_STRUCTURED_KINDS = ("json", "regex", "choice", "grammar", "json_object")

StructuredKind = Literal["json", "regex", "choice", "grammar"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputs:
    """What an output's text must be, whole: exactly one of these. Names are vLLM's.

    json: a JSON schema, as text or as a mapping; kept as text. json_object=True: any JSON object.
    regex: matched from the start to the end. choice: one of these strings. grammar: Lark's form,
    with the rule `start`. At most MAX_GRAMMAR_BYTES of text. Raises RequestError; what is wrong
    within a schema or a grammar is found where it is compiled.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise RequestError(
                f"structured_outputs.json_object is {shown(self.json_object)}; "
                "it must be true or false"
            )
        given = [name for name in _STRUCTURED_KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}; it must have exactly "
                f"one of {', '.join(_STRUCTURED_KINDS)}"
            )
        name = given[0]
        value = getattr(self, name)
        if name == "json":
            object.__setattr__(self, name, _schema_text(value))
        elif name == "choice":
            object.__setattr__(self, name, _choices(value))
        elif name != "json_object":
            _check_grammar_text(f"structured_outputs.{name}", value)

    @property
    def kind(self) -> StructuredKind:
        """Return which of them it is; that of `json_object` is "json"."""
        if self.choice is not None:
            return "choice"
        if self.regex is not None:
            return "regex"
        return "json" if self.grammar is None else "grammar"

    @property
    def text(self) -> str:
        """Return the schema, expression or grammar; of `choice` a JSON list."""
        if self.json_object:
            return '{"type": "object"}'
        if self.choice is not None:
            return json.dumps(self.choice)
        text = self.json or self.regex or self.grammar
        assert isinstance(text, str)
        return text


def read_structured_outputs(value: object) -> StructuredOutputs:
    """Return what a mapping of names to values asks for, or what was given if it is that already.

    A value that is None was not given. An unknown name is a RequestError that names the nearest.
    """
    if isinstance(value, StructuredOutputs):
        return value
    if not isinstance(value, Mapping):
        raise RequestError(
            f"structured_outputs is {shown(value)}; it must be StructuredOutputs or an object "
            f"with one of {', '.join(_STRUCTURED_KINDS)}"
        )
    for name in value:
        if name not in _STRUCTURED_KINDS:
            raise RequestError(
                f"structured_outputs has {shown(name)}{nearest(str(name), _STRUCTURED_KINDS)} "
                f"(there are: {', '.join(_STRUCTURED_KINDS)})"
            )
    return StructuredOutputs(**{name: part for name, part in value.items() if part is not None})


def _schema_text(value: object) -> str:
    """Return a JSON schema as text. That it is an object of bounded depth is checked here."""
    name = "structured_outputs.json"
    if isinstance(value, Mapping):
        try:
            value = json.dumps(dict(value), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"{name} cannot be written as JSON: {error}") from error
    _check_grammar_text(name, value)
    assert isinstance(value, str)
    depth = deepest = 0
    is_quoted = is_escaped = False
    for character in value:
        if is_quoted:
            if is_escaped:
                is_escaped = False
            elif character == "\\":
                is_escaped = True
            elif character == '"':
                is_quoted = False
        elif character == '"':
            is_quoted = True
        elif character in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "}]":
            depth -= 1
    if deepest > MAX_JSON_DEPTH:
        raise RequestError(
            f"{name} is {deepest} brackets deep; at most {MAX_JSON_DEPTH} are read: use $defs"
        )
    try:
        schema = json.loads(value, parse_constant=_refuse_constant)
    except ValueError as error:
        raise RequestError(f"{name} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise RequestError(f"{name} is {shown(value)}; a schema is an object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _choices(value: object) -> tuple[str, ...]:
    name = "structured_outputs.choice"
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(f"{name} is {shown(value)}; it must be a list of strings")
    choices = tuple(value)
    if not choices:
        raise RequestError(f"{name} is empty; give one string or more")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise RequestError(
                f"{name} holds {shown(choice)}; each must be a string that is not empty"
            )
    _check_grammar_text(name, json.dumps(choices, ensure_ascii=False))
    return choices


def _check_grammar_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{name} is {shown(value)}; it must be text")
    if not value:
        raise RequestError(f"{name} is empty; leave it out")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} has a lone surrogate {value[error.start]!r} at character {error.start}; "
            "it must be valid Unicode"
        ) from error
    if size > MAX_GRAMMAR_BYTES:
        raise RequestError(f"{name} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are read")
