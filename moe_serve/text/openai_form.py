"""OpenAI's completions and chat completions: a body to a prompt and params, outputs to an object.

What a body asks for and this system does not do is an error that names it, never left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from moe_serve.errors import RequestError, nearest
from moe_serve.text.prompts import Prompt, RequestMaker
from moe_serve.text.tokenizer import Tokenizer
from moe_serve.types import (
    CompletionOutput,
    RequestOutput,
    SamplingParams,
    StructuredOutputs,
    TokenLogprobs,
)

Kind = Literal["completion", "chat"]

KIND_OF_URL: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}

# "prompt_logprobs" has no place in the answer's form
SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams)) - {"prompt_logprobs"}
COMMON_FIELDS = frozenset({"model", "user", "stream", "priority", "cache_salt", "response_format"})
OWN_FIELDS: dict[Kind, frozenset[str]] = {
    "completion": COMMON_FIELDS | {"prompt", "echo", "suffix", "best_of"},
    "chat": COMMON_FIELDS | {"messages", "max_completion_tokens", "top_logprobs"},
}
# fields that are known, and the one value of each that asks for nothing
WITHOUT_EFFECT: dict[str, object] = {"echo": False, "stream": False, "suffix": "", "best_of": 1}
_FORMATS = ("text", "json_object", "json_schema")
_SCHEMA = "response_format.json_schema"


@dataclass(frozen=True, slots=True)
class BodyRequest:
    """What a body asks for."""

    kind: Kind
    prompt: Prompt
    sampling: SamplingParams
    priority: int


def read_body(
    url: str, body: Mapping[str, Any], maker: RequestMaker, defaults: SamplingParams
) -> BodyRequest:
    """Read the body of a request to `url`; any fault is a RequestError that names the field.

    A field that is null was not given. Beside OpenAI's fields there are those of SamplingParams,
    priority (lower runs earlier) and cache_salt. defaults: the model's own sampling. Without
    max_tokens a completion has at most 16 tokens, and a chat completion what the context holds.
    """
    if url not in KIND_OF_URL:
        raise RequestError(
            f"url is {url!r:.80}{nearest(str(url), KIND_OF_URL)} "
            f"(there are: {', '.join(KIND_OF_URL)})"
        )
    kind = KIND_OF_URL[url]
    given = {name: value for name, value in body.items() if value is not None}
    _check_known(kind, given)
    sampling = _read_sampling(kind, given, defaults)
    return BodyRequest(kind, _read_prompt(kind, given, maker), sampling, given.get("priority", 0))


def _check_known(kind: Kind, given: Mapping[str, Any]) -> None:
    known = SAMPLING_FIELDS | OWN_FIELDS[kind]
    for name, value in given.items():
        if name not in known:
            raise RequestError(f"parameter {name!r:.80} is not supported{nearest(name, known)}")
        if name in WITHOUT_EFFECT and value != WITHOUT_EFFECT[name]:
            raise RequestError(
                f"{name} is {value!r:.80}; only {WITHOUT_EFFECT[name]!r} is supported here"
            )
    for name in ("model", "user"):
        if name in given and not isinstance(given[name], str):
            raise RequestError(f"{name} is {given[name]!r:.80}; it must be text")


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
        message = str(error).replace("structured_outputs.json", f"{_SCHEMA}.schema")
        raise RequestError(message) from error


def _refuse_others(where: str, value: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in value:
        if name not in known:
            raise RequestError(f"{where} has {name!r:.80}{nearest(name, known)}")


def _read_prompt(kind: Kind, given: Mapping[str, Any], maker: RequestMaker) -> Prompt:
    name = "prompt" if kind == "completion" else "messages"
    if name not in given:
        raise RequestError(f"{name} is missing")
    value = given[name]
    if kind == "chat":
        if maker.chat_template is None:
            raise RequestError(
                "the model has no chat template: pass --chat-template, or use /v1/completions"
            )
        return maker.chat_prompt(value, cache_salt=given.get("cache_salt"))
    if isinstance(value, list) and value and not isinstance(value[0], int):
        if len(value) != 1:
            raise RequestError(f"prompt is a list of {len(value)} prompts; give one in a request")
        value = value[0]
    if not isinstance(value, str | list):
        raise RequestError(f"prompt is {value!r:.80}; it must be text or a list of token ids")
    salt = {"cache_salt": given["cache_salt"]} if "cache_salt" in given else {}
    key = "prompt" if isinstance(value, str) else "prompt_token_ids"
    return cast(Prompt, {key: value, **salt})


def response_object(
    output: RequestOutput,
    kind: Kind,
    *,
    model: str,
    response_id: str,
    created: int,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Return the object of a request that has finished; created is in seconds since 1970.

    All else is a function of the request: how many prompt tokens were cached is not told here.
    """
    num_prompt = len(output.prompt_token_ids)
    num_output = sum(len(o.token_ids) for o in output.outputs)
    return {
        "id": response_id,
        "object": "text_completion" if kind == "completion" else "chat.completion",
        "created": created,
        "model": model,
        "choices": [_choice(o, kind, tokenizer) for o in output.outputs],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        },
    }


def error_object(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Return the body of an answer that says what was wrong."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _choice(output: CompletionOutput, kind: Kind, tokenizer: Tokenizer | None) -> dict[str, Any]:
    end = {"index": output.index, "finish_reason": output.finish_reason}
    logprobs = output.logprobs
    if kind == "completion":
        told = None if logprobs is None else _completion_logprobs(logprobs, tokenizer)
        return {"text": output.text, "logprobs": told, **end}
    content = None if logprobs is None else [_chat_logprob(entry, tokenizer) for entry in logprobs]
    return {
        "message": {"role": "assistant", "content": output.text},
        "logprobs": None if content is None else {"content": content},
        **end,
    }


def _completion_logprobs(
    logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    tokens = [_token_text(entry.token_id, tokenizer) for entry in logprobs]
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [
            {_token_text(token_id, tokenizer): logprob for token_id, logprob in entry.top}
            for entry in logprobs
        ],
        "text_offset": offsets[:-1],
    }


def _chat_logprob(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[str, Any]:
    def named(token_id: int, logprob: float) -> dict[str, Any]:
        token = _token_text(token_id, tokenizer)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    top = [named(token_id, logprob) for token_id, logprob in entry.top]
    return {**named(entry.token_id, entry.logprob), "top_logprobs": top}


def _token_text(token_id: int, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return f"token_id:{token_id}"
    return tokenizer.decode([token_id], skip_special_tokens=False)
