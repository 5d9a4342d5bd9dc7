"""What is made from the API's document is sent to a real server, from another process, for a while.

tests/server has the same and the curated bodies without sockets; benchmarks/serving/bad_inputs.py
sends 20,000 of all.
"""

from __future__ import annotations

from benchmarks.serving import bad_inputs
from benchmarks.serving.served import Served


def test_whatever_is_sent_is_answered_and_an_honest_client_sees_nothing_of_it(
    idle_server: Served,
) -> None:
    found = bad_inputs.run(idle_server, 120, num_workers=1, has_curated=False)
    assert found.faults == []
    assert found.num_honest > 0
    rows = {row.name: row.value for row in bad_inputs.rows_of(found)}
    assert rows["tries"] >= 120
    assert rows["answers: 200"] > 20
    assert rows["answers: 400"] > 20


def test_a_fault_is_seen() -> None:
    tries = bad_inputs.Tries()
    tries.note("a", 200, None, 10, b"x" * 10_000, 1.0)
    tries.note("a", 503, "1", 10, b"", 1.0)
    tries.note("a", 400, None, 10_000, b"x" * 14_000, 1.0)
    assert tries.faults == []
    tries.note("a", 503, None, 10, b"", 1.0)
    tries.note("b", 500, None, 10, b"", 1.0)
    tries.note("c", 400, None, 10, b"x" * 4107, 1.0)
    tries.note("d", 0, None, 10, b"reset", 1.0)
    tries.note("e", 200, None, 10, b"", 61.0)
    assert [fault[0] for fault in tries.faults] == ["a", "b", "c", "d", "e"]
