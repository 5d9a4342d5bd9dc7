"""Code of a server that fails: it ends the requests concerned, no others, and no process."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from benchmarks.serving.faults import Fault, Subject, plan, subject

# site, kind, calls before the one that fails
CASES = {
    "offloaded": (
        ("forward", "MemoryError", 5),
        ("hidden", "NaN", 4),
        ("experts", "ArithmeticError", 40),
        ("logits", "NaN", 3),
        ("logits", "AssertionError", 6),
        ("kv", "RuntimeError", 1),
        ("add", "KeyError", 2),
        ("read", "RuntimeError", 30),
        ("tokenise", "RuntimeError", 0),
        ("template", "MemoryError", 0),
        ("detokenise", "AssertionError", 30),
        ("answer", "KeyError", 1),
        ("event", "ValueError", 9),
        ("host-says", "garbage", 3),
        ("front-says", "garbage", 2),
    ),
    "2 ranks": (
        ("forward", "ValueError", 7),
        ("dispatch", "RuntimeError", 40),
        ("combine", "RuntimeError", 30),
        ("experts", "ValueError", 20),
        ("add", "RuntimeError", 0),
    ),
}


@pytest.fixture(scope="module")
def subjects() -> Iterator[dict[str, Subject]]:
    """The servers, each started when it is first used."""
    with subject("offloaded") as offloaded, subject("2 ranks") as ranks:
        yield {"offloaded": offloaded, "2 ranks": ranks}


@pytest.mark.parametrize(
    ("setup", "site", "kind", "skip"),
    [(setup, *case) for setup, cases in CASES.items() for case in cases],
)
def test_a_fault_ends_what_it_is_of_and_nothing_else(
    subjects: dict[str, Subject], setup: str, site: str, kind: str, skip: int
) -> None:
    outcome = subjects[setup].strike(Fault(setup, site, kind), skip)
    assert outcome.problems == [], outcome.line()


def test_a_request_that_every_step_fails_of_is_ended_and_no_other(
    subjects: dict[str, Subject],
) -> None:
    assert subjects["2 ranks"].poison() == []


def test_every_site_is_struck_in_the_long_run() -> None:
    for setup, cases in CASES.items():
        planned = {(fault.site, fault.kind) for fault in plan(setup, 100, random.Random(0))}
        assert planned.issuperset((site, kind) for site, kind, _ in cases)
