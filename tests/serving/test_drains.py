"""Servers that are told to end: the short form of benchmarks/serving/drains.py."""

from __future__ import annotations

import random

import pytest

from benchmarks.serving import drains

QUICK = ("of-all", "cut", "twice", "loading")


@pytest.mark.parametrize("kind", QUICK)
def test_a_server_ends_as_it_was_told(kind: str) -> None:
    assert not drains.run(kind, random.Random(3)).faults


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(drains.KINDS) - set(QUICK)))
def test_a_server_ends_as_it_was_told_at_other_moments(kind: str) -> None:
    assert not drains.run(kind, random.Random(3)).faults
