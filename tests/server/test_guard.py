"""Who may ask for what: no host name, path or header leads past the guard."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from moe_serve.errors import ConfigError
from moe_serve.server.guard import (
    ROUTES,
    Guard,
    Keys,
    access_of,
    check_binding,
    host_name,
    is_foreign,
    is_loopback,
    offered_key,
)
from moe_serve.server.limits import Limits
from tests.served import QUICK, Served, error_of, header, parsed, read_all, request

KEY = "sk-first-key"
OTHER = "sk-other:key"
KEYED = ("/metrics", "/dashboard", "/v1/models", "/v1/completions", "/v1/chat/completions")
OPEN = ("/live", "/ready", "/health")


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


def basic(key: str, user: str = "x") -> str:
    return "Authorization: Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()


def method_of(path: str) -> str:
    return "POST" if ROUTES.get(path) is not None and ROUTES[path].generates else "GET"


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    with Served(keys=(KEY, OTHER), listens_on="0.0.0.0") as running:
        yield running


@pytest.fixture(scope="module")
def loopback() -> Iterator[Served]:
    with Served(keys=(KEY,)) as running:
        yield running


# -- pure functions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_what_is_a_loopback_address(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_other_machines_are_not_answered_without_a_key() -> None:
    check_binding("127.0.0.1", ())
    check_binding("0.0.0.0", (KEY,))
    with pytest.raises(ConfigError, match="MOE_SERVE_API_KEY") as raised:
        check_binding("0.0.0.0", ())
    assert "0.0.0.0" in str(raised.value)
    with pytest.raises(ConfigError):
        Guard(lambda *_: asyncio.sleep(0), Limits(), listens_on="::")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"localhost", "localhost"),
        (b"LocalHost:8000", "localhost"),
        (b"localhost:", "localhost"),
        (b"[::1]:80", "::1"),
        (b"[::1]", "::1"),
        (b"::1", None),
        (b"", None),
        (b"localhost:80:80", None),
        (b"localhost:port", None),
        (b"localhost:123456", None),
        (b"user@localhost", None),
        (b"localhost/path", None),
        (b"localhost, evil.example", None),
        (b" localhost", None),
        (b"localhost\n", None),
        (b"[::1", None),
        (b"local\xffhost", None),
    ],
)
def test_the_name_in_a_host_header(value: bytes, expected: str | None) -> None:
    assert host_name(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"Bearer abc", ("bearer", b"abc")),
        (b"bEARER  abc ", ("bearer", b"abc")),
        (b"Bearer", None),
        (b"Bearer ", None),
        (b"abc", None),
        (b"", None),
        (b"Token abc", None),
        (b"Basic " + base64.b64encode(b"user:a:b"), ("basic", b"a:b")),
        (b"Basic " + base64.b64encode(b"user:"), None),
        (b"Basic " + base64.b64encode(b"nocolon"), None),
        (b"Basic not base64!", None),
        (b"Basic", None),
    ],
)
def test_the_key_in_an_authorization_header(value: bytes, expected: object) -> None:
    assert offered_key(value) == expected


def test_keys_are_told_apart_by_short_names() -> None:
    keys = Keys((KEY, OTHER))
    names = [keys.id_of(key.encode()) for key in (KEY, OTHER)]
    assert None not in names
    assert len(set(names)) == 2
    assert all(name is not None and len(name) == 16 for name in names)
    assert Keys((OTHER, KEY)).id_of(KEY.encode()) == names[0], "the same after a restart"
    for wrong in (b"", KEY.upper().encode(), KEY[:-1].encode(), KEY.encode() + b"x", b"\xff"):
        assert keys.id_of(wrong) is None
    assert keys
    assert not Keys(())
    assert Keys(()).id_of(b"") is None


@pytest.mark.parametrize(
    ("origin", "site", "expected"),
    [
        (None, None, False),
        (b"http://localhost:8000", b"same-origin", False),
        (b"http://LOCALHOST:8000", None, False),
        (None, b"none", False),
        (None, b"cross-site", True),
        (None, b"same-site", True),
        (b"http://localhost:9000", None, True),
        (b"https://evil.example", None, True),
        (b"null", None, True),
    ],
)
def test_pages_of_somebody_else(origin: bytes | None, site: bytes | None, expected: bool) -> None:
    assert is_foreign(origin, site, b"localhost:8000") is expected


def test_unknown_paths_need_a_key() -> None:
    assert [path for path in ROUTES if access_of(path).access == "open"] == list(OPEN)
    for path in ("/", "", "/live/", "/Live", "//live", "/live;x", "/v1/live", "live", "/live\0"):
        assert access_of(path).access == "key"


# -- keys ------------------------------------------------------------------------------------------

WITHOUT = {
    "none": (),
    "empty": ("Authorization: Bearer ",),
    "wrong": (bearer("sk-wrong"),),
    "prefix": (bearer(KEY[:-1]),),
    "longer": (bearer(KEY + "x"),),
    "quoted": (bearer(f'"{KEY}"'),),
    "scheme": (f"Authorization: Token {KEY}",),
    "bare": (f"Authorization: {KEY}",),
    "as user": (basic("", KEY),),
    "wrong password": (basic("sk-wrong"),),
    "other header": (f"X-Api-Key: {KEY}", f"Api-Key: {KEY}", f"Cookie: key={KEY}"),
    "proxy header": (f"Proxy-Authorization: Bearer {KEY}", f"X-Forwarded-Authorization: {KEY}"),
    "two keys": (bearer(f"{KEY},{OTHER}"),),
}


@pytest.mark.parametrize("path", KEYED)
@pytest.mark.parametrize("headers", WITHOUT.values(), ids=WITHOUT)
def test_no_route_is_reached_without_a_key(
    keyed: Served, path: str, headers: tuple[str, ...]
) -> None:
    keyed.events.clear()
    for target in (path, f"{path}?key={KEY}&api_key={KEY}&access_token={KEY}"):
        response = keyed.send(request(method_of(path), target, b"", "Connection: close", *headers))
        status, error = error_of(response)
        assert (status, error["type"]) == (401, "authentication_error")
        head = response.partition(b"\r\n\r\n")[0]
        assert b"\r\nwww-authenticate: Bearer " in head
        assert b"\r\nwww-authenticate: Basic " in head
        assert KEY.encode() not in response
    assert keyed.events == []


@pytest.mark.parametrize("path", KEYED)
@pytest.mark.parametrize("headers", [bearer(KEY), bearer(OTHER), basic(KEY), basic(OTHER)])
def test_every_key_opens_every_route(keyed: Served, path: str, headers: str) -> None:
    assert keyed.ask(method_of(path), path, b"", headers)[0] == 200


@pytest.mark.parametrize("path", OPEN[1:])
def test_open_routes_need_no_key_and_mind_no_wrong_one(keyed: Served, path: str) -> None:
    for headers in ((), (bearer("wrong"),), (bearer(KEY),)):
        assert keyed.ask("GET", path, b"", *headers)[0] == 200


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/./v1/models",
        "/live/../v1/models",
        "/live/%2e%2e/v1/models",
        "/live%2f..%2fv1/models",
        "/%76%31/models",
        "/v1%2fmodels",
        "/v1//models",
        "/v1/models/",
        "/v1/models;x=/live",
        "/v1/models;/live",
        "/live;/v1/models",
        "/v1/models%00",
        "/v1/models%00/live",
        "/live%00/v1/models",
        "/v1/models#/live",
        "/live#/v1/models",
        "/v1/models?/live",
        "/V1/Models",
        "/v1/models%3F/live",
        "/v1\\models",
        "/%2e/v1/models",
        "/secret",
        "/secret/",
        "/docs",
        "/openapi.json",
        "/block",
        "/%c0%af/v1/models",
        "http://localhost/v1/models",
        "http://localhost/live",
        "http://localhost@/live/v1/models",
        "//localhost/live/../v1/models",
        "live",
        "*",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PUT", "TRACE", "get"])
def test_no_way_of_writing_a_path_leads_past_the_guard(
    keyed: Served, target: str, method: str
) -> None:
    keyed.events.clear()
    status, _ = keyed.ask(method, target)
    if target.startswith("/"):
        assert status == 401, "before 404 and 405"
    else:
        assert status == 400
    assert keyed.events == []


@pytest.mark.parametrize("target", ["/%6cive", "/live?x=1", "/health?/v1/models", "/%72eady"])
def test_what_the_router_takes_for_open_is_open(keyed: Served, target: str) -> None:
    assert keyed.ask("GET", target)[0] == 200
    assert keyed.events[-1] in OPEN


def test_a_header_that_comes_twice_opens_nothing(keyed: Served) -> None:
    for headers in ((bearer(KEY), bearer("wrong")), (bearer("wrong"), bearer(KEY))):
        response = keyed.send(request("GET", "/v1/models", b"", "Connection: close", *headers))
        assert error_of(response)[0] == 400


def test_basic_is_not_taken_from_pages_of_somebody_else(keyed: Served) -> None:
    for foreign in ("Origin: https://evil.example", "Sec-Fetch-Site: cross-site", "Origin: null"):
        assert keyed.ask("POST", "/v1/completions", b"{}", basic(KEY), foreign)[0] == 401
        assert keyed.ask("POST", "/v1/completions", b"{}", bearer(KEY), foreign)[0] == 200
    own = ("Host: server:80", "Origin: http://server:80", "Sec-Fetch-Site: same-origin")
    assert keyed.ask("POST", "/v1/completions", b"{}", basic(KEY), *own)[0] == 200


def test_a_refusal_leaves_the_connection_to_who_comes_back_with_a_key(keyed: Served) -> None:
    with keyed.connect() as sock:
        sock.sendall(request("POST", "/v1/completions", b"{}"))
        sock.sendall(request("POST", "/v1/completions", b"{}", "Connection: close", bearer(KEY)))
        received = read_all(sock)
        assert received.startswith(b"HTTP/1.1 401 ")
        assert received.endswith(b'{"bytes":2}')


def test_the_application_knows_which_key_it_was(keyed: Served) -> None:
    names = [
        json.loads(keyed.ask("GET", "/v1/models", b"", bearer(key))[1])["key_id"]
        for key in (KEY, OTHER, KEY)
    ]
    assert names[0] == names[2] != names[1]
    assert names[0] == Keys((KEY,)).id_of(KEY.encode())
    assert json.loads(keyed.ask("GET", "/health", b"", bearer(KEY))[1])["key_id"] is None


def test_no_key_is_logged(keyed: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        keyed.ask("GET", "/boom", b"", bearer(KEY))
        keyed.ask("GET", "/v1/models", b"", bearer("sk-nearly"))
        keyed.ask("GET", f"/v1/models?key={KEY}", b"", basic(OTHER))
    assert "/boom" in caplog.text
    for secret in (KEY, OTHER, "sk-nearly", basic(OTHER).rpartition(" ")[2]):
        assert secret not in caplog.text


def test_without_keys_nobody_is_asked_for_one() -> None:
    with Served() as served:
        for path in KEYED:
            assert served.ask(method_of(path), path)[0] == 200
        assert served.ask("GET", "/none")[0] == 404
        assert served.ask("DELETE", "/v1/models")[0] == 405


# -- host names ------------------------------------------------------------------------------------

FOREIGN_HOSTS = (
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
    "localhost:80@evil.example", "localhost,evil.example", "0.0.0.0", "127.0.0.2", "[::]", "[::2]",
    "localhost:x", "localhost.", "0x7f.1", "2130706433", "/v1/models", "localhost#", "?",
)  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
@pytest.mark.parametrize("path", [*OPEN[1:], *KEYED, "/none"])
def test_a_loopback_server_is_known_by_no_other_name(
    loopback: Served, host: str, path: str
) -> None:
    loopback.events.clear()
    for headers in ((), (bearer(KEY),)):
        data = request(method_of(path), path, b"", f"Host: {host}", "Connection: close", *headers)
        status, error = error_of(loopback.send(data))
        assert (status, error["type"]) == (400, "invalid_request_error")
        assert host not in error["message"]
    assert loopback.events == []


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:65535"])
def test_a_loopback_server_is_known_by_its_own_names(loopback: Served, host: str) -> None:
    assert loopback.ask("GET", "/v1/models", b"", f"Host: {host}", bearer(KEY))[0] == 200
    assert loopback.ask("GET", "/v1/models", b"", f"Host: {host}")[0] == 401


def test_a_loopback_server_wants_a_host(loopback: Served) -> None:
    data = f"GET /v1/models HTTP/1.0\r\n{bearer(KEY)}\r\n\r\n".encode()
    assert error_of(loopback.send(data))[0] == 400
    twice = b"GET / HTTP/1.0\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert error_of(loopback.send(twice))[0] == 400


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_strange_host_does_not_change_the_path(keyed: Served, host: str) -> None:
    keyed.events.clear()
    data = request("GET", "/v1/models", b"", f"Host: {host}", "Connection: close")
    assert error_of(keyed.send(data))[0] == 401
    assert keyed.events == []


def test_a_public_server_is_known_by_any_name(keyed: Served) -> None:
    assert keyed.ask("GET", "/v1/models", b"", "Host: any.example", bearer(KEY))[0] == 200
    data = f"GET /v1/models HTTP/1.0\r\n{bearer(KEY)}\r\n\r\n".encode()
    assert parsed(keyed.send(data))[0] == 200


def test_allowed_hosts_are_all_that_is_allowed() -> None:
    with Served(keys=(KEY,), listens_on="0.0.0.0", allowed_hosts=("api.example", "fe80::1")) as s:
        for host in ("api.example", "API.example:443", "[fe80::1]", "localhost"):
            assert s.ask("GET", "/health", b"", f"Host: {host}")[0] == 200
        for host in ("other.example", "example", "xapi.example"):
            assert s.ask("GET", "/health", b"", f"Host: {host}")[0] == 400


@pytest.mark.parametrize(
    ("listens_on", "allowed", "host", "status"),
    [
        ("127.0.0.2", (), "127.0.0.2", 200),
        ("127.0.0.2", (), "127.0.0.3", 400),
        ("192.0.2.7", ("api.example",), "192.0.2.7", 200),
        ("Inner.Example", ("api.example",), "inner.example:80", 200),
        ("[2001:db8::A]", ("api.example",), "[2001:db8::a]", 200),
        ("0.0.0.0", ("api.example",), "0.0.0.0", 400),
        ("::", ("api.example",), "[::]", 400),
    ],
)
def test_a_server_is_known_by_the_address_it_listens_on(
    listens_on: str, allowed: tuple[str, ...], host: str, status: int
) -> None:
    with Served(keys=(KEY,), listens_on=listens_on, allowed_hosts=allowed) as served:
        assert served.ask("GET", "/health", b"", f"Host: {host}")[0] == status


# -- how much at once ------------------------------------------------------------------------------


def test_one_key_may_ask_for_so_much_at_once() -> None:
    with Served(keys=(KEY, OTHER), max_per_key=2) as served:
        streams = [served.connect() for _ in range(2)]
        for sock in streams:
            sock.sendall(request("GET", "/stream", b"", bearer(KEY)))
        served.eventually(lambda: served.guard.num_generating == 2)
        response = served.send(
            request("POST", "/v1/completions", b"{}", "Connection: close", bearer(KEY))
        )
        assert header(response, "retry-after") == "1"
        status, error = error_of(response)
        assert (status, error["type"]) == (429, "rate_limit_error")
        assert served.ask("POST", "/v1/completions", b"{}", bearer(OTHER))[0] == 200
        assert served.ask("GET", "/v1/models", b"", bearer(KEY))[0] == 200
        for sock in streams:
            sock.close()
        served.eventually(lambda: served.guard.num_generating == 0)
        assert served.ask("POST", "/v1/completions", b"{}", bearer(KEY))[0] == 200
        assert not served.guard._of_key


def test_the_server_takes_so_much_at_once() -> None:
    with Served(replace(QUICK, requests=2), keys=(KEY,)) as served:
        streams = [served.connect() for _ in range(2)]
        for sock in streams:
            sock.sendall(request("GET", "/stream", b"", bearer(KEY)))
        served.eventually(lambda: served.guard.num_generating == 2)
        data = request("POST", "/v1/completions", b"{}", "Connection: close", bearer(KEY))
        response = served.send(data)
        assert header(response, "retry-after") == "1"
        assert error_of(response)[0] == 503
        assert served.ask("POST", "/v1/completions", b"{}")[0] == 401, "keys come first"
        assert served.ask("GET", "/ready")[0] == 200
        for sock in streams:
            sock.close()


# -- answers ---------------------------------------------------------------------------------------


def test_every_answer_says_how_it_may_be_used(keyed: Served) -> None:
    for path, key in (("/health", "wrong"), ("/v1/models", "wrong"), ("/v1/models", KEY)):
        response = keyed.send(
            request("GET", path, b"", "Connection: close", bearer(key), "Origin: http://evil")
        )
        assert header(response, "x-content-type-options") == "nosniff"
        assert header(response, "cache-control") == "no-store"
        assert b"access-control" not in response.lower()


@pytest.mark.parametrize("name", ["a", "req 1/2:3", "~" * 128])
def test_a_request_keeps_its_client_s_name(keyed: Served, name: str) -> None:
    for path in ("/health", "/v1/models"):
        response = keyed.send(
            request("GET", path, b"", "Connection: close", f"X-Request-Id: {name}")
        )
        assert header(response, "x-request-id") == name


@pytest.mark.parametrize("headers", [(), ("~" * 129,), ("",), ("\xe4",), ("\x01",), ("a", "b\xff")])
def test_a_request_without_a_good_name_gets_one(keyed: Served, headers: tuple[str, ...]) -> None:
    lines = [f"X-Request-Id: {name}" for name in headers]
    name = header(
        keyed.send(request("GET", "/health", b"", "Connection: close", *lines)), "x-request-id"
    )
    assert name is not None
    assert len(name) == 32
    assert int(name, 16)


# -- what is counted -------------------------------------------------------------------------------


def test_each_error_is_counted_once() -> None:
    with Served(keys=(KEY,)) as served:
        for method, path, status in (
            ("GET", "/none", 404), ("DELETE", "/v1/models", 405), ("GET", "/boom", 500),
        ):  # fmt: skip
            assert served.ask(method, path, b"", bearer(KEY))[0] == status
        assert served.ask("GET", "/v1/models")[0] == 401
        assert served.ask("GET", "/health")[0] == 200
        assert served.errors == {404: 1, 405: 1, 500: 1, 401: 1}


@pytest.mark.parametrize("status", [408, 413])
def test_a_chunked_body_that_is_refused_is_counted_once(status: int) -> None:
    head = request("POST", "/v1/completions", b"", "Transfer-Encoding: chunked", bearer(KEY))
    with Served(keys=(KEY,)) as served:
        with served.connect() as sock:
            sock.sendall(head)
            served.eventually(lambda: served.guard.num_generating == 1)
            if status == 413:
                size = served.limits.body_bytes + 1
                sock.sendall(b"%x\r\n" % size + bytes(size) + b"\r\n")
            assert parsed(read_all(sock))[0] == status
        served.eventually(lambda: served.guard.num_generating == 0)
        assert served.errors == {status: 1}


def test_a_client_that_went_away_is_counted() -> None:
    with Served() as served:
        sock = served.connect()
        sock.sendall(request("GET", "/stream"))
        served.eventually(lambda: served.guard.num_generating == 1)
        sock.close()
        served.eventually(lambda: served.guard.num_generating == 0)
        assert served.errors == {499: 1}


# -- applications that do wrong, without sockets ---------------------------------------------------


def ask_app(app: Any, *, num_failed: int) -> tuple[list[Any], list[str]]:
    """Return what is sent for one request to `app` behind a guard, and whether it was cut."""
    sent: list[Any] = []
    cuts: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/x",
        "headers": [(b"host", b"localhost")],
        "state": {"cut_connection": lambda: cuts.append("cut")},
    }
    guard = Guard(app, Limits(), listens_on="127.0.0.1")
    asyncio.run(guard(scope, receive, send))
    assert guard.num_failed == num_failed
    return sent, cuts


START = {"type": "http.response.start", "status": 200, "headers": []}


def test_no_answer_at_all_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        return

    sent, cuts = ask_app(app, num_failed=1)
    assert sent[0]["status"] == 500
    assert cuts == []
    assert len(caplog.records) == 1


def test_half_an_answer_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    sent, cuts = ask_app(app, num_failed=1)
    assert [message["type"] for message in sent] == [START["type"], "http.response.body"]
    assert cuts == ["cut"]
    assert len(caplog.records) == 1


def test_a_framework_s_own_500_is_replaced_by_ours() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "status": 500})
        await send({"type": "http.response.body", "body": b"at /usr/lib/secret.py"})
        raise ValueError("secret")

    sent, cuts = ask_app(app, num_failed=1)
    assert [message["type"] for message in sent] == [START["type"], "http.response.body"]
    assert json.loads(sent[1]["body"])["error"]["type"] == "internal_error"
    assert b"secret" not in sent[1]["body"]
    assert cuts == []


def test_an_application_s_own_error_is_sent_as_it_is() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "status": 503})
        await send({"type": "http.response.body", "body": b"its own"})

    sent, _ = ask_app(app, num_failed=0)
    assert sent[0]["status"] == 503
    assert sent[1]["body"] == b"its own"


def test_an_error_because_the_client_left_is_none_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.disconnect"
        raise OSError("the client is gone")

    assert ask_app(app, num_failed=0) == ([], [])
    assert caplog.text == ""


def test_an_error_after_a_whole_answer_is_logged_and_cuts_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"whole"})
        raise ValueError("later")

    sent, cuts = ask_app(app, num_failed=1)
    assert len(sent) == 2
    assert cuts == []
    assert "later" in caplog.text


def test_an_application_may_say_that_its_answer_may_be_kept() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "headers": [(b"cache-control", b"max-age=60")]})
        await send({"type": "http.response.body", "body": b""})

    sent, _ = ask_app(app, num_failed=0)
    names = [value for name, value in sent[0]["headers"] if name == b"cache-control"]
    assert names == [b"max-age=60"]


def test_the_time_a_key_takes_does_not_depend_on_the_key() -> None:
    keys = Keys([f"sk-{number:04}" for number in range(200)])

    def seconds(key: bytes) -> float:
        samples = []
        for _ in range(30):
            start = time.perf_counter()
            keys.id_of(key)
            samples.append(time.perf_counter() - start)
        return min(samples)

    first, last, none = (seconds(key) for key in (b"sk-0000", b"sk-0199", b"sk-none"))
    # stopping at the first that fits would take a hundredth
    assert 0.5 < first / last < 2
    assert 0.5 < none / last < 2
