"""Clients that read slowly: the short form of benchmarks/serving/slow_readers.py."""

from __future__ import annotations

import random

import pytest

from benchmarks.serving import slow_readers
from benchmarks.serving.served import Served


def test_slow_readers_cost_others_nothing(idle_server: Served) -> None:
    found = slow_readers.run(idle_server, 1, 100, random.Random(1))
    # of one round on a busy machine a percentile says little; that it is taken at all is tested
    assert [fault for fault in found.faults if "time between" not in fault] == []
    assert found.ratios[0] < 10


@pytest.mark.slow
def test_who_reads_nothing_is_cut(idle_server: Served) -> None:
    assert not slow_readers.run(idle_server, 5, 300, random.Random(1), has_cut=True).faults
