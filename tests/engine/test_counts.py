"""What is counted of a step: tokens of prompts, of outputs, and why outputs ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.engine.test_scheduler import request, run_all, run_step, scheduler


def counted(engine: Any) -> tuple[int, int, int, int]:
    counts = engine.counts
    return (
        counts.num_steps,
        counts.step_tokens,
        counts.num_prompt_tokens,
        counts.num_generation_tokens,
    )


def test_prompts_count_in_chunks_and_decodes_one_by_one() -> None:
    engine = scheduler(chunk=4)
    engine.add(request("a", 10, max_tokens=3))
    run_step(engine)
    assert counted(engine) == (1, 4, 4, 0)
    run_step(engine)
    run_step(engine)
    assert counted(engine) == (3, 10, 10, 1)
    run_all(engine)
    assert counted(engine) == (5, 12, 10, 3)
    assert engine.counts.num_finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_a_prompt_of_several_outputs_is_computed_once() -> None:
    engine = scheduler()
    engine.add(request("a", 5, n=3, max_tokens=2))
    run_all(engine)
    assert counted(engine) == (2, 5 + 3, 5, 6)
    assert engine.counts.num_finished["length"] == 3


def test_what_is_found_in_the_cache_is_not_computed() -> None:
    engine = scheduler(is_caching=True)
    for name in "ab":
        engine.add(request(name, tuple(range(50, 59)), max_tokens=1))
        run_all(engine)
    assert counted(engine) == (2, 9 + 1, 9 + 1, 2)
    assert (engine.prefix_query_tokens, engine.prefix_hit_tokens) == (16, 8)


def test_without_a_cache_nothing_is_looked_for() -> None:
    engine = scheduler()
    engine.add(request("a", 9, max_tokens=1))
    run_all(engine)
    assert engine.prefix_query_tokens == 0


def test_what_a_preempted_one_computes_again_counts_again_but_outputs_are_no_prompt() -> None:
    engine = scheduler(num_blocks=6, block_size=4)
    engine.add(request("a", 8, max_tokens=9))
    engine.add(request("b", 8, max_tokens=9))
    outputs = run_all(engine)
    assert engine.num_preemptions > 0
    assert engine.counts.num_prompt_tokens == 16 + 8 * engine.num_preemptions
    # each of 8 + 8 tokens that were run, and those run again
    assert engine.counts.step_tokens > 2 * 16 + 8 * engine.num_preemptions
    assert engine.counts.num_generation_tokens == sum(map(len, outputs.values())) == 18


def test_every_output_ends_once_and_is_counted_by_why() -> None:
    engine = scheduler()
    engine.add(request("a", 3, n=2))
    engine.add(request("c", 3, max_tokens=5))
    run_step(engine)
    assert engine.stop("a", 1)
    assert engine.counts.num_finished["stop"] == 1
    engine.abort("a")
    assert engine.counts.num_finished["abort"] == 1
    run_step(engine, errors={"c": "a NaN"})
    assert engine.counts.num_finished == {"stop": 1, "length": 0, "abort": 1, "error": 1}


def test_a_prompt_that_is_aborted_ends_all_outputs_that_it_would_have_had() -> None:
    engine = scheduler(chunk=2)
    engine.add(request("a", 3, n=3))
    engine.abort("a")
    assert engine.counts.num_finished["abort"] == 3
    engine.add(request("a", 3, n=3))
    run_step(engine)
    engine.abort("a")
    assert engine.counts.num_finished["abort"] == 6
    engine.add(request("a", 3, n=3))
    run_step(engine)
    run_step(engine)
    engine.abort("a")  # which are there now
    assert engine.counts.num_finished["abort"] == 9


def test_of_one_that_goes_on_elsewhere_only_outputs_that_had_not_ended_end() -> None:
    engine = scheduler(chunk=2)
    engine.add(replace(request("a", 3, n=3), output_ids=((), (5,), None)))
    engine.abort("a")
    assert engine.counts.num_finished["abort"] == 2


def test_a_prompt_that_fails_ends_all_outputs_that_it_would_have_had() -> None:
    engine = scheduler(chunk=2)
    for num_failed in (3, 6):  # before its last chunk, and with it
        engine.add(request("a", 3, n=3))
        if num_failed == 6:
            run_step(engine)
        step = engine.schedule()
        assert step is not None
        engine.fail(step, "no memory")
        assert engine.counts.num_finished["error"] == num_failed
    assert engine.counts.num_steps == 1
