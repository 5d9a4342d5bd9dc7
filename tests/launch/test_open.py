"""At which address rank 0 waits for the others."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from moe_serve.launch.environment import RankEnvironment
from moe_serve.launch.open import _bound


def bound_to(host: str, local_world_size: int = 2) -> str:
    environment = RankEnvironment(
        rank=0,
        world_size=2,
        local_rank=0,
        local_world_size=local_world_size,
        master_host=host,
        master_port=1,
        has_store=True,
        generation=0,
    )
    with _bound(environment) as listener:
        address: str = listener.getsockname()[0]
        return address


@pytest.mark.parametrize("num_here", [1, 2])
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_the_loopback_is_for_this_machine_alone(host: str, num_here: int) -> None:
    assert bound_to(host, num_here) == host
    assert bound_to("localhost", num_here) in ("127.0.0.1", "::1")


def test_an_address_of_somebody_else_s_is_waited_for_everywhere() -> None:
    assert bound_to("192.0.2.1") == "0.0.0.0"
    assert bound_to("no-such-host.invalid") == "0.0.0.0"


def test_a_name_may_mean_the_loopback_here_and_this_machine_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(host: str, port: int, **options: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    assert bound_to("this-machine", local_world_size=2) == "127.0.1.1"
    assert bound_to("this-machine", local_world_size=1) == "0.0.0.0"
