"""Answers of JSON as a server sends them, those that are errors included: one form for all."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.types import Send

from moe_serve.errors import MoeServeError
from moe_serve.server.limits import DEFAULT_LIMITS
from moe_serve.text.openai_form import error_object

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable",
    504: "deadline_exceeded",
}
_MOST_CHARS = 1000
# not the pointers within a schema, "#/$defs/a"
_FOLDERS = re.compile(r"(?<![\w.#])~?/(?:[^\s/'\":;,]+/)*(?=[^\s/'\":;,])")

Headers = Iterable[tuple[bytes, bytes]]


class ApiError(MoeServeError):
    """An answer other than what was asked for: `status` of HTTP, and what the body says.

    param: the field of the body that it is about. retry_after_s: when to come again. What is no
    fault of the client is told without the folders that it may name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(without_folders(message) if status >= 500 else message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> bytes:
        """The body of the answer, of at most `Limits.error_bytes` bytes."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        message, num_chars = str(self), _MOST_CHARS
        # what strangers sent may be quoted, and a character of it may need six bytes of JSON
        while True:
            data = msgspec.json.encode(
                error_object(_cut(message, num_chars), kind, self.param, self.code)
            )
            if len(data) <= DEFAULT_LIMITS.error_bytes:
                return data
            num_chars //= 2

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        if self.retry_after_s is None:
            return []
        return [(b"retry-after", str(self.retry_after_s).encode())]


def engine_fault(message: str) -> ApiError:
    """Return the answer to what the engine failed of."""
    return ApiError(500, message, code="engine_error")


def without_folders(message: str) -> str:
    """Return what is said of files with their names alone: where they are is for the log."""
    return _FOLDERS.sub("", message)


def _cut(text: str, num_chars: int) -> str:
    # half a surrogate pair cannot be sent
    text = text.encode(errors="replace").decode()
    return text if len(text) <= num_chars else f"{text[:num_chars]}..."


async def send_json(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    """Send a whole answer of JSON."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError, headers: Headers = ()) -> None:
    await send_json(send, error.status, error.body, [*error.headers, *headers])


def encoded(value: Any) -> bytes:
    """Return plain data as JSON."""
    return msgspec.json.encode(value)
