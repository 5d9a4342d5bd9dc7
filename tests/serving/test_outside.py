"""What a server shows of itself: where it listens, whom it calls, and what it writes to its log."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from typing import Any

import pytest

from benchmarks.serving.served import Served, served
from moe_serve.server import front_end
from tests.server.fronts import DEMO

PROMPT, KEY = "marker-of-a-prompt", "sk-marker-of-a-key"
TITLE = "\x1b]0;title\x07"


def send(server: Served, method: str, path: str, body: bytes, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Content-Length", str(len(body)))
        for name, value in headers.items():
            # as it stands: http.client refuses what is not to be sent
            connection._buffer.append(f"{name}: {value}".encode("latin-1"))  # type: ignore[attr-defined]
        connection.endheaders(body)
        return connection.getresponse().status
    except (http.client.HTTPException, OSError):
        return 0
    finally:
        connection.close()


def test_a_server_listens_on_the_loopback_alone_and_logs_nothing_of_its_clients() -> None:
    environment = {"MOE_SERVE_API_KEY": KEY}
    with served("--ep", "2", "--stats-interval", "1", environment=environment) as server:
        assert {"supervisor", "front end", "rank 0", "rank 1"} == set(server.processes())
        listeners = server.listeners()
        assert ("127.0.0.1", server.port) in listeners
        assert {address for address, _ in listeners} <= {"127.0.0.1", "::1"}
        good = {"Host": "localhost", "Content-Type": "application/json",
                "Authorization": f"Bearer {KEY}"}  # fmt: skip
        other = {**good, "Authorization": f"Bearer {KEY}x"}
        completion: dict[str, Any] = {"prompt": f"{PROMPT} {TITLE}", "max_tokens": 4}
        bodies: list[tuple[dict[str, Any], int]] = [
            (completion, 200),
            ({**completion, "stream": True, "stop": [PROMPT]}, 200),
            ({**completion, "user": f"{PROMPT}{TITLE}"}, 200),
            ({**completion, "model": f"{PROMPT}{TITLE}"}, 404),
            ({**completion, f"{PROMPT}{TITLE}": 1}, 400),
            ({**completion, "max_tokens": PROMPT}, 400),
            ({**completion, "request_id": f"{PROMPT}{TITLE}"}, 400),
            ({**completion, "structured_outputs": {"regex": f"({PROMPT}"}}, 400),
            ({"messages": [{"role": "user", "content": PROMPT}]}, 400),
        ]
        path = "/v1/completions"
        for body, status in bodies:
            assert send(server, "POST", path, json.dumps(body).encode(), good) == status, body
        data = json.dumps(completion).encode()
        assert send(server, "POST", path, data, other) == 401
        assert send(server, "POST", path, data[:-1], good) == 400
        ids = {**good, "X-Request-Id": f"{PROMPT}\x1b[31m\x07"}
        assert send(server, "POST", path, data, ids) in (200, 400)
        assert send(server, "POST", path, data, {**good, "X-Odd": f"{PROMPT}\x00{TITLE}"}) == 400
        assert send(server, "POST", path, data, {**good, "Host": f"{PROMPT}.example"}) == 400
        assert send(server, "GET", f"/{PROMPT}%1b%07?key={KEY}", b"", good) == 404
        time.sleep(1.2)  # a line of figures is due a second after the last one
        assert send(server, "POST", path, data, good) == 200
        time.sleep(0.5)
        assert server.stop() == 0
        log = "".join(server.read_log())
    assert "tok/s" in log, "no line of figures: this test would see no log at all"
    assert PROMPT not in log
    assert KEY not in log
    assert not [char for char in log if ord(char) < 32 and char != "\n"]
    assert not [char for char in log if ord(char) > 126]


def test_a_front_end_of_the_embedded_model_calls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []

    def refused(self: socket.socket, address: object) -> None:
        called.append(address)
        raise ConnectionRefusedError(address)

    def unknown(host: object, *rest: object, **named: object) -> None:
        called.append(host)
        raise socket.gaierror(host)

    for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket.socket, "connect_ex", refused)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    options = front_end.FrontOptions(
        model=str(DEMO), name="demo", version="0", tokenizer=None, chat_template=None, server={}
    )
    front_end.FrontEnd(options)
    assert called == []
    with pytest.raises(OSError, match="192"):
        socket.create_connection(("192.0.2.1", 80), 1)
    assert called == ["192.0.2.1"]
