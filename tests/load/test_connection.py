"""Connections: kept, closed by the other side, refused."""

from __future__ import annotations

import asyncio
import socket

import pytest

from moe_serve.errors import ConfigError
from moe_serve.load.connection import Address, BadAnswer, ConnectionFailed, ConnectionPool
from tests.load.scripted_server import Call, Script, ScriptedServer, answer, serving


class Kept:
    def __init__(self) -> None:
        self.status = 0
        self.data = b""

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.status = status

    def body(self, data: bytes) -> None:
        self.data += data


def pool_of(server: ScriptedServer) -> ConnectionPool:
    return ConnectionPool(Address.parse(server.url + "/v1"), {"authorization": "Bearer k"})


async def post(pool: ConnectionPool, body: bytes = b"{}") -> Kept:
    kept = Kept()
    async with asyncio.timeout(20):
        await pool.exchange(pool.request("POST", "/v1/x", body), kept)
    return kept


async def say_ok(call: Call) -> None:
    await call.write(answer(200, call.number))


def test_a_connection_serves_request_after_request() -> None:
    async def case() -> None:
        async with serving(say_ok) as server:
            pool = pool_of(server)
            assert [(await post(pool)).data for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
            assert server.num_connections == pool.num_connections == 1
            both = await asyncio.gather(post(pool), post(pool))
            assert {kept.status for kept in both} == {200}
            assert pool.num_connections == 2
            assert server.calls[0].path == "/v1/x"
            assert server.calls[0].headers["authorization"] == "Bearer k"
            assert server.calls[0].headers["host"] == f"127.0.0.1:{server.port}"
            await pool.close()

    asyncio.run(case())


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_kept_connection_that_the_server_closed_is_replaced(is_seen: bool) -> None:
    async def once(call: Call) -> None:
        if is_seen or call.number != 1:
            await call.write(answer(200, call.number))
        if call.number in (0, 1):
            if not is_seen and call.number == 0:
                return
            call.writer.close()  # number 1 unseen: after it was sent, before any byte came

    async def case() -> None:
        async with serving(once) as server:
            pool = pool_of(server)
            assert (await post(pool)).data == b"0"
            if is_seen:
                await asyncio.sleep(0.05)
            assert (await post(pool)).data == (b"1" if is_seen else b"2")
            assert pool.num_connections == 2
            assert pool.num_resent == (0 if is_seen else 1)
            await pool.close()

    asyncio.run(case())


async def drop(call: Call) -> None:
    call.writer.close()


async def drop_inside(call: Call) -> None:
    await call.write(answer(200, "something long")[:-5])
    call.writer.close()


async def garbage(call: Call) -> None:
    await call.write(b"oops, no HTTP at all\r\n\r\n")


@pytest.mark.parametrize(
    ("script", "error", "says"),
    [
        (drop, ConnectionFailed, "lost before the answer"),
        (drop_inside, ConnectionFailed, "lost in the middle of the answer"),
        (garbage, BadAnswer, "not HTTP/1"),
    ],
)
def test_an_answer_that_does_not_come(script: Script, error: type[Exception], says: str) -> None:
    async def case() -> None:
        async with serving(script) as server:
            pool = pool_of(server)
            with pytest.raises(error, match=says):
                await post(pool)
            assert len(server.calls) == 1  # a first request is not sent twice

    asyncio.run(case())


def test_a_request_that_is_cancelled_closes_its_connection() -> None:
    async def slow_at_first(call: Call) -> None:
        if call.number == 0:
            await asyncio.sleep(60)
        await call.write(answer(200, call.number))

    async def case() -> None:
        async with serving(slow_at_first) as server:
            pool = pool_of(server)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await pool.exchange(pool.request("POST", "/", b"{}"), Kept())
            assert (await post(pool)).data == b"1"
            assert pool.num_connections == 2
            await pool.close()

    asyncio.run(case())


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]

    async def case() -> None:
        for host, says in (("127.0.0.1", "connection refused"), ("no-host.invalid", "not known")):
            pool = ConnectionPool(Address.parse(f"http://{host}:{port}"), {})
            with pytest.raises(ConnectionFailed, match=says):
                await post(pool)

    asyncio.run(case())


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h:1", Address("h", 1, False, "")),
        ("https://h/", Address("h", 443, True, "")),
        ("http://[::1]:9/v1/", Address("::1", 9, False, "")),
        ("http://h/api/v1", Address("h", 80, False, "/api")),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert Address.parse(url) == address


def test_names_of_hosts() -> None:
    assert Address("::1", 9, False, "").name == "[::1]:9"
    assert Address("h", 443, True, "/api").url == "https://h/api"


@pytest.mark.parametrize(
    "url", ["h:1", "ftp://h", "http://", "http://h:x", "http://u:p@h", "http://h?q=1", "http://h /"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--base-url"):
        Address.parse(url)


def test_a_key_cannot_add_headers() -> None:
    with pytest.raises(ConfigError, match="value of authorization") as caught:
        ConnectionPool(Address("h", 1, False, ""), {"authorization": "Bearer a\r\nx: y"})
    assert "Bearer" not in str(caught.value)
