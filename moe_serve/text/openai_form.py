"""OpenAI's completions and chat completions: a body to prompts and params, outputs to an object.

What a body asks for and this system does not do is an error that names it, never left out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from moe_serve.errors import RequestError, nearest
from moe_serve.text.openai_logprobs import (
    CompletionLogprobs,
    TokenNames,
    chat_logprobs,
    joined,
    prompt_logprobs,
)
from moe_serve.text.prompts import Prompt, RequestMaker
from moe_serve.types import (
    CompletionOutput,
    RequestOutput,
    SamplingParams,
    StructuredOutputs,
    checked_integer,
)

Kind = Literal["completion", "chat"]

KIND_OF_URL: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}

# Fields of SamplingParams have their names in bodies too: one that is added there is read here.
SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))
COMMON_FIELDS = frozenset(
    {"model", "user", "stream", "priority", "cache_salt", "add_special_tokens"}
    | {"safety_identifier", "prompt_cache_key", "metadata", "service_tier"}
    | {"truncate_prompt_tokens", "return_token_ids", "response_format"}
)
OWN_FIELDS: dict[Kind, frozenset[str]] = {
    "completion": COMMON_FIELDS | {"prompt", "echo", "suffix", "best_of"},
    "chat": COMMON_FIELDS
    | {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
    | {"add_generation_prompt", "continue_final_message"}
    | {"tools", "tool_choice", "parallel_tool_calls", "modalities", "store"},
}
# of a server alone: a line of a file is answered whole, and has an id of its own
SERVER_FIELDS = frozenset({"stream_options", "request_id"})
# fields that are known, and the values of each that ask for nothing
WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "suffix": ("",), "best_of": (1,), "tools": ([],), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False), "modalities": (["text"],), "store": (False,),
    "service_tier": ("auto", "default"),
}  # fmt: skip
FLAGS = (
    "stream", "echo", "return_token_ids", "add_special_tokens", "add_generation_prompt",
    "continue_final_message",
)  # fmt: skip
_FORMATS = ("text", "json_object", "json_schema")
_SCHEMA = "response_format.json_schema"
# where an engine's errors say that a schema is
_OWN_SCHEMA = "structured_outputs.json"


@dataclass(frozen=True, slots=True)
class BodyRequest:
    """What a body asks for: `sampling` of each of `prompts`, and how to tell of it.

    echo: the prompt's text before each output's. num_prompt_logprobs: how many likely tokens to
    tell for each of the prompt's, None for no such list; an echo's are `sampling.logprobs`.
    schema_field: where the body has the schema of the text, if it has one.
    """

    kind: Kind
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    priority: int
    echo: bool = False
    num_prompt_logprobs: int | None = None
    has_token_ids: bool = False
    is_streamed: bool = False
    has_usage_chunk: bool = False
    has_usage_always: bool = False
    request_id: str | None = None
    schema_field: str = _OWN_SCHEMA

    @property
    def prompt(self) -> Prompt:
        return self.prompts[0]

    def as_sent(self, message: str) -> str:
        """Return an engine's error so that it names the field of the body that it is about."""
        if self.schema_field == _OWN_SCHEMA:
            return message
        if message.startswith(f"{_OWN_SCHEMA}:"):
            return self.schema_field + message.removeprefix(_OWN_SCHEMA)
        found = message.removeprefix("structured_outputs ")
        return message if found == message else f"response_format {found}"


def read_body(
    url: str,
    body: Mapping[str, Any],
    maker: RequestMaker,
    defaults: SamplingParams,
    *,
    is_served: bool = False,
    most_prompts: int = 1,
) -> BodyRequest:
    """Read the body of a request to `url`; any fault is a RequestError that names the field.

    A field that is null was not given. Beside OpenAI's fields there are those of SamplingParams,
    and of vLLM priority (lower runs earlier), cache_salt and how a prompt is made. defaults: the
    model's own sampling. Without max_tokens a completion has at most 16 tokens, and a chat
    completion what the context holds. is_served: by a server, which can stream.
    """
    if url not in KIND_OF_URL:
        raise RequestError(
            f"url is {url!r:.80}{nearest(str(url), KIND_OF_URL)} "
            f"(there are: {', '.join(KIND_OF_URL)})"
        )
    kind = KIND_OF_URL[url]
    given = _without_nulls(body)
    _check_known(kind, given, is_served)
    sampling = _read_sampling(kind, given, defaults)
    has_usage_chunk, has_usage_always = _read_stream_options(given)
    return BodyRequest(
        kind,
        _read_prompts(kind, given, maker, most_prompts),
        sampling,
        checked_integer("priority", given.get("priority", 0), -(2**63), 2**63 - 1),
        echo=given.get("echo", False),
        num_prompt_logprobs=given.get("prompt_logprobs"),
        has_token_ids=given.get("return_token_ids", False),
        is_streamed=given.get("stream", False),
        has_usage_chunk=has_usage_chunk,
        has_usage_always=has_usage_always,
        request_id=given.get("request_id"),
        schema_field=_schema_field(given.get("response_format")),
    )


def _schema_field(response_format: Mapping[str, Any] | None) -> str:
    if response_format is None or response_format["type"] == "text":
        return _OWN_SCHEMA
    is_object = response_format["type"] == "json_object"
    return "response_format" if is_object else f"{_SCHEMA}.schema"


def named_field(message: str, kind: Kind) -> str | None:
    """Return the field that an error of `read_body` is about: its message begins with it."""
    found = re.match(r"(?:parameter '|the (?=prompt ))?(\w+)", message)
    name = found.group(1) if found else ""
    if name == "prompt":
        return "prompt" if kind == "completion" else "messages"
    if message.startswith(("chat template", "the model has no chat template")):
        return "messages"
    known = SAMPLING_FIELDS | OWN_FIELDS[kind] | SERVER_FIELDS
    return name if name in known or message.startswith("parameter '") else None


def _check_known(kind: Kind, given: Mapping[str, Any], is_served: bool) -> None:
    known = SAMPLING_FIELDS | OWN_FIELDS[kind]
    if is_served:
        known |= SERVER_FIELDS
    for name, value in given.items():
        if name not in known:
            raise RequestError(f"parameter {name!r:.80} is not supported{nearest(name, known)}")
        if name in WITHOUT_EFFECT:
            known_values = WITHOUT_EFFECT[name]
            if not any(value == one and type(value) is type(one) for one in known_values):
                only = " or ".join(map(repr, known_values))
                raise RequestError(f"{name} is {value!r:.80}; only {only} is supported here")
        if name in FLAGS and not isinstance(value, bool):
            raise RequestError(f"{name} is {value!r:.80}; it must be true or false")
    if given.get("stream") and not is_served:
        raise RequestError("stream is True; only False is supported here")
    for name in ("prompt_logprobs", "return_routed_experts"):
        if given.get("stream") and name in given and given[name] is not False:
            raise RequestError(f"{name} cannot be streamed: leave stream out")
    for name in ("model", "user", "safety_identifier", "prompt_cache_key", "request_id"):
        if name in given and not isinstance(given[name], str):
            raise RequestError(f"{name} is {given[name]!r:.80}; it must be text")
    if not isinstance(given.get("metadata", {}), dict):
        raise RequestError(f"metadata is {given['metadata']!r:.80}; it must be an object")


def _read_stream_options(given: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether the usage is told at the end of a stream, and whether in every chunk."""
    if "stream_options" not in given:
        return False, False
    options = given["stream_options"]
    if not given.get("stream"):
        raise RequestError("stream_options needs stream: true")
    known = ("include_usage", "continuous_usage_stats")
    if not isinstance(options, Mapping) or not all(
        name in known and isinstance(value, bool | None) for name, value in options.items()
    ):
        raise RequestError(
            f"stream_options is {options!r:.80}; it may have {' and '.join(known)}, true or false"
        )
    has_usage = bool(options.get("include_usage"))
    return has_usage, has_usage and bool(options.get("continuous_usage_stats"))


def _read_sampling(
    kind: Kind, given: Mapping[str, Any], defaults: SamplingParams
) -> SamplingParams:
    options: dict[str, Any] = {f.name: getattr(defaults, f.name) for f in fields(defaults)}
    options["max_tokens"] = 16 if kind == "completion" else None
    options.update({name: value for name, value in given.items() if name in SAMPLING_FIELDS})
    if "logit_bias" in given:
        options["logit_bias"] = _read_logit_bias(given["logit_bias"])
    if "response_format" in given:
        asked = _read_response_format(given["response_format"])
        if asked is not None and "structured_outputs" in given:
            raise RequestError("response_format and structured_outputs are both given; give one")
        options["structured_outputs"] = asked or options["structured_outputs"]
    if kind == "chat":
        _read_chat_options(given, options)
    sampling = SamplingParams.from_mapping(options)
    if not given.get("echo") or sampling.logprobs is None:
        return sampling
    options["prompt_logprobs"] = max(sampling.logprobs, sampling.prompt_logprobs or 0)
    return SamplingParams.from_mapping(options)


def _read_chat_options(given: Mapping[str, Any], options: dict[str, Any]) -> None:
    if "max_completion_tokens" in given:
        if "max_tokens" in given:
            raise RequestError("max_tokens and max_completion_tokens are both given; give one")
        options["max_tokens"] = given["max_completion_tokens"]
    wants = given.get("logprobs", False)
    if not isinstance(wants, bool):
        raise RequestError(f"logprobs is {wants!r:.80}; in a chat completion it is true or false")
    if "top_logprobs" in given and not wants:
        raise RequestError("top_logprobs needs logprobs: true")
    options["logprobs"] = given.get("top_logprobs", 0) if wants else None


def _read_logit_bias(value: object) -> dict[int, Any]:
    """JSON's names are text: {"50256": -100}."""
    if not isinstance(value, dict):
        raise RequestError(f"logit_bias is {value!r:.80}; it must be an object of id: bias")
    for token in value:
        # of more digits no token id, and Python reads no integer of thousands
        if not (token.isascii() and token.isdecimal() and len(token) <= 10):
            raise RequestError(f"logit_bias has the name {token!r:.80}; names are token ids")
    return {int(token): bias for token, bias in value.items()}


def _read_response_format(value: object) -> StructuredOutputs | None:
    """Return what {"type": ...} asks for; None: for nothing. Schemas are always kept to."""
    if not isinstance(value, dict):
        raise RequestError(f"response_format is {value!r:.80}; it must be an object with a type")
    value = _without_nulls(value)
    form = value.get("type")
    if form not in _FORMATS:
        raise RequestError(
            f"response_format.type is {form!r:.80}{nearest(str(form), _FORMATS)} "
            f"(there are: {', '.join(_FORMATS)})"
        )
    _refuse_others("response_format", value, ["type", "json_schema"][: 1 + (form == _FORMATS[2])])
    if form == "text":
        return None
    if form == "json_object":
        return StructuredOutputs(json_object=True)
    described = value.get("json_schema")
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise RequestError(f"{_SCHEMA} is {described!r:.80}; it must be an object with a schema")
    described = _without_nulls(described)
    _refuse_others(_SCHEMA, described, ["name", "description", "schema", "strict"])
    for name, kind in (("name", str), ("description", str), ("strict", bool)):
        if not isinstance(described.get(name), kind | None):
            raise RequestError(
                f"{_SCHEMA}.{name} is {described[name]!r:.80}; it must be "
                f"{'text' if kind is str else 'true or false'}"
            )
    try:
        return StructuredOutputs(json=described["schema"])
    except RequestError as error:
        message = str(error).replace(_OWN_SCHEMA, f"{_SCHEMA}.schema")
        raise RequestError(message) from error


def _without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in value.items() if part is not None}


def _refuse_others(where: str, value: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in value:
        if name not in known:
            raise RequestError(f"{where} has {name!r:.80}{nearest(name, known)}")


def _read_prompts(
    kind: Kind, given: Mapping[str, Any], maker: RequestMaker, most_prompts: int
) -> tuple[Prompt, ...]:
    name = "prompt" if kind == "completion" else "messages"
    if name not in given:
        raise RequestError(f"{name} is missing")
    if kind == "chat":
        return (_truncated(_chat_prompt(given, maker), given),)
    value = given["prompt"]
    if isinstance(value, list) and value and not isinstance(value[0], int):
        if len(value) > most_prompts:
            most = "one in a request" if most_prompts == 1 else f"at most {most_prompts}"
            raise RequestError(f"prompt is a list of {len(value)} prompts; give {most}")
        return tuple(_completion_prompt(part, given, maker) for part in value)
    return (_completion_prompt(value, given, maker),)


def _completion_prompt(value: object, given: Mapping[str, Any], maker: RequestMaker) -> Prompt:
    if not isinstance(value, str | list):
        raise RequestError(f"prompt is {value!r:.80}; it must be text or a list of token ids")
    if isinstance(value, str) and not {"add_special_tokens", "truncate_prompt_tokens"}.isdisjoint(
        given
    ):
        value = maker.encode(value, given.get("add_special_tokens", True))
    salt = {"cache_salt": given["cache_salt"]} if "cache_salt" in given else {}
    key = "prompt" if isinstance(value, str) else "prompt_token_ids"
    return _truncated(cast(Prompt, {key: value, **salt}), given)


def _chat_prompt(given: Mapping[str, Any], maker: RequestMaker) -> Prompt:
    if maker.chat_template is None:
        raise RequestError(
            "the model has no chat template: pass --chat-template, or use /v1/completions"
        )
    continues = given.get("continue_final_message", False)
    if continues and given.get("add_generation_prompt"):
        raise RequestError("continue_final_message needs add_generation_prompt: false")
    variables = given.get("chat_template_kwargs")
    if not isinstance(variables, Mapping | None):
        raise RequestError(f"chat_template_kwargs is {variables!r:.80}; it must be an object")
    return maker.chat_prompt(
        given["messages"],
        cache_salt=given.get("cache_salt"),
        add_generation_prompt=given.get("add_generation_prompt", True),
        continue_final_message=continues,
        variables=variables,
        add_special_tokens=given.get("add_special_tokens", False),
    )


def _truncated(prompt: Prompt, given: Mapping[str, Any]) -> Prompt:
    """Keep the prompt's last tokens, as many as truncate_prompt_tokens says."""
    if "truncate_prompt_tokens" not in given:
        return prompt
    most = checked_integer("truncate_prompt_tokens", given["truncate_prompt_tokens"], 1, 2**31 - 1)
    whole = cast(dict[str, Any], prompt)
    return cast(Prompt, {**whole, "prompt_token_ids": whole["prompt_token_ids"][-most:]})


def response_object(
    outputs: Sequence[RequestOutput],
    asked: BodyRequest,
    *,
    model: str,
    response_id: str,
    created: int,
    names: TokenNames,
) -> dict[str, Any]:
    """Return the object of a request whose outputs, one for each prompt, have finished.

    created is in seconds since 1970. All else is a function of the request: how many prompt tokens
    were cached is not told here.
    """
    choices: list[dict[str, Any]] = []
    for output in outputs:
        told = told_prompt(output, asked, names)
        choices += [_choice(told, one, asked, len(choices), names) for one in output.outputs]
    found: dict[str, Any] = {
        "id": response_id,
        "object": "text_completion" if asked.kind == "completion" else "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage_object(
            sum(len(output.prompt_token_ids) for output in outputs),
            sum(len(one.token_ids) for output in outputs for one in output.outputs),
        ),
    }
    if asked.kind == "chat":
        found.update(_prompt_fields(outputs[0], asked, names))
    return found


@dataclass(frozen=True, slots=True)
class ToldPrompt:
    """What the choices of one prompt have in common: made once, and written to by none of them.

    text: before each choice's own, "" without echo. fields: beside a choice's own. logprobs: the
    echo's lists, or None. writer: of a completion's logprobs, behind the echo; each choice needs a
    copy of it. None where there are no logprobs.
    """

    text: str
    fields: Mapping[str, Any]
    logprobs: dict[str, list[Any]] | None
    writer: CompletionLogprobs | None


def told_prompt(output: RequestOutput, asked: BodyRequest, names: TokenNames) -> ToldPrompt:
    """Return what is told of a prompt with each of its choices; of a chat nothing is."""
    if asked.kind == "chat":
        return ToldPrompt("", {}, None, None)
    sampling = asked.sampling
    writer = echoed = None
    if sampling.logprobs is not None:
        skips = sampling.skip_special_tokens
        writer = CompletionLogprobs(names, sampling.logprobs, skips_special=skips)
        if asked.echo and output.prompt_logprobs is not None:
            echoed = writer.of_prompt(output.prompt_token_ids, output.prompt_logprobs)
    text = prompt_text(output, names) if asked.echo else ""
    return ToldPrompt(text, _prompt_fields(output, asked, names), echoed, writer)


def usage_object(num_prompt: int, num_output: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }


def prompt_text(output: RequestOutput, names: TokenNames) -> str:
    """Return the prompt as an echo shows it: as it was sent, or what its token ids say."""
    if output.prompt is not None:
        return output.prompt
    return "" if names.tokenizer is None else names.tokenizer.decode(output.prompt_token_ids)


def error_object(
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """Return the body of an answer that says what was wrong. param: the field it is about."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _choice(
    prompt: ToldPrompt, one: CompletionOutput, asked: BodyRequest, first: int, names: TokenNames
) -> dict[str, Any]:
    """Return one choice. first: how many choices the prompts before this one have."""
    end: dict[str, Any] = {"index": first + one.index, "finish_reason": one.finish_reason}
    if asked.has_token_ids:
        end["token_ids"] = list(one.token_ids)
    if one.routed_experts is not None:  # of each token: of each layer with experts, those it used
        end["routed_experts"] = one.routed_experts.array().tolist()
    num_top = asked.sampling.logprobs
    if asked.kind == "completion":
        told = None
        if prompt.writer is not None:
            own = copy.copy(prompt.writer).of_output(one.logprobs or ())
            told = own if prompt.logprobs is None else joined([prompt.logprobs, own])
        return {"text": prompt.text + one.text, "logprobs": told, **end, **prompt.fields}
    content = None
    if one.logprobs is not None:
        content = {"content": chat_logprobs(one.logprobs, names, num_top or 0), "refusal": None}
    message = {"role": "assistant", "content": one.text, "refusal": None}
    return {"message": message, "logprobs": content, **end}


def _prompt_fields(output: RequestOutput, asked: BodyRequest, names: TokenNames) -> dict[str, Any]:
    """Return what is told of a prompt where it was asked for; vLLM's names."""
    found: dict[str, Any] = {}
    if asked.has_token_ids:
        found["prompt_token_ids"] = list(output.prompt_token_ids)
    if asked.num_prompt_logprobs is not None and output.prompt_logprobs is not None:
        found["prompt_logprobs"] = prompt_logprobs(
            output.prompt_logprobs, names, asked.num_prompt_logprobs
        )
    return found
