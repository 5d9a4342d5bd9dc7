"""Who may ask for what: the layer around the application, for every request.

Host names, keys, how much at once, and one form of error for all that fails. It decides on
`scope["path"]`, which is what the router goes by, and changes no part of it. Paths that it does not
know need a key, so that a route that nobody thought of here is closed.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import ipaddress
import itertools
import logging
import re
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from moe_serve.errors import ConfigError
from moe_serve.server.limits import Limits
from moe_serve.server.refusals import Refusal

logger = logging.getLogger(__name__)

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Route:
    """access: whether a key is needed, where there are keys.

    generates: it takes time or memory for texts, and counts for limits.
    """

    access: Literal["open", "key"] = "key"
    generates: bool = False


# Every route of the server, as its router has it; tests compare the two. A path within
# /v1/models/ is none of these, and is treated as unknown ones are: it needs a key.
ROUTES: Mapping[str, Route] = {
    "/live": Route("open"),
    "/ready": Route("open"),
    "/health": Route("open"),
    "/version": Route(),
    "/openapi.json": Route(),
    "/metrics": Route(),
    "/dashboard": Route(),
    "/dashboard/data": Route(),
    "/dashboard/charts.js": Route(),
    "/dashboard/figures.js": Route(),
    "/dashboard/heatmap.js": Route(),
    "/dashboard/icon.svg": Route(),
    "/dashboard/page.css": Route(),
    "/dashboard/page.js": Route(),
    "/dashboard/rates.js": Route(),
    "/v1/models": Route(),
    "/v1/models/{model:path}": Route(),
    "/v1/abort": Route(),
    "/tokenize": Route(generates=True),
    "/detokenize": Route(generates=True),
    "/v1/completions": Route(generates=True),
    "/v1/chat/completions": Route(generates=True),
}
_UNKNOWN = Route()

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST = re.compile(rb"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{0,5})?")
_REQUEST_ID = re.compile(rb"[\x20-\x7e]{1,128}")
_CHALLENGES = (
    (b"www-authenticate", b'Bearer realm="moe_serve"'),
    (b"www-authenticate", b'Basic realm="moe_serve", charset="UTF-8"'),
)
_NO_STORE = (b"cache-control", b"no-store")
_RETRY = ((b"retry-after", b"1"),)


def is_loopback(host: str) -> bool:
    """Tell whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def own_names(host: str) -> tuple[str, ...]:
    """Return what a listener on `host` is called by it: () where that means all addresses."""
    name = host.strip("[]").lower()
    try:
        return () if ipaddress.ip_address(name).is_unspecified else (name,)
    except ValueError:
        return (name,)


def check_binding(host: str, keys: Sequence[str]) -> None:
    """Raise ConfigError where a server would answer other machines without asking for a key."""
    if keys or is_loopback(host):
        return
    raise ConfigError(
        f"host is {host!r}, which other machines reach, and there is no key: anybody could use "
        "this server. Set MOE_SERVE_API_KEY (or --api-key), or listen on 127.0.0.1"
    )


def access_of(path: str, routes: Mapping[str, Route] = ROUTES) -> Route:
    """Return what is known of a path; of an unknown one, that it needs a key."""
    return routes.get(path, _UNKNOWN)


@functools.lru_cache(256)
def host_name(value: bytes) -> str | None:
    """Return the name in a Host header, in lower case, without brackets and port; None: no name."""
    match = _HOST.fullmatch(value)
    if match is None:
        return None
    return (match[1] or match[2]).decode("ascii").lower()


def offered_key(authorization: bytes) -> tuple[Literal["bearer", "basic"], bytes] | None:
    """Return the key of an Authorization header, and how it came; None if it has none."""
    scheme, _, rest = authorization.partition(b" ")
    rest = rest.strip(b" ")
    match scheme.lower():
        case b"bearer" if rest:
            return "bearer", rest
        case b"basic":
            try:
                pair = base64.b64decode(rest, validate=True)
            except binascii.Error:
                return None
            _, colon, password = pair.partition(b":")
            return ("basic", password) if colon and password else None
    return None


class Keys:
    """The keys of a server, of which only digests are kept."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        # another digest, as it is seen by more than this class
        self._ids = tuple(
            hashlib.sha256(b"moe_serve key id\0" + digest).hexdigest()[:16]
            for digest in self._digests
        )

    def __bool__(self) -> bool:
        return bool(self._digests)

    def id_of(self, offered: bytes) -> str | None:
        """Return a name of the key that was offered, or None if there is none such.

        The time it takes tells neither which key it was nor how much of one was right.
        """
        digest = hashlib.sha256(offered).digest()
        found = None
        for known, name in zip(self._digests, self._ids, strict=True):
            if hmac.compare_digest(digest, known):
                found = name
        return found


def is_foreign(origin: bytes | None, fetch_site: bytes | None, host: bytes | None) -> bool:
    """Tell whether a browser says that a page of somebody else asks."""
    if fetch_site in (b"cross-site", b"same-site"):
        return True
    return origin is not None and origin.partition(b"://")[2].lower() != (host or b"").lower()


# what is read of the headers of a request; more than one of these is refused
_SINGLE = frozenset({b"host", b"authorization", b"origin", b"sec-fetch-site"})


class Guard:
    """An ASGI application: `app`, for those who may ask.

    listens_on: the listener's address. keys: () for a server that asks for none. allowed_hosts:
    names in lower case that Host may have, beside the listener's; with none, a loopback listener is
    asked by loopback names only, so that a web page cannot reach it by a name of its own, and
    others by any. max_per_key: generating requests of one key at once (all without keys together),
    or None.

    Requests find in scope["state"]: "request_id", and "key_id" (16 hex digits, or None where no key
    is asked for). refused: how many were refused here, by status. errors: how many answers had a
    status of 400 and above, those included, and as 499 how many clients went away before.
    """

    def __init__(
        self,
        app: Application,
        limits: Limits,
        *,
        listens_on: str,
        keys: Sequence[str] = (),
        allowed_hosts: Sequence[str] = (),
        max_per_key: int | None = None,
        routes: Mapping[str, Route] = ROUTES,
    ) -> None:
        check_binding(listens_on, keys)
        self.refused: Counter[int] = Counter()
        self.errors: Counter[int] = Counter()
        self.num_generating = 0
        self.num_failed = 0
        self._app = app
        self._limits = limits
        self._keys = Keys(keys)
        self._names: frozenset[str] | None = None
        if allowed_hosts or is_loopback(listens_on):
            own = own_names(listens_on)
            self._names = _LOOPBACK_NAMES.union(own, (name.strip("[]") for name in allowed_hosts))
        self._max_per_key = max_per_key
        self._routes = routes
        self._of_key: Counter[str | None] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        assert scope["type"] == "http", "the protocol lets nothing else in"
        asked: dict[bytes, bytes] = {}
        twice = None
        for name, value in scope["headers"]:
            if name in asked and name in _SINGLE:
                twice = name.decode("ascii")
            asked[name] = value
        state = scope.setdefault("state", {})
        request_id = _request_id(asked.get(b"x-request-id"))
        exchange = _Exchange(request_id, receive, send, state, self.errors)
        state["request_id"] = request_id
        route = access_of(scope["path"], self._routes)
        refusal, key_id = self._admit(asked, twice, route)
        if refusal is not None:
            await self._refuse(exchange, refusal)
            return
        state["key_id"] = key_id
        if not route.generates:
            await self._run(scope, exchange)
            return
        refusal = self._refuse_if_full(key_id)
        if refusal is not None:
            await self._refuse(exchange, refusal)
            return
        self.num_generating += 1
        self._of_key[key_id] += 1
        try:
            await self._run(scope, exchange)
        finally:
            self.num_generating -= 1
            self._of_key[key_id] -= 1
            if not self._of_key[key_id]:
                del self._of_key[key_id]

    def _admit(
        self, asked: Mapping[bytes, bytes], twice: str | None, route: Route
    ) -> tuple[Refusal | None, str | None]:
        """Return why a request is refused, or None and the name of its key."""
        if twice is not None:
            return Refusal(400, f"the header {twice} was sent twice"), None
        if self._names is not None and host_name(asked.get(b"host", b"")) not in self._names:
            message = (
                "this server is not known by the host name of the request (its Host header): use "
                "its address, or start it with --allowed-hosts and that name"
            )
            return Refusal(400, message, code="unknown_host"), None
        if not self._keys or route.access == "open":
            return None, None
        key_id = self._key_id(asked)
        if key_id is None:
            message = "no valid key: send it as `Authorization: Bearer KEY`"
            return Refusal(401, message, "invalid_api_key", _CHALLENGES), None
        return None, key_id

    def _key_id(self, asked: Mapping[bytes, bytes]) -> str | None:
        offered = offered_key(asked.get(b"authorization", b""))
        if offered is None:
            return None
        scheme, key = offered
        # a browser adds Basic by itself to what any page asks for; Bearer must be written by one
        if scheme == "basic" and is_foreign(
            asked.get(b"origin"), asked.get(b"sec-fetch-site"), asked.get(b"host")
        ):
            return None
        return self._keys.id_of(key)

    def _refuse_if_full(self, key_id: str | None) -> Refusal | None:
        if self._max_per_key is not None and self._of_key[key_id] >= self._max_per_key:
            message = f"{self._max_per_key} requests of one key may run at once; try again later"
            return Refusal(429, message, "too_many_requests", _RETRY)
        if self.num_generating >= self._limits.requests:
            message = f"{self._limits.requests} requests may run at once; try again later"
            return Refusal(503, message, "overloaded", _RETRY)
        return None

    async def _refuse(self, exchange: _Exchange, refusal: Refusal) -> None:
        self.refused[refusal.status] += 1
        await exchange.answer(refusal)

    async def _run(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            await self._run_app(scope, exchange)
        finally:
            exchange.count_gone()

    async def _run_app(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            await self._app(scope, exchange.receive, exchange.send)
            await exchange.pass_held()
        except Exception:
            if exchange.is_client_gone:
                logger.debug("the client of request %s went away", exchange.request_id)
                return
            logger.exception(
                "request %r failed (%s %r)",
                exchange.request_id,
                scope["method"],
                scope["path"][:256],
            )
        else:
            if exchange.is_complete or exchange.is_client_gone:
                return
            logger.error("request %r was given no whole answer", exchange.request_id)
        self.num_failed += 1
        if exchange.is_complete:
            return
        if not exchange.has_begun:
            message = f"internal error; the server's log has it as request {exchange.request_id}"
            await self._refuse(exchange, Refusal(500, message))
        else:
            exchange.cut()


class _Exchange:
    """One request and its response, as they pass between the application and the protocol.

    A 500 is held until the application has returned: frameworks answer an error with a text of
    their own before they let it through, and it is ours that is to be sent.
    """

    __slots__ = (
        "_errors",
        "_has_failed",
        "_held",
        "_receive",
        "_send",
        "_state",
        "has_begun",
        "is_client_gone",
        "is_complete",
        "request_id",
    )

    def __init__(
        self, request_id: str, receive: Receive, send: Send, state: Any, errors: Counter[int]
    ) -> None:
        """errors: answers of 400 and above, which are counted by status as they are sent."""
        self.request_id = request_id
        self.has_begun = False
        self.is_complete = False
        self.is_client_gone = False
        self._errors = errors
        self._has_failed = False
        self._held: list[Message] | None = []
        self._receive = receive
        self._send = send
        self._state = state

    async def receive(self) -> Message:
        message = await self._receive()
        # after the whole response it says only that there is nothing more
        if message["type"] == "http.disconnect" and not self.is_complete:
            self.is_client_gone = True
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if self._held is not None and (self._held or message.get("status") == 500):
            self._held.append(message)
            return
        if kind == "http.response.start":
            message = {**message, "headers": self._with_ours(message.get("headers", ()))}
            self.has_begun = True
            if message["status"] >= 400:
                self._has_failed = True
                self._errors[message["status"]] += 1
        await self._send(message)
        if kind == "http.response.body" and not message.get("more_body", False):
            self.is_complete = True

    async def pass_held(self) -> None:
        """Send what was held, and hold nothing more."""
        held, self._held = self._held, None
        for message in held or ():
            await self.send(message)

    async def answer(self, refusal: Refusal) -> None:
        """Send a whole response."""
        start = {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": refusal.all_headers,
        }
        self._held = None
        await self.send(start)
        await self.send({"type": "http.response.body", "body": refusal.body})

    def count_gone(self) -> None:
        """Count a client that went away before its answer was whole, if it was told no error."""
        is_told = self.is_complete or self._has_failed or self._state.get("is_refused", False)
        if self.is_client_gone and not is_told:
            self._errors[499] += 1

    def cut(self) -> None:
        """End the connection, as its response cannot be ended."""
        cut = self._state.get("cut_connection")
        if cut is None:
            raise RuntimeError("the response was not ended, and the connection cannot be")
        cut()

    def _with_ours(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        result = list(headers)
        named = {name for name, _ in result}
        if b"cache-control" not in named:
            result.append(_NO_STORE)
        if b"x-request-id" not in named:
            result.append((b"x-request-id", self.request_id.encode("ascii")))
        return result


# names that no other process gives, without asking the system for each
_PREFIX = secrets.token_hex(8)
_numbers = itertools.count(1)


def _request_id(offered: bytes | None) -> str:
    """Return the client's own name for a request if it may be repeated, or else a new one."""
    if offered is not None and _REQUEST_ID.fullmatch(offered):
        return offered.decode("ascii")
    return f"{_PREFIX}{next(_numbers):016x}"
