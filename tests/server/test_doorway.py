"""Accepting: /live is told whatever the loop does, and no client holds the door."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from moe_serve.server.doorway import Doorway, ensure_descriptors
from moe_serve.server.limits import Limits
from tests.served import QUICK, Served, error_of, header, parsed, read_all, request

LIVE = request("GET", "/live")


class Door:
    """A doorway whose sockets are kept, as if they were served."""

    def __init__(self, limits: Limits, listener: socket.socket) -> None:
        self.handed: list[socket.socket] = []
        self.alive = (True, "")
        self.address = listener.getsockname()
        self.doorway = Doorway(listener, limits, lambda: self.alive, self.handed.append)

    def connect(self, data: bytes = b"") -> socket.socket:
        sock = socket.create_connection(self.address, timeout=5)
        if data:
            sock.sendall(data)
        return sock

    def ask(self, data: bytes) -> bytes:
        with self.connect(data) as sock:
            return read_all(sock)

    def eventually(self, count: int) -> None:
        """Wait until that many were handed over."""
        end = time.monotonic() + 3
        while len(self.handed) < count:
            assert time.monotonic() < end
            time.sleep(0.002)


@contextlib.contextmanager
def door(limits: Limits = QUICK, listener: socket.socket | None = None) -> Iterator[Door]:
    with listener or socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        opened = Door(limits, listener)
        opened.doorway.start()
        try:
            yield opened
        finally:
            opened.doorway.stop()
            for sock in opened.handed:
                sock.close()


def test_live_is_answered_at_the_door() -> None:
    with door() as opened:
        response = opened.ask(LIVE)
        assert parsed(response) == (200, b'{"status":"live"}')
        assert header(response, "connection") == "close"
        opened.alive = (False, "the loop has not moved for 30 s")
        response = opened.ask(b"GET /live HTTP/1.0\r\n\r\n")
        status, error = error_of(response)
        assert (status, error["type"]) == (503, "service_unavailable")
        assert (error["code"], header(response, "retry-after")) == ("unhealthy", "5")
        assert error["message"] == "the loop has not moved for 30 s"
        assert opened.handed == []
        assert opened.doorway.counts["live"] == 2
        assert opened.doorway.counts["not_live"] == 1


def test_a_liveness_that_fails_is_not_alive() -> None:
    with door() as opened:
        opened.alive = (True,)  # type: ignore[assignment]
        assert parsed(opened.ask(LIVE))[0] == 503
        opened.alive = (True, "")
        assert parsed(opened.ask(LIVE))[0] == 200


@pytest.mark.parametrize(
    "data", [b"GET /liver HTTP/1.1\r\n", b"GET /live", b"POST /live HTTP/1.1\r\n", b"\x16\x03\x01"]
)
def test_all_else_is_handed_over_unread(data: bytes) -> None:
    with door() as opened, opened.connect(data):
        opened.eventually(1)
        assert opened.handed[0].gettimeout() == 0
        assert opened.handed[0].recv(100) == data
        assert opened.doorway.num_connections == 1
        opened.doorway.release()
        assert opened.doorway.num_connections == 0


def test_silent_connections_are_closed_and_hold_nobody() -> None:
    limits = replace(QUICK, header_s=0.4)
    with door(limits) as opened, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(opened.connect()) for _ in range(200)]
        start = time.monotonic()
        assert parsed(opened.ask(LIVE))[0] == 200
        assert time.monotonic() - start < 0.2
        for sock in silent:
            assert sock.recv(1) == b""
        assert 0.3 < time.monotonic() - start < 2
        assert opened.doorway.counts["silent"] == 200
        assert opened.doorway.num_connections == 0


def test_a_client_that_does_not_read_its_answer_holds_nobody() -> None:
    with door(replace(QUICK, spare_connections=4)) as opened, contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(opened.connect(LIVE))
        start = time.monotonic()
        assert parsed(opened.ask(LIVE))[0] == 200
        assert time.monotonic() - start < 0.2


def test_who_reads_its_answer_late_has_it_still() -> None:
    with door(replace(QUICK, spare_connections=1)) as opened, contextlib.ExitStack() as stack:
        free = threading.Event()
        opened.doorway._liveness = lambda: (free.wait(5), "")
        # while the thread is held up all of them arrive, and then push each other out
        late = [stack.enter_context(opened.connect(LIVE)) for _ in range(20)]
        time.sleep(0.05)
        free.set()
        time.sleep(0.1)
        for sock in late:
            # not read_all: a reset must not pass for an end
            received = b""
            while piece := sock.recv(2**16):
                received += piece
            assert parsed(received)[0] == 200


def test_connections_over_the_limit_are_told_so_at_the_door() -> None:
    with door(replace(QUICK, connections=8)) as opened, contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(opened.connect(b"GET / HTTP/1.1\r\n"))
        opened.eventually(8)
        response = opened.ask(request("GET", "/v1/models"))
        status, error = error_of(response)
        assert (status, error["type"]) == (503, "service_unavailable")
        assert header(response, "retry-after") == "1"
        assert parsed(opened.ask(b""))[0] == 503, "also for one that says nothing"
        assert parsed(opened.ask(LIVE))[0] == 200, "/live has room kept for it"
        assert len(opened.handed) == 8
        opened.doorway.release()
        with opened.connect(b"GET / HTTP/1.1\r\n"):
            opened.eventually(9)
        assert opened.doorway.counts["over"] == 2


def test_silent_connections_count_for_the_limit() -> None:
    limits = replace(QUICK, connections=4, header_s=5)
    with door(limits) as opened, contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(opened.connect())
        assert parsed(opened.ask(request("GET", "/v1/models")))[0] == 503


def test_a_flood_beyond_the_spare_ones_is_refused_at_once() -> None:
    limits = replace(QUICK, connections=1, spare_connections=4, header_s=5)
    with door(limits) as opened, contextlib.ExitStack() as stack:
        flood = [stack.enter_context(opened.connect()) for _ in range(100)]
        assert sum(b"503" in read_all(sock) for sock in flood[1:]) >= 90
        assert opened.doorway.num_connections == 1


def test_clients_that_go_before_they_say_anything_leave_nothing() -> None:
    with door() as opened:
        for is_reset in (False, True) * 10:
            sock = opened.connect()
            if is_reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        end = time.monotonic() + 2
        while opened.doorway.counts["gone"] < 20:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert opened.doorway.num_connections == 0
        assert parsed(opened.ask(LIVE))[0] == 200


class Exhausted(socket.socket):
    """A listener of a process that has no file descriptor left, for a while."""

    left = 3

    def accept(self) -> tuple[socket.socket, object]:
        if self.left:
            self.left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_a_process_without_free_descriptors_accepts_later() -> None:
    listener = Exhausted()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    with door(QUICK, listener) as opened:
        start = time.monotonic()
        assert parsed(opened.ask(LIVE))[0] == 200
        assert 0.3 < time.monotonic() - start < 2, "0.05 + 0.1 + 0.2 s"
        assert opened.doorway.counts["not_accepted"] == 3


def test_an_error_of_ours_does_not_close_the_door(caplog: pytest.LogCaptureFixture) -> None:
    with door() as opened:

        def fail(sock: socket.socket) -> None:
            raise ValueError("ours")

        opened.doorway._hand_over = fail
        assert opened.ask(b"GET / HTTP/1.1\r\n") == b""
        assert parsed(opened.ask(LIVE))[0] == 200
        assert opened.doorway.counts["failed"] == 1
        assert opened.doorway.num_connections == 0
    assert "it goes on" in caplog.text


def test_a_closed_loop_leaves_no_connection() -> None:
    with door() as opened:

        def closed(sock: socket.socket) -> None:
            raise RuntimeError("Event loop is closed")

        opened.doorway._hand_over = closed
        assert opened.ask(b"GET / HTTP/1.1\r\n") == b""
        assert opened.doorway.num_connections == 0


def test_it_stops_with_all_it_has() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        opened = Door(replace(QUICK, header_s=30), listener)
        opened.doorway.start()
        with opened.connect() as sock:
            while not opened.doorway.num_connections:
                time.sleep(0.002)
            opened.doorway.stop()
            assert sock.recv(1) == b""
        Door(QUICK, listener).doorway.stop()  # one that never began
    assert not any(thread.name == "doorway" for thread in threading.enumerate())


def test_it_stops_when_its_thread_was_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    with door() as opened:
        opened.doorway._is_stopping = True
        opened.connect().close()
        opened.doorway._thread.join(5)
        # as it was seen a moment before
        monkeypatch.setattr(opened.doorway._thread, "is_alive", lambda: True)


def test_descriptors_for_all_connections_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: asked.append(limit))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert ensure_descriptors(Limits(connections=1024, spare_connections=64))
    assert not ensure_descriptors(Limits(connections=2**16))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    assert ensure_descriptors(Limits(connections=1024, spare_connections=64))
    assert asked == [(1024 + 128 + 256, 4096), (4096, 4096)]
    assert "ulimit" in caplog.text


def test_live_is_told_while_the_event_loop_is_blocked() -> None:
    with Served() as served:
        with served.connect() as blocked:
            blocked.sendall(request("GET", "/block?s=2"))
            served.eventually(lambda: "/block" in served.events)
            times_s = []
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                start = time.monotonic()
                assert parsed(served.send(LIVE))[0] == 200
                times_s.append(time.monotonic() - start)
                time.sleep(0.005)
            assert len(times_s) >= 50
            assert sorted(times_s)[int(len(times_s) * 0.99)] < 0.1
            # what was handed over meanwhile is served when the loop is free
            assert served.ask("GET", "/v1/models")[0] == 200
        assert served.doorway.counts["live"] == len(times_s)
