"""Clients that go away: the short form of benchmarks/serving/disconnects.py."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from benchmarks.serving import disconnects
from benchmarks.serving.served import Served, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(*disconnects.FLAGS) as found:
        yield found


def test_nothing_is_left_of_clients_that_go_away(server: Served) -> None:
    found = disconnects.run(server, 40, 3, random.Random(11))
    assert not found.faults
    assert sum(found.visits.values()) == 41
    ways = {kind.split(", ", 1)[1] for kind in found.visits}
    assert ways == {f"{moment}, {how}" for moment in disconnects.MOMENTS for how in ("fin", "rst")}
