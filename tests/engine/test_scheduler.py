"""Steps, budgets, preemption, forks and the rules by which outputs end, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest

from moe_serve import plugin
from moe_serve.engine.grammar import Matcher
from moe_serve.engine.kv_cache import KVCacheManager
from moe_serve.engine.scheduler import Scheduler
from moe_serve.engine.sequence import SamplerOutput, ScheduledStep, Sequence
from moe_serve.errors import RequestError
from moe_serve.types import CacheGroup, Request, SamplingParams, StepOutput, TokenLogprobs

EOS = 2
PLAIN = 7
FULL = CacheGroup("full", (0,), 4)


def scheduler(
    *,
    groups: tuple[CacheGroup, ...] = (FULL,),
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 4,
    budget: int = 32,
    chunk: int | None = None,
    max_model_len: int = 64,
    is_caching: bool = False,
    policy: str = "fcfs",
    horizon: int = 0,
) -> Scheduler:
    kv = KVCacheManager(
        groups,
        (num_blocks,) * len(groups),
        block_size,
        max_num_seqs,
        max_model_len,
        is_caching,
    )
    return Scheduler(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_prefill_chunk=chunk,
        policy=plugin.load("moe_serve.engine.policies", policy).build(),
        kv=kv,
        max_model_len=max_model_len,
        clock=lambda: 0.0,
        admission_horizon=horizon,
    )


def request(name: str, prompt: int | tuple[int, ...] = 5, **options: Any) -> Request:
    """Make a request whose prompt is given, or so many tokens that no other prompt has."""
    if isinstance(prompt, int):
        prompt = tuple(100 * ord(name[0]) + index for index in range(prompt))
    options.setdefault("max_tokens", 8)
    fields = {key: options.pop(key) for key in ("priority", "cache_salt") if key in options}
    return Request(
        request_id=name,
        prompt_ids=prompt,
        sampling=SamplingParams(**options),
        eos_token_ids=frozenset({EOS}),
        **fields,
    )


def counting(sequence: Sequence) -> int:
    """Give output k of a sequence the token 1000 * (its index + 1) + k."""
    return 1000 * (sequence.index + 1) + sequence.num_output_tokens


def run_step(
    engine: Scheduler,
    token: Callable[[Sequence], int] = counting,
    errors: Mapping[str, str] | None = None,
) -> tuple[ScheduledStep, list[StepOutput]]:
    """Run one step of a fake model; the rows of requests in `errors` fail."""
    step = engine.schedule()
    assert step is not None
    failed = {
        index: (errors or {})[sequence.request.request_id]
        for index, sequence in enumerate(step.sampled)
        if sequence.request.request_id in (errors or {})
    }
    output = SamplerOutput([token(sequence) for sequence in step.sampled], errors=failed)
    for index, (sequence, size) in enumerate(zip(step.sequences, step.query_lens, strict=True)):
        if sequence.request.sampling.prompt_logprobs is not None and sequence.index == 0:
            first = sequence.num_computed_tokens + 1
            after = sequence.token_ids[first : min(first + size, sequence.num_prompt_tokens)]
            output.prompt_logprobs[index] = [TokenLogprobs(token, -1.0, 1) for token in after]
    return step, engine.finish(step, output)


def run_all(
    engine: Scheduler, token: Callable[[Sequence], int] = counting
) -> dict[tuple[str, int], list[StepOutput]]:
    """Run until nothing is left; return what each output was given."""
    given: dict[tuple[str, int], list[StepOutput]] = {}
    while engine.has_unfinished:
        for output in run_step(engine, token)[1]:
            given.setdefault((output.request_id, output.index), []).append(output)
    assert engine.schedule() is None
    return given


def num_available(engine: Scheduler) -> int:
    """Return how many blocks nobody holds."""
    return engine._kv.pools[0].num_available


def names(step: ScheduledStep) -> list[str]:
    return [sequence.request.request_id for sequence in step.sequences]


def tokens(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_an_id_in_use_is_refused_and_free_again_at_the_end() -> None:
    engine = scheduler()
    engine.add(request("a"))
    with pytest.raises(RequestError, match="request_id 'a' is in use"):
        engine.add(request("a"))
    run_all(engine)
    engine.add(request("a"))
    assert engine.num_waiting == 1


def test_a_long_prompt_never_stops_a_stream() -> None:
    engine = scheduler(budget=8, chunk=5)
    engine.add(request("a", 3, max_tokens=20))
    run_step(engine)
    engine.add(request("long", 40))
    for _ in range(8):
        step, outputs = run_step(engine)
        assert names(step) == ["a", "long"]
        assert step.query_lens == [1, 5]
        assert "a" in [output.request_id for output in outputs]


def test_prompts_share_what_the_decodes_leave() -> None:
    engine = scheduler(budget=10, chunk=6)
    engine.add(request("a", 2))
    run_step(engine)
    engine.add(request("b", 8))
    engine.add(request("c", 8))
    steps = [run_step(engine)[0] for _ in range(3)]
    assert [(names(step), step.query_lens) for step in steps] == [
        (["a", "b", "c"], [1, 6, 3]),
        (["a", "b", "c"], [1, 2, 5]),
        (["a", "b", "c"], [1, 1, 1]),
    ]
    assert [step.sample_sources for step in steps] == [[0], [0, 1, 2], [0, 1, 2]]


def test_decodes_beyond_the_budget_take_turns() -> None:
    engine = scheduler(budget=3, max_num_seqs=4)
    engine.add(request("a", 1, n=4, max_tokens=40))
    run_step(engine)
    given = [0] * 4
    for count in range(1, 25):
        step, outputs = run_step(engine)
        assert step.query_lens == [1, 1, 1]
        for output in outputs:
            given[output.index] += 1
        assert max(given) - min(given) <= 1, f"after {count} steps"
    assert given == [18] * 4


def test_the_last_in_the_order_is_preempted_and_goes_on_with_its_tokens() -> None:
    engine = scheduler(num_blocks=6)
    engine.add(request("a", 8, max_tokens=12))
    engine.add(request("b", 8, max_tokens=12))
    given = run_all(engine)

    assert engine.num_preemptions == 1
    for name in "ab":
        assert tokens(given[name, 0]) == list(range(1000, 1012))
        assert [output.finish_reason for output in given[name, 0]] == [None] * 11 + ["length"]


def test_a_preempted_sequence_is_a_prompt_again_with_its_outputs() -> None:
    engine = scheduler(num_blocks=6, chunk=5)
    engine.add(request("a", 8, max_tokens=12))
    engine.add(request("b", 7, max_tokens=12))
    while not engine.num_preemptions:
        step, _ = run_step(engine)
    assert (engine.num_waiting, engine.num_running, names(step)) == (1, 1, ["a"])
    while names(step) == ["a"]:
        step, _ = run_step(engine)

    again = step.sequences[0]
    assert (names(step), step.query_lens, step.sampled) == (["b"], [5], [])
    assert again.num_preemptions == 1
    assert again.num_output_tokens > 1
    assert again.output_ids == [1000 + index for index in range(again.num_output_tokens)]


def test_a_preempted_sequence_may_find_its_own_blocks_again() -> None:
    engine = scheduler(num_blocks=7, is_caching=True)
    engine.add(request("a", 8, max_tokens=12))
    engine.add(request("b", 8, max_tokens=12))
    given = run_all(engine)

    assert engine.num_preemptions > 0
    assert engine.prefix_hit_tokens > 0
    assert [output.num_cached_tokens for output in given["b", 0]] == [0] * 12


def test_prompts_are_admitted_only_when_the_running_can_still_grow() -> None:
    def admitted_beside_one(horizon: int) -> bool:
        engine = scheduler(num_blocks=6, horizon=horizon)
        engine.add(request("a", 8, max_tokens=16))
        run_step(engine)
        engine.add(request("b", 8, max_tokens=16))
        run_step(engine)
        return engine.num_running == 2

    assert admitted_beside_one(horizon=4)
    assert not admitted_beside_one(horizon=8)


@pytest.mark.parametrize(("num_blocks", "prompts"), [(5, (1, 1)), (4, (3, 1)), (9, (5, 1))])
def test_a_preempted_decode_leaves_its_place_in_the_step_to_the_next(
    num_blocks: int, prompts: tuple[int, int]
) -> None:
    engine = scheduler(num_blocks=num_blocks, budget=2, max_num_seqs=3, max_model_len=30)
    for name, num_prompt in zip("ab", prompts, strict=True):
        engine.add(request(name, num_prompt, n=2, max_tokens=12))
    while engine.has_unfinished:
        step = engine.schedule()
        assert step is not None
        first = min((*engine._decodes, *engine._prompts), key=engine._rank)
        assert first in step.sequences or step.num_tokens == 2
        engine.finish(step, SamplerOutput([counting(sequence) for sequence in step.sampled]))
    assert engine.num_preemptions > 0


def test_a_step_whose_prompt_preempts_admits_nobody() -> None:
    engine = scheduler(num_blocks=8, chunk=4, policy="priority")
    engine.add(request("victim", 4, priority=5, max_tokens=20))
    run_step(engine)
    engine.add(request("first", 24, priority=0))
    run_step(engine)
    engine.add(request("next", 4, priority=1))
    step, _ = run_step(engine)
    while not engine.num_preemptions:
        assert names(step) == ["victim", "first"]
        step, _ = run_step(engine)
    assert names(step) == ["first"]
    assert names(run_step(engine)[0]) == ["first", "next"]


def test_a_step_whose_decode_preempts_admits_nobody() -> None:
    engine = scheduler(num_blocks=6, policy="priority")
    engine.add(request("victim", 4, priority=5, max_tokens=20))
    engine.add(request("first", 9, priority=0, max_tokens=15))
    while num_available(engine):
        run_step(engine)
    engine.add(request("next", 3, priority=1, max_tokens=1))
    while not engine.num_preemptions:
        step, _ = run_step(engine)
    assert names(step) == ["first"]
    assert num_available(engine) == 1
    assert names(run_step(engine)[0]) == ["first", "next"]


def test_a_prefix_hit_is_reported_with_the_first_output_only() -> None:
    engine = scheduler(is_caching=True)
    engine.add(request("a", tuple(range(10, 19))))
    run_all(engine)
    engine.add(request("b", (*range(10, 18), 50)))
    step, outputs = run_step(engine)

    assert step.query_lens == [1]
    assert outputs[0].num_cached_tokens == 8
    assert engine.prefix_hit_tokens == 8
    assert run_step(engine)[1][0].num_cached_tokens == 0


def test_the_last_prompt_token_gives_each_of_n_outputs_its_first_token() -> None:
    engine = scheduler(chunk=4)
    engine.add(request("a", 6, n=3, max_tokens=3))
    assert run_step(engine)[0].sampled == []
    step, outputs = run_step(engine)
    assert step.sample_sources == [0, 0, 0]
    assert [sequence.index for sequence in step.sampled] == [0, 1, 2]
    assert [output.token_ids for output in outputs] == [(1000,), (2000,), (3000,)]

    step, outputs = run_step(engine)
    assert step.query_lens == [1, 1, 1]
    assert len(step.block_copies[0]) == 2
    assert [output.token_ids for output in outputs] == [(1001,), (2001,), (3001,)]
    run_all(engine)
    assert num_available(engine) == 64


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3])
def test_forks_without_a_row_wait_with_their_first_token(max_num_seqs: int) -> None:
    engine = scheduler(max_num_seqs=max_num_seqs)
    engine.add(request("a", 6, n=3, max_tokens=4))
    given = run_all(engine)

    assert {key: tokens(outputs) for key, outputs in given.items()} == {
        ("a", index): [1000 * (index + 1) + count for count in range(4)] for index in range(3)
    }


def test_forks_live_on_when_the_first_output_ends_at_once() -> None:
    engine = scheduler()
    engine.add(request("a", 6, n=2, max_tokens=3))
    given = run_all(engine, lambda sequence: EOS if sequence.index == 0 else PLAIN)

    assert tokens(given["a", 0]) == [EOS]
    assert tokens(given["a", 1]) == [PLAIN] * 3


@pytest.mark.parametrize(
    ("options", "token", "expected", "reason"),
    [
        ({}, EOS, 1, "stop"),
        ({"ignore_eos": True}, EOS, 8, "length"),
        ({"stop_token_ids": (PLAIN,)}, PLAIN, 1, "stop"),
        ({"stop_token_ids": (PLAIN,), "ignore_eos": True}, PLAIN, 1, "stop"),
        ({"min_tokens": 4}, EOS, 4, "stop"),
        ({"min_tokens": 4, "stop_token_ids": (PLAIN,)}, PLAIN, 4, "stop"),
        ({"max_tokens": 1}, PLAIN, 1, "length"),
        ({"max_tokens": 1}, EOS, 1, "stop"),
        ({"max_tokens": None}, PLAIN, 59, "length"),
        ({"max_tokens": 1000}, PLAIN, 59, "length"),
    ],
)
def test_an_output_ends_where_it_must(
    options: dict[str, Any], token: int, expected: int, reason: str
) -> None:
    engine = scheduler()
    engine.add(request("a", 5, **options))
    outputs = run_all(engine, lambda sequence: token)["a", 0]

    assert tokens(outputs) == [token] * expected
    assert outputs[-1].finish_reason == reason
    assert {output.finish_reason for output in outputs[:-1]} <= {None}


def test_a_failed_row_ends_its_request_and_no_other() -> None:
    engine = scheduler()
    engine.add(request("a"))
    engine.add(request("b"))
    run_step(engine)
    _, outputs = run_step(engine, errors={"a": "a NaN in the logits"})

    assert [(o.request_id, o.token_ids, o.finish_reason, o.error) for o in outputs] == [
        ("a", (), "error", "a NaN in the logits"),
        ("b", (1001,), None, None),
    ]
    assert list(run_all(engine)) == [("b", 0)]


def test_a_prompt_that_fails_leaves_no_prefix_behind() -> None:
    engine = scheduler(is_caching=True)
    engine.add(request("a", 9, n=2))
    _, outputs = run_step(engine, errors={"a": "a NaN in the logits"})

    assert [(output.index, output.finish_reason) for output in outputs] == [
        (0, "error"),
        (1, "error"),
    ]
    assert not engine.has_unfinished
    assert engine._kv.pools[0].kept_blocks() == []
    assert num_available(engine) == 64


def wanted_logprobs(prompt: tuple[int, ...]) -> list[TokenLogprobs | None]:
    return [None, *(TokenLogprobs(token, -1.0, 1) for token in prompt[1:])]


@pytest.mark.parametrize("chunk", [1, 3, 9, 20])
def test_prompt_logprobs_come_once_and_whole(chunk: int) -> None:
    engine = scheduler(chunk=chunk, is_caching=True)
    prompt = tuple(range(10, 19))
    for name in "ab":  # the second does not read what the first left in the cache
        engine.add(request(name, prompt, prompt_logprobs=0, n=2, max_tokens=2))
        given = run_all(engine)
        for index in (0, 1):
            found = [output.prompt_logprobs for output in given[name, index]]
            first = None if index else tuple(wanted_logprobs(prompt))
            assert found == [first, None]
    assert engine.prefix_hit_tokens == 0


@pytest.mark.parametrize("is_caching", [False, True])
def test_prompt_logprobs_are_not_doubled_by_a_preemption(is_caching: bool) -> None:
    engine = scheduler(num_blocks=8, budget=6, is_caching=is_caching)
    engine.add(request("a", 8, max_tokens=12))
    run_step(engine)
    run_step(engine)
    late = request("b", 18, prompt_logprobs=0, max_tokens=14)
    engine.add(late)
    given = run_all(engine)

    assert engine.num_preemptions > 0
    outputs = given["b", 0]
    assert outputs[0].prompt_logprobs == tuple(wanted_logprobs(late.prompt_ids))
    assert all(output.prompt_logprobs is None for output in outputs[1:])


def test_prompt_logprobs_of_a_single_token_are_a_none() -> None:
    engine = scheduler()
    engine.add(request("a", 1, prompt_logprobs=3))
    assert run_step(engine)[1][0].prompt_logprobs == (None,)


def test_logprobs_travel_with_their_tokens() -> None:
    engine = scheduler()
    engine.add(request("a"))
    engine.add(request("b"))
    entry = TokenLogprobs(PLAIN, -0.5, 1)
    for _ in range(2):  # a prompt's last chunk, then a decode
        step = engine.schedule()
        assert step is not None
        outputs = engine.finish(step, SamplerOutput([PLAIN, PLAIN], [entry, None]))
        assert [output.logprobs for output in outputs] == [(entry,), ()]


@pytest.mark.parametrize("when", ["waiting", "prompt", "decode", "in_step", "forks_in_step"])
def test_abort_at_any_moment_leaves_nothing(when: str) -> None:
    engine = scheduler(chunk=3, max_num_seqs=2)
    engine.add(request("a", 6, n=3))
    num_steps = {"waiting": 0, "prompt": 1, "decode": 3, "in_step": 3, "forks_in_step": 1}[when]
    for _ in range(num_steps):
        run_step(engine)
    if when.endswith("in_step"):
        step = engine.schedule()
        assert step is not None
        assert engine.abort("a")
        assert engine.finish(step, SamplerOutput([PLAIN] * len(step.sampled))) == []
    else:
        assert engine.abort("a")

    assert not engine.abort("a")
    assert (engine.num_waiting, engine.num_running, engine.has_unfinished) == (0, 0, False)
    assert num_available(engine) == 64
    assert engine._kv.num_free_rows == 2


def test_an_id_may_be_used_again_while_the_aborted_one_is_in_a_step() -> None:
    engine = scheduler()
    engine.add(request("a"))
    run_step(engine)
    step = engine.schedule()
    assert step is not None
    engine.abort("a")
    engine.add(request("a", 3))
    assert engine.finish(step, SamplerOutput([PLAIN])) == []
    assert tokens(run_all(engine)["a", 0]) == list(range(1000, 1008))


def test_stop_ends_one_output_without_a_word() -> None:
    engine = scheduler()
    engine.add(request("a", n=2))
    assert not engine.stop("a", 0)  # it has no text yet
    run_step(engine)
    assert engine.stop("a", 0)
    assert not engine.stop("a", 0)
    assert not engine.stop("a", 5)
    assert not engine.stop("nobody", 0)

    given = run_all(engine)
    assert list(given) == [("a", 1)]
    assert len(tokens(given["a", 1])) == 7


def test_steps_must_be_finished_in_turn() -> None:
    engine = scheduler()
    engine.add(request("a"))
    old, _ = run_step(engine)
    engine.schedule()
    with pytest.raises(AssertionError, match="step 1 finished, 2 runs"):
        engine.finish(old, SamplerOutput([PLAIN]))


class Countdown:
    """A grammar that is complete after so many tokens of output."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def is_complete(self, token_ids: list[int]) -> bool:
        return len(token_ids) - 3 >= self.num_tokens


def matchers(*lengths: int) -> list[Matcher]:
    return [cast(Matcher, Countdown(length)) for length in lengths]


def structured(name: str, **options: Any) -> Request:
    return request(name, (1, 2, 3), structured_outputs={"regex": "a"}, **options)


def test_a_request_that_is_held_is_in_nobodys_way() -> None:
    engine = scheduler()
    engine.add(structured("held", n=2, max_tokens=9), is_held=True)
    assert engine.schedule() is None
    assert (engine.num_waiting, engine.has_unfinished) == (1, True)
    engine.add(request("plain", (1, 2), max_tokens=2))
    given = [output.request_id for _ in range(2) for output in run_step(engine)[1]]
    assert given == ["plain", "plain"]
    engine.release("held", matchers(4, 2))
    outputs = run_all(engine)
    assert [len(outputs["held", index]) for index in (0, 1)] == [4, 2]
    assert {steps[-1].finish_reason for steps in outputs.values()} == {"stop"}
    assert engine.num_waiting == 0


def test_a_held_request_keeps_its_place_in_the_order() -> None:
    engine = scheduler(max_num_seqs=1)
    engine.add(structured("first"), is_held=True)
    engine.add(request("second", (1, 2)))
    engine.release("first", matchers(1))
    assert run_step(engine)[0].sampled[0].request.request_id == "first"


def test_a_held_request_can_be_refused_or_aborted() -> None:
    engine = scheduler()
    engine.add(structured("held", n=3), is_held=True)
    outputs = engine.refuse("held", "no such form", True)
    assert [output.index for output in outputs] == [0, 1, 2]
    for output in outputs:
        assert (output.finish_reason, output.error) == ("error", "no such form")
        assert output.is_refused
    assert not engine.has_unfinished
    engine.add(structured("held"), is_held=True)
    assert engine.abort("held")
    assert (engine.num_waiting, engine.has_unfinished) == (0, False)
    assert engine.schedule() is None


def test_forks_keep_their_matchers_when_a_step_is_retracted() -> None:
    engine = scheduler()
    engine.add(structured("r", n=3, max_tokens=9), is_held=True)
    given = matchers(1, 2, 3)
    engine.release("r", given)
    step = engine.schedule()
    assert step is not None
    assert [sequence.matcher for sequence in step.sampled] == given
    engine.retract(step)
    step = engine.schedule()
    assert step is not None
    assert [sequence.matcher for sequence in step.sampled] == given
    engine.retract(step)
    assert [len(steps) for steps in run_all(engine).values()] == [1, 2, 3]


def test_the_end_of_a_form_goes_before_the_end_of_the_length() -> None:
    engine = scheduler()
    for name, length, max_tokens in (("both", 3, 3), ("length", 4, 3), ("stop", 2, 3)):
        engine.add(structured(name, max_tokens=max_tokens), is_held=True)
        engine.release(name, matchers(length))
    reasons = {name: steps[-1].finish_reason for (name, _), steps in run_all(engine).items()}
    assert reasons == {"both": "stop", "length": "length", "stop": "stop"}


def test_an_output_that_its_request_made_fail_says_so() -> None:
    engine = scheduler()
    engine.add(request("r", (1, 2), n=2))
    step = engine.schedule()
    assert step is not None
    failed = SamplerOutput([PLAIN, PLAIN], errors={0: "a NaN", 1: "no token"}, refused={1})
    outputs = engine.finish(step, failed)
    assert [(output.error, output.is_refused) for output in outputs] == [
        ("a NaN", False),
        ("no token", True),
    ]
