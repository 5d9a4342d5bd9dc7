"""GET /live beside long prompts: the short form of benchmarks/serving/live.py."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from benchmarks.serving import live
from benchmarks.serving.served import Served, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(*live.FLAGS) as found:
        yield found


def test_live_answers_while_long_prompts_are_tokenised(server: Served) -> None:
    found = live.run(server, 60, random.Random(1))
    assert not found.faults
    assert found.statuses[400] >= live.NUM_PROMPTS
