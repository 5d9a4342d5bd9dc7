"""The OpenAPI document of a server: bodies as they are validated, answers as they are sent.

Made by hand, not from handlers: bodies are parsed and answers encoded without FastAPI's models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from moe_serve.server.bodies import BODIES

_INTEGER = {"type": "integer"}
_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_NULL = {"type": "null"}
_NUMBER = {"type": "number"}


def _object(properties: dict[str, Any], *optional: str, closed: bool = True) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": not closed,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, _NULL]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_FINISH = {"enum": ["stop", "length", "abort"]}
_NAMED = {"token": _TEXT, "logprob": _NUMBER, "bytes": _list(_COUNT)}
_CHAT_LOGPROBS = _object(
    {
        "content": _list(_object({**_NAMED, "top_logprobs": _list(_object(_NAMED))})),
        "refusal": _NULL,
    }
)
_COMPLETION_LOGPROBS = _object(
    {
        "tokens": _list(_TEXT),
        "token_logprobs": _list(_or_null(_NUMBER)),
        "top_logprobs": _list(_or_null({"type": "object", "additionalProperties": _NUMBER})),
        "text_offset": _list(_COUNT),
    }
)
_RANKED = _object({"logprob": _NUMBER, "rank": _INTEGER, "decoded_token": _TEXT})
_PROMPT_LOGPROBS = _list(_or_null({"type": "object", "additionalProperties": _RANKED}))
_OF_PROMPT = {"prompt_token_ids": _list(_COUNT), "prompt_logprobs": _PROMPT_LOGPROBS}


def _answer(kind: str, choice: dict[str, Any], **own: Any) -> dict[str, Any]:
    return _object(
        {
            "id": _TEXT,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _TEXT,
            "choices": _list(choice),
            "usage": _ref("Usage"),
            "system_fingerprint": _TEXT,
            "seed": _INTEGER,
            **own,
        },
        *own,
        closed=False,
    )


_MODEL = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "root": _TEXT,
        "parent": _NULL,
        "max_model_len": _or_null(_COUNT),
    }
)
ANSWERS: dict[str, dict[str, Any]] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": _or_null(_TEXT),
                    "code": _or_null(_TEXT),
                }
            )
        }
    ),
    "Usage": _object(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
        }
    ),
    "Completion": _answer(
        "text_completion",
        _object(
            {
                "index": _COUNT,
                "text": _TEXT,
                "logprobs": _or_null(_COMPLETION_LOGPROBS),
                "finish_reason": _FINISH,
                "token_ids": _list(_COUNT),
                **_OF_PROMPT,
            },
            "token_ids",
            *_OF_PROMPT,
            closed=False,
        ),
    ),
    "ChatCompletion": _answer(
        "chat.completion",
        _object(
            {
                "index": _COUNT,
                "message": _object(
                    {"role": {"const": "assistant"}, "content": _TEXT, "refusal": _NULL},
                    closed=False,
                ),
                "logprobs": _or_null(_CHAT_LOGPROBS),
                "finish_reason": _FINISH,
                "token_ids": _list(_COUNT),
            },
            "token_ids",
            closed=False,
        ),
        **_OF_PROMPT,
    ),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Tokens": _object(
        {
            "count": _COUNT,
            "max_model_len": _COUNT,
            "tokens": _list(_COUNT),
            "token_strs": _or_null(_list(_TEXT)),
        }
    ),
    "Detokenized": _object({"prompt": _TEXT}),
    "Aborted": _object({"request_id": _TEXT, "num_aborted": _COUNT}),
    "Alive": _object({"status": {"const": "live"}}),
    "Readiness": _object({"status": _TEXT}),
    "Version": _object({"version": _TEXT, "numerics_id": _or_null(_TEXT)}),
}

_ERRORS = {
    400: "The body is wrong, or asks for what is not done: `param` names the field.",
    401: "No key, or a wrong one.",
    404: "No such model or route.",
    405: "The route has other methods.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many requests of this key.",
    431: "The headers are too large.",
    500: "A fault of the server.",
    503: "Not ready, or too much is waiting: `Retry-After` says when to come again.",
    504: "The request took too long.",
}


def document(
    version: str, model: str, *, vocab_size: int, variables: Iterable[str]
) -> dict[str, Any]:
    """Return the document of a server of one model, which is the only name a body may give it.

    vocab_size: of its token ids. variables: that its chat template reads.
    """
    modes: list[tuple[type[BaseModel], Any]] = [(body, "validation") for body in BODIES]
    _, definitions = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = {**definitions["$defs"], **ANSWERS}
    for body in BODIES:
        properties = schemas[body.__name__]["properties"]
        if "model" in properties:
            properties["model"] = {"enum": [model, None]}
        if "chat_template_kwargs" in properties:
            kwargs = properties["chat_template_kwargs"]["anyOf"][0]
            (value,) = kwargs.pop("patternProperties").values()
            kwargs["properties"] = dict.fromkeys(sorted(variables), value)
        _say_vocabulary(properties, vocab_size)
    return {
        "openapi": "3.1.0",
        "info": {"title": "moe-serve", "version": version},
        "paths": _paths(),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _say_vocabulary(schema: object, vocab_size: int) -> None:
    """Write the greatest token id where a schema has one of any model."""
    if isinstance(schema, list):
        for part in schema:
            _say_vocabulary(part, vocab_size)
    elif isinstance(schema, dict):
        if schema.pop("x-token-id", False):
            schema["maximum"] = vocab_size - 1
        for part in schema.values():
            _say_vocabulary(part, vocab_size)


def _paths() -> dict[str, Any]:
    # of one event; the last is [DONE]
    event = _object({"data": {**_TEXT, "contentMediaType": "application/json"}}, closed=False)
    events = {"text/event-stream": {"schema": event}}
    return {
        "/v1/completions": _post("Complete a text", "CompletionBody", "Completion", events),
        "/v1/chat/completions": _post("Answer a chat", "ChatBody", "ChatCompletion", events),
        "/tokenize": _post("Make tokens of a text or a chat", "TokenizeBody", "Tokens"),
        "/detokenize": _post("Make text of tokens", "DetokenizeBody", "Detokenized"),
        "/v1/abort": _post("End a request that is being served", "AbortBody", "Aborted"),
        "/v1/models": _get("The model that is served", "Models"),
        "/v1/models/{model}": _with_model(_get("The model, if it has this name", "Model", 404)),
        "/live": _get("Whether the process answers", "Alive"),
        "/ready": _get("Whether a request would be taken now", "Readiness", 503),
        "/health": _get("Whether there is an engine, or one is being made", "Readiness", 503),
        "/version": _get("The versions that answers depend on", "Version"),
    }


def _post(
    summary: str, body: str, answer: str, others: dict[str, Any] | None = None
) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(answer)}, **(others or {})}
    return {
        "post": {
            "summary": summary,
            "operationId": body.removesuffix("Body").lower(),
            "security": [{}, {"key": []}],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _ref(body)}},
            },
            "responses": {"200": {"description": "The answer", "content": content}, **_errors()},
        }
    }


def _get(summary: str, answer: str, *errors: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(answer)}}
    return {
        "get": {
            "summary": summary,
            "security": [{}, {"key": []}],
            "responses": {
                "200": {"description": "The answer", "content": content},
                **_errors(401, 405, 408, 429, 431, 500, *errors),
            },
        }
    }


def _with_model(path: dict[str, Any]) -> dict[str, Any]:
    parameter = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    return {**path, "parameters": [parameter]}


def _errors(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref("Error")}}
    return {
        str(status): {"description": told, "content": content}
        for status, told in _ERRORS.items()
        if not statuses or status in statuses
    }
