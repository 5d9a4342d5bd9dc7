"""Requests of all kinds on one server: the short form of benchmarks/serving/soak.py."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from benchmarks.serving import soak
from benchmarks.serving.served import Served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with soak.soaked() as found:
        yield found


def test_nothing_grows_with_requests(server: Served) -> None:
    found = soak.run(server, 300, random.Random(2), soak.Mix(), num_samples=5, num_fills=1)
    assert not found.faults
    assert sum(found.ended.values()) == 300
    assert {"whole", "bad", "left, fin", "left, rst"} <= set(found.ended)
    assert len(found.steady) == 5
