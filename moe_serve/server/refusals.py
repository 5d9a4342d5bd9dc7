"""Answers to what is not served: one form for the door, the protocol and the guard."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus

_KINDS = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as clients of the OpenAI API expect it.

    message: whose text must not repeat what the client sent. headers: names in lower case, beside
    content-type and content-length.
    """

    status: int
    message: str
    code: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def body(self) -> bytes:
        """The JSON text of the error."""
        error = {
            "message": self.message,
            "type": _KINDS.get(self.status, "invalid_request_error"),
            "param": None,
            "code": self.code,
        }
        return json.dumps({"error": error}, separators=(",", ":")).encode("ascii")

    @property
    def all_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers of a response of which this is the body."""
        return [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(self.body)).encode("ascii")),
            *self.headers,
        ]

    def wire(self, *, is_head: bool = False) -> bytes:
        """Return a whole HTTP/1.1 response, after which the connection is closed.

        is_head: it answers a HEAD request, which has no body.
        """
        return response_bytes(self.status, self.body, self.headers, is_head=is_head)


def response_bytes(
    status: int,
    body: bytes,
    headers: tuple[tuple[bytes, bytes], ...] = (),
    *,
    is_head: bool = False,
) -> bytes:
    """Return a whole HTTP/1.1 response of JSON, after which the connection is closed."""
    lines = [
        b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode("ascii")),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"cache-control: no-store",
        b"x-content-type-options: nosniff",
        b"connection: close",
        *(name + b": " + value for name, value in headers),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + (b"" if is_head else body)
