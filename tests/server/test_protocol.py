"""What clients do to connections, on real sockets: each ends in time, and others do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import MoeServeError
from moe_serve.server.limits import Limits
from moe_serve.server.serving import serving
from tests.served import (
    QUICK,
    Served,
    error_of,
    header,
    parsed,
    read_all,
    read_response,
    request,
)

POST = "/v1/completions"
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def served() -> Iterator[Served]:
    with Served() as running:
        yield running


@contextlib.contextmanager
def honest(served: Served) -> Iterator[list[float]]:
    """Ask beside what is done in the block; all must be answered. Yields seconds of each."""
    times_s: list[float] = []
    failures: list[Any] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            start = time.monotonic()
            answer = served.ask("POST", POST, b"{}")
            times_s.append(time.monotonic() - start)
            if answer != (200, b'{"bytes":2}'):
                failures.append(answer)
            time.sleep(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield times_s
    finally:
        is_over.set()
        thread.join()
    assert times_s
    assert not failures
    assert sorted(times_s)[int(len(times_s) * 0.95)] < 0.25


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# -- honest clients --------------------------------------------------------------------------------


def test_a_connection_serves_one_request_after_the_other(served: Served) -> None:
    with served.connect() as sock:
        for size in (0, 1, 1000, 2**20):
            sock.sendall(request("POST", POST, bytes(size)))
            assert read_response(sock) == (
                200,
                json.dumps({"bytes": size}).replace(" ", "").encode(),
            )
        assert served.doorway.num_connections == 1
    served.eventually(lambda: served.doorway.num_connections == 0)


def test_responses_have_a_date_and_no_server(served: Served) -> None:
    response = served.send(request("GET", "/v1/models", b"", "Connection: close"))
    assert (header(response, "date") or "").endswith("GMT")
    assert header(response, "server") is None


@pytest.mark.parametrize("piece_bytes", [1, 7, 100])
def test_a_request_may_come_in_pieces(served: Served, piece_bytes: int) -> None:
    data = request("POST", POST, b"x" * 50, "Connection: close")
    with served.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), piece_bytes):
            sock.sendall(data[start : start + piece_bytes])
            time.sleep(0.0005)
        assert parsed(read_all(sock)) == (200, b'{"bytes":50}')


def test_a_chunked_body_is_read(served: Served) -> None:
    body = b"".join(b"%x\r\n%s\r\n" % (size, bytes(size)) for size in (1, 63, 64, 70000, 5))
    data = (HEAD + "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n").encode() + body
    assert parsed(served.send(data + b"0\r\n\r\n")) == (200, b'{"bytes":70133}')


def test_http_1_0_is_answered_and_closed(served: Served) -> None:
    status, body = parsed(served.send(b"GET /v1/models HTTP/1.0\r\nHost: localhost\r\n\r\n"))
    assert (status, json.loads(body)["path"]) == (200, "/v1/models")


def test_a_head_request_gets_the_headers_alone(served: Served) -> None:
    with served.connect() as sock:
        sock.sendall(request("HEAD", "/v1/models") + request("POST", POST, b"abc"))
        time.sleep(0.1)
        head, _, rest = sock.recv(2**16).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert rest.startswith(b"HTTP/1.1 200 ")
        assert rest.endswith(b'\r\n\r\n{"bytes":3}')


def test_headers_are_there_before_the_first_of_the_body(served: Served) -> None:
    with served.connect() as sock:
        sock.sendall(request("GET", "/slow-start"))
        received = b""
        while b"\r\n\r\n" not in received:
            received += sock.recv(2**16)
        assert "/slow-start begins" in served.events
        assert "/slow-start ends" not in served.events
        served.gate.set()
        assert read_all(sock).endswith(b"0\r\n\r\n")


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    sizes = range(1, 41)
    with served.connect() as sock:
        sock.sendall(b"".join(request("POST", POST, bytes(size)) for size in sizes))
        assert [read_response(sock)[1] for _ in sizes] == [b'{"bytes":%d}' % size for size in sizes]


def test_pipelined_requests_wait_while_one_runs(served: Served) -> None:
    with served.connect() as sock:
        sock.sendall(request("GET", "/wait") + request("GET", "/v1/models") * 3)
        time.sleep(2.5 * QUICK.header_s)
        assert served.events == ["/wait begins"]
        served.gate.set()
        assert [read_response(sock)[0] for _ in range(4)] == [200] * 4


def test_a_client_may_wait_for_100_continue(served: Served) -> None:
    with served.connect() as sock:
        sock.sendall((HEAD + "Expect: 100-continue\r\nContent-Length: 3\r\n\r\n").encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"abc")
        assert read_response(sock) == (200, b'{"bytes":3}')


def test_a_response_before_the_body_leaves_the_connection(served: Served) -> None:
    with served.connect() as sock:
        sock.sendall(b"POST /unread HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000\r\n\r\n")
        assert read_response(sock) == (200, b"early")
        sock.sendall(bytes(300000) + request("GET", "/v1/models"))
        assert read_response(sock)[0] == 200


def test_an_offer_of_http_2_is_ignored(served: Served) -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQ")
    with served.connect() as sock:
        sock.sendall(request("POST", POST, b"abc", *offer))
        assert read_response(sock) == (200, b'{"bytes":3}')


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\0\0\0\0",
        b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: local\0host\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nno header\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/3.0\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.2\r\nHost: localhost\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET\t/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\r\n\r\nGET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"just some words\r\n\r\n",
        (HEAD + "Content-Length: -1\r\n\r\n").encode(),
        (HEAD + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n").encode(),
        (HEAD + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n").encode(),
        (HEAD + "Transfer-Encoding: gzip\r\n\r\n").encode(),
        (HEAD + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n").encode(),
        b"POST / HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)
def test_what_is_no_request_of_ours_gets_a_400(served: Served, data: bytes) -> None:
    start = time.monotonic()
    response = served.send(data)
    status, error = error_of(response)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert header(response, "connection") == "close"
    assert time.monotonic() - start < QUICK.linger_s + 0.5
    assert served.events == []
    assert served.server.refused == {400: 1}
    assert served.ask("GET", "/health")[0] == 200


def test_slow_headers_from_200_clients_end_in_time() -> None:
    limits = replace(QUICK, header_s=1.2)  # long enough for a busy machine to send slowly
    with Served(limits) as served, honest(served), contextlib.ExitStack() as stack:
        slow = [stack.enter_context(served.connect()) for _ in range(200)]
        start = time.monotonic()
        for sock in slow:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        for turn in range(3):
            time.sleep(limits.header_s / 4)
            for sock in slow:
                sock.sendall(b"X-A%d: 1\r\n" % turn)
        for sock in slow:
            status, error = error_of(read_all(sock))
            assert status == 408
            assert "headers" in error["message"]
        assert time.monotonic() - start < limits.header_s + limits.linger_s + 1
        assert served.server.refused[408] == 200


def test_a_later_request_has_as_long_for_its_headers_as_the_first() -> None:
    limits = replace(QUICK, header_s=0.8, idle_s=0.2)
    with Served(limits) as served, served.connect() as sock:
        for _ in range(2):
            sock.sendall(b"GET /health HTTP/1.1\r\n")
            time.sleep(0.5)
            sock.sendall(b"Host: localhost\r\n\r\n")
            assert read_response(sock)[0] == 200
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        assert error_of(read_all(sock))[0] == 408


def test_too_many_or_too_large_headers_get_a_431(served: Served) -> None:
    limits = served.limits
    many = [f"X-{number}: 1" for number in range(limits.header_count - 2)]
    assert served.ask("GET", "/health", b"", *many)[0] == 200, "as many as may be"
    for headers in (
        [*many, "X-More: 1"],
        [f"X-{number}: 1" for number in range(10_000)],
        ["X: " + "a" * limits.header_bytes],
    ):
        assert (
            error_of(served.send(request("GET", "/", b"", "Connection: close", *headers)))[0] == 431
        )
    path = "/" + "a" * limits.header_bytes
    assert error_of(served.send(request("GET", path)))[0] == 431
    # also one that never ends, and of a request behind another
    with served.connect() as sock, contextlib.suppress(ConnectionError):
        sock.sendall(request("GET", "/health"))
        assert read_response(sock)[0] == 200
        sock.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(limits.header_count + 10):
            sock.sendall(b"A: 1\r\n")
        assert error_of(read_all(sock))[0] == 431
    pipelined = request("GET", "/health") + b"GET / HTTP/1.1\r\n" + b"A:\r\n" * 50_000
    assert b"HTTP/1.1 431 " in served.send(pipelined)


def test_many_lines_are_refused_before_they_are_taken_apart(served: Served) -> None:
    data = b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 10_000
    with honest(served):
        used = time.process_time()
        for _ in range(30):
            assert error_of(served.send(data))[0] == 431
        # taken apart, they would take some 30 ms each
        assert time.process_time() - used < 1.0


# -- bodies ----------------------------------------------------------------------------------------


def test_a_slow_body_ends_in_time(served: Served) -> None:
    with honest(served), contextlib.ExitStack() as stack:
        slow = [stack.enter_context(served.connect()) for _ in range(50)]
        start = time.monotonic()
        for sock in slow:
            sock.sendall((HEAD + "Content-Length: 100\r\n\r\n").encode())
        for _ in range(3):
            time.sleep(QUICK.body_s / 4)
            for sock in slow:
                sock.sendall(b"x")
        for sock in slow:
            status, error = error_of(read_all(sock))
            assert status == 408
            assert "body" in error["message"]
        assert time.monotonic() - start > QUICK.body_s
        assert time.monotonic() - start < QUICK.body_s + QUICK.linger_s + 1
    assert not any(event.endswith(" 100") for event in served.events)
    assert served.guard.num_failed == 0


def test_a_content_length_beyond_the_limit_gets_a_413_at_once(served: Served) -> None:
    for length in (2**20 + 1, 2**62):
        data = HEAD + f"Expect: 100-continue\r\nContent-Length: {length}\r\n\r\n"
        status, error = error_of(served.send(data.encode()))
        assert (status, error["code"]) == (413, "body_too_large")
    assert served.events == []


def test_who_sends_a_whole_body_over_the_limit_can_read_why(served: Served) -> None:
    data = request("POST", POST, bytes(3 * 2**20))
    with served.connect() as sock:
        for start in range(0, len(data), 2**19):
            # a connection that was reset meanwhile would raise here
            sock.sendall(data[start : start + 2**19])
            time.sleep(0.02)
        assert error_of(read_all(sock))[0] == 413


def test_an_endless_chunked_body_is_not_read_nor_kept(served: Served) -> None:
    chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
    before = rss_bytes()
    with honest(served), served.connect() as sock:
        sock.sendall((HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode())
        num_sent = most = 0
        with contextlib.suppress(ConnectionError, TimeoutError):
            for _ in range(2**14):  # 1 GB
                sock.sendall(chunk)
                num_sent += len(chunk)
                most = max(most, rss_bytes())
        # what it drops while it lingers, and what kernels hold
        assert num_sent < 6 * QUICK.body_bytes + 12 * 2**20
        assert most - before < 50 * 2**20
    served.eventually(lambda: served.server.refused[413] == 1)
    assert "/v1/completions 1048576" not in served.events


def test_a_chunked_body_just_over_the_limit_gets_a_413(served: Served) -> None:
    data = (HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode()
    data += b"100000\r\n" + bytes(2**20) + b"\r\n1\r\nx\r\n0\r\n\r\n"
    status, error = error_of(served.send(data))
    assert (status, error["code"]) == (413, "body_too_large")


def test_a_body_of_too_many_small_chunks_is_refused(served: Served) -> None:
    start = (HEAD + "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n").encode()
    fits = start + b"1\r\nx\r\n" * QUICK.small_chunks + b"0\r\n\r\n"
    assert parsed(served.send(fits)) == (200, b'{"bytes":%d}' % QUICK.small_chunks)
    with honest(served):
        used = time.process_time()
        for _ in range(10):
            assert error_of(served.send(start + b"1\r\nx\r\n" * 40_000))[0] == 400
        assert time.process_time() - used < 1.5


def test_a_content_length_that_lies_is_found_out(served: Served) -> None:
    # less comes than was said: the rest is waited for, then the client goes
    with served.connect() as sock:
        sock.sendall((HEAD + "Content-Length: 10\r\n\r\nabc").encode())
        assert error_of(read_all(sock))[0] == 408
    with served.connect() as sock:
        sock.sendall((HEAD + "Content-Length: 10\r\n\r\nabc").encode())
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b""
    # more comes than was said: it is the next request, and is none
    response = served.send((HEAD + "Content-Length: 2\r\n\r\nabcdef").encode() + b"\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 ([0-9]{3})", response) == [b"200", b"400"]
    assert served.guard.num_failed == 0


# -- connections that wait, end and go -------------------------------------------------------------


def test_idle_connections_are_closed(served: Served) -> None:
    with served.connect() as sock:
        sock.sendall(request("GET", "/health"))
        read_response(sock)
        start = time.monotonic()
        assert sock.recv(1) == b""
        assert 0.8 * QUICK.idle_s < time.monotonic() - start < QUICK.idle_s + 0.5
    assert served.server.refused == {}


def test_a_long_response_is_no_idle_connection(served: Served) -> None:
    with served.connect() as sock:
        sock.sendall(request("GET", "/stream"))
        end = time.monotonic() + 2 * max(QUICK.idle_s, QUICK.body_s, QUICK.write_s)
        while time.monotonic() < end:
            assert sock.recv(2**16)


@pytest.mark.parametrize("how", ["close", "half", "reset"])
@pytest.mark.parametrize("path", ["/stream", "/wait", "/flood"])
def test_a_client_that_goes_ends_its_request(served: Served, path: str, how: str) -> None:
    with honest(served), served.connect() as sock:
        sock.sendall(request("GET", path))
        served.eventually(lambda: f"{path} begins" in served.events)
        if how == "half":
            # nobody can tell it from a close; who closes half still gets what was sent before
            sock.shutdown(socket.SHUT_WR)
        elif how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how != "half":
            sock.close()
        last = f"{path} ends" if path != "/wait" else "/wait disconnected"
        served.eventually(lambda: last in served.events, within_s=1.5)
    served.eventually(lambda: served.doorway.num_connections == 0)
    assert served.guard.num_generating == 0
    assert served.guard.num_failed == 0


def test_clients_that_read_nothing_are_cut(served: Served) -> None:
    with honest(served), contextlib.ExitStack() as stack:
        deaf = [stack.enter_context(served.connect(receive_buffer=4096)) for _ in range(20)]
        start = time.monotonic()
        for sock in deaf:
            sock.sendall(request("GET", "/flood"))
        served.eventually(lambda: served.events.count("/flood ends") == 20)
        assert time.monotonic() - start > QUICK.write_s
    served.eventually(lambda: served.doorway.num_connections == 0)


def test_a_client_that_reads_slowly_is_not_cut(served: Served) -> None:
    with served.connect(receive_buffer=4096) as sock:
        sock.sendall(request("GET", "/flood"))
        end = time.monotonic() + 2.5 * QUICK.write_s
        while time.monotonic() < end:
            # enough for its kernel to tell ours of the room
            assert sock.recv(2**15)
            time.sleep(0.02)
        assert "/flood ends" not in served.events


def test_the_kernel_holds_little_for_who_reads_nothing() -> None:
    limits = replace(QUICK, write_s=5)
    with Served(limits) as served, served.connect(receive_buffer=4096) as sock:
        sock.sendall(request("GET", "/flood"))
        served.eventually(lambda: "/flood begins" in served.events)
        time.sleep(0.3)
        served.gate.set()
        # twice what was asked for is what Linux gives, and asyncio holds as much as one piece
        most = 2 * limits.send_buffer_bytes + 3 * 2**16 + 2**16
        assert 2**16 < len(read_all(sock)) < most


def test_an_error_before_the_response_is_a_500(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    response = served.send(request("GET", "/boom", b"", "X-Request-Id: mine", "Cookie: my secret"))
    status, error = error_of(response)
    assert (status, error["type"]) == (500, "internal_error")
    assert "secret" not in error["message"]
    assert "mine" in error["message"]
    records = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(records) == 1, "logged once"
    assert "my secret" not in caplog.text
    assert "mine" in caplog.text


def test_an_error_within_a_response_cuts_the_connection(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    response = served.send(request("GET", "/late-boom"))
    assert not response.endswith(b"0\r\n\r\n"), "it must not look whole"
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    assert served.ask("GET", "/health")[0] == 200


# -- the end ---------------------------------------------------------------------------------------


def test_an_end_lets_responses_end_and_closes_the_rest(served: Served) -> None:
    with served.connect() as idle, served.connect() as running, served.connect() as streaming:
        idle.sendall(request("GET", "/health"))
        read_response(idle)
        running.sendall(request("GET", "/wait"))
        streaming.sendall(request("GET", "/stream"))
        served.eventually(lambda: {"/wait begins", "/stream begins"} <= set(served.events))
        stopping = threading.Thread(target=served.stop, args=(5,))
        start = time.monotonic()
        stopping.start()
        assert idle.recv(1) == b""
        assert time.monotonic() - start < 0.2
        served.gate.set()
        response = read_all(running)
        assert response.endswith(b"waited")
        assert header(response, "connection") == "close"
        assert read_all(streaming).endswith(b"0\r\n\r\n")
        stopping.join()
        assert time.monotonic() - start < 2


def test_an_end_cuts_what_does_not_end(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with served.connect() as sock:
        sock.sendall(request("GET", "/stream"))
        served.eventually(lambda: "/stream begins" in served.events)
        start = time.monotonic()
        served.stop(0.2)
        assert 0.15 < time.monotonic() - start < 1
        assert not read_all(sock).endswith(b"0\r\n\r\n")
    assert "/stream ends" in served.events
    assert caplog.text == ""


def test_an_application_is_told_of_start_and_end() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        while True:
            kind = (await receive())["type"]
            seen.append(kind)
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def run() -> None:
        server = await serving(app, Limits(), lambda: None, has_lifespan=True)
        await server.stop(0)

    asyncio.run(run())
    assert seen == ["lifespan.startup", "lifespan.shutdown"]


def test_an_application_that_does_not_start_is_an_error() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("no")

    with pytest.raises(MoeServeError, match="failed to start"):
        asyncio.run(serving(app, Limits(), lambda: None, has_lifespan=True))


def test_a_request_that_outlives_its_connection_is_ended() -> None:
    ended: list[str] = []
    gone: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("ended")

    async def run() -> None:
        server = await serving(app, QUICK, lambda: gone.append("gone"))
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(request("GET", "/"))
            ours.setblocking(False)
            await server.connect(ours)
            await asyncio.sleep(0.05)
            await server.stop(0)
        assert (ended, gone) == (["ended"], ["gone"])

    start = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - start < 3


def test_a_connection_that_never_came_to_be_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []

    async def fail(*_: Any) -> None:
        raise OSError("no such connection")

    async def run() -> None:
        server = await serving(fail, QUICK, lambda: gone.append("gone"))
        monkeypatch.setattr(asyncio.get_running_loop(), "connect_accepted_socket", fail)
        ours, theirs = socket.socketpair()
        with theirs:
            await server.connect(ours)
            assert ours.fileno() == -1
        await server.stop(0)

    asyncio.run(run())
    assert gone == ["gone"]
