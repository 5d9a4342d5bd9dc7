"""Whether there is a server, and which model it serves, before anything is measured."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from moe_serve.errors import CommError, ConfigError
from moe_serve.load.connection import BadAnswer, ConnectionFailed, ConnectionPool
from moe_serve.load.records import MAX_ERROR_BYTES, UNREADABLE, error_message

CHECK_S = 2.5


class _Whole:
    """Keeps an answer whole, up to MAX_ERROR_BYTES and more by one read."""

    def __init__(self) -> None:
        self.status = 0
        self.data = b""

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status

    def body(self, data: bytes) -> None:
        if len(self.data) < MAX_ERROR_BYTES:
            self.data += data


async def find_model(pool: ConnectionPool, model: str | None) -> str:
    """Return `model`, or the first that the server lists, which is asked in either case.

    Raises CommError when nobody answers within CHECK_S, or not as the API does, and ConfigError
    when the key is refused.
    """
    url = pool.address.url
    whole = _Whole()
    try:
        async with asyncio.timeout(CHECK_S):
            await pool.exchange(pool.request("GET", "/v1/models"), whole)
    except TimeoutError as error:
        raise CommError(
            f"the server at {url} did not answer within {CHECK_S} s (asked for /v1/models)"
        ) from error
    except ConnectionFailed as error:
        raise CommError(
            f"no server at {url}: {error}; start one, or name it with --base-url"
        ) from error
    except BadAnswer as error:
        raise CommError(f"what answers at {url} is no HTTP server: {error}") from error
    if whole.status in (401, 403):
        raise ConfigError(
            f"{url} refuses the key (status {whole.status}): give --api-key or OPENAI_API_KEY"
        )
    if model is not None:
        return model
    if whole.status != 200:
        raise CommError(
            f"{url}/v1/models answers with status {whole.status}: {error_message(whole.data)} "
            "(name the model with --model)"
        )
    return _first_model(url, whole.data)


def _first_model(url: str, body: bytes) -> str:
    try:
        listed: Any = msgspec.json.decode(body)
        found = listed["data"][0]["id"]
    except (*UNREADABLE, LookupError, TypeError) as error:
        raise CommError(
            f"{url}/v1/models lists no model: {body[:80]!r}; name one with --model"
        ) from error
    return str(found)
