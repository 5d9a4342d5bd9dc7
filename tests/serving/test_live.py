"""GET /live beside long prompts: the short form of benchmarks/serving/live.py."""

from __future__ import annotations

import random

from benchmarks.serving import live
from benchmarks.serving.served import Served


def test_live_answers_while_long_prompts_are_tokenised(idle_server: Served) -> None:
    found = live.run(idle_server, 60, random.Random(1))
    assert not found.faults
    assert found.statuses[400] >= live.NUM_PROMPTS
