"""Raw sockets that misbehave: the short form of benchmarks/serving/sockets.py."""

from __future__ import annotations

import pytest

from benchmarks.serving import sockets
from benchmarks.serving.served import Served


def test_bad_clients_harm_nobody(idle_server: Served) -> None:
    # slow bodies are ended after half a minute: those are for the long form
    found = sockets.run(idle_server, sockets.Counts(slow_heads=60, slow_bodies=0, others=3), 40)
    # of so few samples the 99th percentile is the largest one
    assert [fault for fault in found.faults if "first token" not in fault] == []
    assert found.bad.ended["slow head: 408"] == 60
    assert found.bad.ended["endless body: 413"] == found.bad.ended["large head: 431"] == 3
    assert found.bad.ended["pipelined: all answers"] == 3


@pytest.mark.slow
def test_many_bad_clients_harm_nobody(idle_server: Served) -> None:
    found = sockets.run(idle_server, sockets.Counts(), 200)
    assert not found.faults
    assert found.bad.ended["slow body: 408"] == 50
