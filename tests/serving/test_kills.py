"""Ten kills of a server with 16 streams; benchmarks/serving/kills.py makes many more."""

from __future__ import annotations

import random
import signal

import pytest

from benchmarks.serving import kills

STOP, KILL = signal.SIGSTOP, signal.SIGKILL
TWO_RANKS = [
    ("rank 1", KILL),
    ("rank 0", KILL),
    ("rank 1", STOP),
    ("front end", KILL),
    ("front end", STOP),
    ("supervisor", STOP),
    ("supervisor", KILL),
]


@pytest.mark.parametrize(
    ("num_ranks", "cases"),
    [(2, TWO_RANKS), (1, [("rank 0", KILL), ("rank 0", STOP)]), (4, [("rank 3", KILL)])],
    ids=["2-ranks", "1-rank", "4-ranks"],
)
def test_no_token_is_lost_and_nothing_hangs(
    num_ranks: int, cases: list[tuple[str, signal.Signals]]
) -> None:
    found = kills.run(num_ranks, random.Random(num_ranks), cases)
    assert [(kill.victim, kill.faults) for kill in found] == [(victim, []) for victim, _ in cases]
