"""What bodies of requests may hold, as models of pydantic: for validation and document alike.

They say what each field is and how large it may be, from `Limits`. What fields mean together, and
what the model itself allows, is checked where a request is made (`moe_serve/text/openai_form.py`).
A body is parsed once, in native code, without any value that JSON does not have.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    with_config,
)
from pydantic_core import ErrorDetails, core_schema
from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12

from moe_serve.errors import nearest
from moe_serve.server.answers import ApiError
from moe_serve.server.limits import DEFAULT_LIMITS, Limits
from moe_serve.types import MIN_REPETITION_PENALTY, MIN_TOP_P

_L = DEFAULT_LIMITS
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
# A string, or what begins one: it always matches, so that no quote is looked behind twice.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_TOLD_FAULTS = 3
_TOLD_CHARS = 200


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer, both ends included; a number such as 6.0 is one, as JSON and its schemas have it.

    A float is looked at only where there is no integer, so long lists cost what plain ones do.
    is_token: whether the document of a server may say its model's greatest in place of `most`.
    """

    least: int
    most: int
    is_token: bool = False

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        plain = core_schema.int_schema(ge=self.least, le=self.most, strict=True)
        written = core_schema.no_info_after_validator_function(
            self._integer, core_schema.float_schema(strict=True, allow_inf_nan=False)
        )
        return core_schema.union_schema(
            [plain, written],
            mode="left_to_right",
            custom_error_type="integer",
            custom_error_message=f"must be an integer from {self.least} to {self.most}",
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        mark = {"x-token-id": True} if self.is_token else {}
        return {"type": "integer", "minimum": self.least, "maximum": self.most, **mark}

    def _integer(self, value: float) -> int:
        # what is larger was rounded: an integer out of bounds may seem to be within them
        is_exact = value.is_integer() and abs(value) <= 2**53
        if not (is_exact and self.least <= value <= self.most):
            raise ValueError
        return int(value)


Text = Annotated[str, Field(max_length=_L.body_bytes)]
Name = Annotated[str, Field(min_length=1, max_length=_L.name_chars)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
# what OpenAI's clients may send, and what changes nothing here
Label = Annotated[str, Field(max_length=_L.name_chars)]
Metadata = Annotated[dict[Label, Label], Field(max_length=_L.variables)]
TokenId = Annotated[int, Whole(0, _L.tokens, is_token=True)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=_L.prompt_ids, fail_fast=True)]
Count = Annotated[int, Whole(1, _L.tokens)]
StopText = Annotated[str, Field(min_length=1, max_length=_L.stop_chars)]
Logprobs = Annotated[int, Whole(0, _L.logprobs)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
OnlyOne = Annotated[int, Whole(1, 1)]
AnyInteger = Annotated[int, Whole(-_L.seed - 1, _L.seed)]
# names that are token ids; without the last of these, other names would be allowed
LogitBias = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    Field(max_length=_L.logit_bias, json_schema_extra={"additionalProperties": False}),
]
Variables = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")],
        Annotated[str, Field(max_length=_L.name_chars)] | bool | AnyInteger,
    ],
    Field(max_length=_L.variables, json_schema_extra={"additionalProperties": False}),
]
Nothing = Annotated[list[Any], Field(max_length=0)]


@with_config(_STRICT)
class TextPart(TypedDict):
    """One part of a message's content."""

    type: Literal["text"]
    text: Text


@with_config(_STRICT)
class Called(TypedDict):
    """The function of a tool call."""

    name: Name
    arguments: Text


@with_config(_STRICT)
class ToolCall(TypedDict):
    """A call that an earlier answer made; the chat template writes it."""

    id: Name
    type: Literal["function"]
    function: Called


Content = Text | Annotated[list[TextPart], Field(max_length=_L.parts, fail_fast=True)]


@with_config(_STRICT)
class _AnyMessage(TypedDict):
    """What every message may have; fields of answers come back in them, empty."""

    role: Name
    name: NotRequired[Name | None]
    refusal: NotRequired[None]
    annotations: NotRequired[Nothing | None]
    audio: NotRequired[None]
    function_call: NotRequired[None]
    reasoning_content: NotRequired[Text | None]
    tool_call_id: NotRequired[Name | None]


@with_config(_STRICT)
class ChatMessage(_AnyMessage):
    """One message of a conversation."""

    content: Content
    tool_calls: NotRequired[None]


@with_config(_STRICT)
class CallMessage(_AnyMessage):
    """A message that called tools: it needs no content."""

    content: NotRequired[Content | None]
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=_L.parts, fail_fast=True)]


Messages = Annotated[
    list[ChatMessage | CallMessage],
    Field(min_length=1, max_length=_L.messages, fail_fast=True),
]


@with_config(_STRICT)
class StreamOptions(TypedDict):
    """include_usage: a last chunk with the usage; continuous_usage_stats: in every chunk too."""

    include_usage: NotRequired[bool | None]
    continuous_usage_stats: NotRequired[bool | None]


@with_config(_STRICT)
class JsonSchema(TypedDict):
    """A JSON schema, as response_format gives it."""

    name: Name
    description: NotRequired[Annotated[str, Field(max_length=_L.grammar_bytes)] | None]
    schema: NotRequired[dict[str, Any] | None]
    strict: NotRequired[bool | None]


@with_config(_STRICT)
class ResponseFormat(TypedDict):
    """What form a text must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NotRequired[JsonSchema | None]


Grammar = Annotated[str, Field(min_length=1, max_length=_L.grammar_bytes)]


@with_config(_STRICT)
class StructuredOutputs(TypedDict):
    """What form a text must have: one of these."""

    json: NotRequired[dict[str, Any] | Grammar | None]
    json_object: NotRequired[bool | None]
    regex: NotRequired[Grammar | None]
    choice: NotRequired[
        Annotated[list[Grammar], Field(min_length=1, max_length=_L.parts, fail_fast=True)] | None
    ]
    grammar: NotRequired[Grammar | None]


class Body(BaseModel):
    """The root of all bodies."""

    model_config = _STRICT

    model: Name | None = None

    def given(self) -> dict[str, Any]:
        """Return the fields that were sent, as plain data."""
        values = self.__dict__
        return {name: values[name] for name in self.model_fields_set}


class GenerationBody(Body):
    """What completions and chat completions have in common; names are OpenAI's, then vLLM's."""

    n: Annotated[int, Whole(1, _L.n)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=1e4)] | None = None
    top_p: Annotated[float, Field(ge=MIN_TOP_P, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: AnyInteger | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=_L.stop, fail_fast=True)] | None = (
        None
    )
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default"] | None = None

    top_k: Annotated[int, Whole(-1, _L.tokens)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=1e4)] | None = None
    min_tokens: Annotated[int, Whole(0, _L.tokens)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[list[TokenId], Field(max_length=_L.stop_token_ids, fail_fast=True)] | None
    ) = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: Annotated[list[StopText], Field(max_length=_L.bad_words, fail_fast=True)] | None = (
        None
    )
    allowed_token_ids: (
        Annotated[
            list[TokenId], Field(min_length=1, max_length=_L.allowed_token_ids, fail_fast=True)
        ]
        | None
    ) = None
    prompt_logprobs: Logprobs | None = None
    truncate_prompt_tokens: Count | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: Name | None = None
    priority: Annotated[int, Whole(-_L.priority, _L.priority)] | None = None
    request_id: RequestId | None = None

    # read further down, by the fields of SamplingParams
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_routed_experts: bool | None = None


class CompletionBody(GenerationBody):
    """The body of POST /v1/completions."""

    prompt: (
        Annotated[str, Field(min_length=1, max_length=_L.body_bytes)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=_L.body_bytes)]],
            Field(min_length=1, max_length=_L.prompts, fail_fast=True),
        ]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=_L.prompts, fail_fast=True)]
    )
    logprobs: Logprobs | None = None
    echo: bool | None = None
    best_of: OnlyOne | None = None
    suffix: Literal[""] | None = None


class ChatBody(GenerationBody):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Variables | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    store: Literal[False] | None = None


_ONE_OF_TWO: dict[str, Any] = {"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}


class TokenizeBody(Body):
    """The body of POST /tokenize: a prompt, or the messages of a chat."""

    model_config = ConfigDict(**_STRICT, json_schema_extra=_ONE_OF_TWO)

    # one of these two: what was not sent is not None in a body, which "oneOf" could not say
    prompt: Text = ""
    messages: Messages = Field(default=[])
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Variables | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """The body of POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(max_length=_L.prompt_ids, fail_fast=True)]


class AbortBody(BaseModel):
    """The body of POST /v1/abort: the id of an answer, or the X-Request-Id of its request."""

    model_config = _STRICT

    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,160}$")]


BODIES: tuple[type[BaseModel], ...] = (
    CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, AbortBody,
)  # fmt: skip

BodyModel = TypeVar("BodyModel", bound=BaseModel)


def parse_body(data: bytes, model: type[BodyModel], limits: Limits = DEFAULT_LIMITS) -> BodyModel:
    """Return the body that `data` is. Raises ApiError 400, which names the field that is wrong."""
    _check_parts(data, limits)
    try:
        body = model.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error, model) from None
    # as many colons as names at the top: then there is no object within, and no name twice
    if data.count(b":") != len(body.model_fields_set):
        _check_nesting(data, limits)
    return body


def invalid(message: str, param: str | None = None, code: str = "invalid_body") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def _check_parts(data: bytes, limits: Limits) -> None:
    """Refuse a body of so many names, objects and lists that to make them all would take long."""
    if _num_marks(data) <= limits.json_parts:
        return
    num_parts = _num_marks(_STRING.sub(b"", data))
    if num_parts > limits.json_parts:
        raise invalid(
            f"the body has {num_parts} names, objects and lists; at most {limits.json_parts} "
            "are read"
        )


def _num_marks(data: bytes) -> int:
    return data.count(b":") + data.count(b"[") + data.count(b"{")


def _check_nesting(data: bytes, limits: Limits) -> None:
    """Refuse a name that is there twice in one object, and what is nested too deeply."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            raise invalid(f"{twice!r:.80} is there twice", param=twice[:80])
        return found

    whole = json.loads(data, object_pairs_hook=unique)
    if data.count(b"[") + data.count(b"{") <= limits.json_depth:
        return
    for name, value in whole.items():
        if _is_deeper(value, limits.json_depth - 1):
            raise invalid(f"{name} is nested more than {limits.json_depth} deep", param=name)


def _is_deeper(value: object, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            part
            for one in level
            if isinstance(one, dict | list)
            for part in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True


def _invalid(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """Return the answer to a body that is no `model`: its first faults, each with its field."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    if faults[0]["type"] == "json_invalid":
        return invalid(f"the body is not JSON that can be read: {faults[0]['msg']:.200}")
    nearest_fault: dict[str, ErrorDetails] = {}
    for fault in faults:
        where = fault["loc"]
        field = str(where[0]) if where else ""
        # of a field that may have several forms, the form that was nearest: deepest within
        if field not in nearest_fault or len(where) > len(nearest_fault[field]["loc"]):
            nearest_fault[field] = fault
    known = list(model.model_fields)
    told = [
        _said(field, fault["loc"], fault["type"], fault["msg"], known)
        for field, fault in itertools.islice(nearest_fault.items(), _TOLD_FAULTS)
    ]
    if len(nearest_fault) > _TOLD_FAULTS:
        told.append(f"and {len(nearest_fault) - _TOLD_FAULTS} more")
    first = next(iter(nearest_fault))
    return invalid("; ".join(told), param=first[:80] or None)


def _said(
    field: str, where: tuple[int | str, ...], kind: str, message: str, known: Iterable[str]
) -> str:
    if not field:
        return f"the body must be an object ({message:.{_TOLD_CHARS}})"
    if kind == "extra_forbidden" and len(where) == 1:
        return f"parameter {field!r:.80} is not supported{nearest(field[:80], known)}"
    if kind == "too_long" and "at most 0 items" in message and len(where) == 1:
        return f"{field} are not supported: leave them out, or empty"
    if kind == "missing" and len(where) == 1:
        return f"{field} is missing"
    if field in _FORMS and kind != "integer" and kind != "string_too_long":
        return f"{field} {_FORMS[field]}"
    path = field[:80]
    for part in where[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _INNER_NAMES or (kind == "extra_forbidden" and part == where[-1]):
            path += f".{part:.80}"
    return f"{path}: {message:.{_TOLD_CHARS}}"


# fields that may have several forms, or hardly any: what is wrong with one form says little
_FORMS = {
    "prompt": (
        "must be text, a list of token ids, or a list of either, none of them empty; at most "
        f"{_L.prompts} prompts"
    ),
    "stop": (
        f"must be text of 1 to {_L.stop_chars} characters, or a list of at most {_L.stop} of such"
    ),
    "logit_bias": (
        f"must map at most {_L.logit_bias} token ids, written as text, to numbers from -100 to 100"
    ),
    "best_of": "is not supported: leave it out, or 1",
    "suffix": "is not supported: leave it out, or empty",
    "tool_choice": "must be none or auto: tools are not supported",
    "store": "must be false: nothing is stored here",
    "service_tier": "must be auto or default: there is one tier here",
    "modalities": 'must be ["text"]',
}
_INNER_NAMES = frozenset(
    name
    for inner in (
        *(TextPart, Called, ToolCall, _AnyMessage, ChatMessage, CallMessage),
        *(StreamOptions, JsonSchema, ResponseFormat, StructuredOutputs),
    )
    for name in inner.__annotations__
)
