"""A run on the virtual clock: its times by hand, its misses those of the replay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_serve.experts.policies import adaptive, lru
from moe_serve.experts.trace import Trace
from moe_serve.study.prediction import make_predictor
from moe_serve.study.replay import batched_steps, cache_shape, replay
from moe_serve.study.timeline import Machine, TimelineResult, VirtualLink, run_timeline
from tests.experts.routing import synthetic_trace

MACHINE = Machine(layer_s=1e-3, link_bytes_s=1e9, record_bytes=100_000)  # a load takes 0.1 ms


def run(trace: Trace, slots: int, batch: int = 1, **options: Any) -> TimelineResult:
    shape = cache_shape(trace, slots, "layer")
    given = {"machine": MACHINE, "policy": lru.build(shape), **options}
    return run_timeline(trace, batched_steps(trace, batch), shape, **given)


def test_where_all_stays_only_first_uses_are_waited_for() -> None:
    trace = synthetic_trace(num_seqs=2, seq_len=20)
    found = run(trace, slots=trace.num_experts)
    first_uses = sum(len(np.unique(trace.ids[:, layer])) for layer in range(trace.num_layers))

    assert found.counters["misses"] == found.counters["fetched"] == first_uses
    assert found.counters["bytes"] == first_uses * 100_000
    assert found.seconds == pytest.approx(40 * 3 * 1e-3 + found.stall_s)
    # nothing of a layer runs before its first expert is there, and a second may come meanwhile
    assert 0 < found.stall_s <= first_uses * 1e-4 + 1e-9


def test_one_missing_expert_is_waited_for_as_long_as_its_load() -> None:
    trace = synthetic_trace(num_seqs=1, seq_len=3, num_layers=1, num_experts=4, top_k=1)
    trace.ids[:, 0, 0] = 0, 0, 1

    found = run(trace, slots=1)

    assert found.stall_s == pytest.approx(2e-4)
    assert found.seconds == pytest.approx(3e-3 + 2e-4)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("policy", [lru, adaptive])
def test_without_guesses_it_misses_what_the_replay_misses(policy: Any, batch: int) -> None:
    trace = synthetic_trace()
    shape = cache_shape(trace, 4, "layer")  # less than a step's union, at batch 4
    replayed = replay(
        trace, batched_steps(trace, batch), shape, policy.build(shape), with_counts=True
    )

    found = run(trace, 4, batch, policy=policy.build(shape))

    assert found.counters["misses"] == replayed.misses
    assert found.counters["hits"] == replayed.hits
    assert found.num_tokens == trace.num_tokens
    assert found.issued == 0


def test_knowing_the_future_hides_the_link() -> None:
    trace = synthetic_trace(num_seqs=20)
    demand = run(trace, slots=4)
    foretold = run(trace, slots=4, predictor=make_predictor("oracle", trace))

    assert foretold.counters["wasted"] == 0
    assert foretold.counters["useful"] > 0
    assert foretold.stall_s < 0.5 * demand.stall_s, "guesses begin when the gate has seen enough"
    assert foretold.precision == 1.0
    assert demand.precision is None


def test_a_saturated_link_cannot_be_hidden() -> None:
    """Where loads take longer than layers, even the future moves what must be moved."""
    trace = synthetic_trace()
    slow = replace(MACHINE, layer_s=1e-6)
    demand = run(trace, slots=4, machine=slow)
    foretold = run(trace, slots=4, machine=slow, predictor=make_predictor("oracle", trace))

    assert foretold.seconds > 0.9 * demand.seconds
    assert foretold.seconds >= foretold.counters["fetched"] * 0.99e-4


def test_a_batch_of_several_tokens_of_a_sequence_is_one_step() -> None:
    trace = synthetic_trace(num_seqs=2, seq_len=6)
    steps = np.array([0, 0, 0, 1, 2, 3] * 2)
    shape = cache_shape(trace, 8, "layer")
    oracle = make_predictor("oracle", trace)

    found = run_timeline(trace, steps, shape, lru.build(shape), MACHINE, oracle)

    assert found.num_steps == 4
    assert found.precision in (None, 1.0), "the oracle lost its place"


def test_the_link_brings_demands_before_guesses() -> None:
    link = VirtualLink(MACHINE)
    link.guess(0, 1, 0)
    link.guess(0, 2, 1)
    link.advance(0.05e-3)
    link.demand(0, [(3, 2)])

    order: list[int] = []
    while len(order) < 3:
        order += [transfer.expert for transfer in link.ended(wait=True)]

    assert order == [1, 3, 2], "a record of one chunk is not interrupted; then demands go first"
    assert link.now_s == pytest.approx(3e-4)


def test_a_guess_that_was_given_up_and_is_needed_after_all_arrives() -> None:
    link = VirtualLink(replace(MACHINE, record_bytes=3 << 20))
    link.guess(0, 1, 0)
    link.advance(1e-3)  # its first chunk is under way
    assert link.give_up(0, 1)
    link.hurry(0, 1)

    (transfer,) = link.ended(wait=True)

    assert transfer.is_whole
