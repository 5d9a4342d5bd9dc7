"""Every policy keeps the contract of `Policy`; each orders as its file says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from moe_serve import plugin
from moe_serve.engine.kv_cache import KVCacheManager
from moe_serve.engine.policies.base import Policy
from moe_serve.engine.policies.priority import AGING_S
from moe_serve.engine.policies.shortest_prompt import AGING_S_PER_TOKEN
from moe_serve.engine.scheduler import Scheduler
from moe_serve.engine.sequence import SamplerOutput, ScheduledStep
from moe_serve.errors import ConfigError
from moe_serve.types import CacheGroup, Request, SamplingParams

PACKAGE = "moe_serve.engine.policies"
POLICIES = plugin.names(PACKAGE)


def build(name: str) -> Policy:
    policy = plugin.load(PACKAGE, name).build()
    assert isinstance(policy, Policy)
    return policy


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def scheduler(
    name: str, clock: Clock, max_num_seqs: int = 1, budget: int = 64, num_blocks: int = 64
) -> Scheduler:
    kv = KVCacheManager((CacheGroup("full", (0,), 4),), (num_blocks,), 4, max_num_seqs, 256, False)
    return Scheduler(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_prefill_chunk=None,
        policy=build(name),
        kv=kv,
        max_model_len=256,
        clock=clock,
        admission_horizon=0,
    )


def request(name: str, num_prompt: int = 4, priority: int = 0, max_tokens: int = 2) -> Request:
    return Request(
        request_id=name,
        prompt_ids=tuple(range(num_prompt)),
        sampling=SamplingParams(max_tokens=max_tokens),
        priority=priority,
    )


def run_step(engine: Scheduler) -> ScheduledStep:
    step = engine.schedule()
    assert step is not None
    engine.finish(step, SamplerOutput([1] * len(step.sampled)))
    return step


def order_of(name: str, arrivals: list[tuple[float, Request]]) -> list[str]:
    """Return the order in which requests run, one at a time, when all wait from the start."""
    clock = Clock()
    engine = scheduler(name, clock)
    for arrival_s, added in arrivals:
        clock.now_s = arrival_s
        engine.add(added)
    ran: list[str] = []
    while engine.has_unfinished:
        for sequence in run_step(engine).sequences:
            if sequence.request.request_id not in ran:
                ran.append(sequence.request.request_id)
    return ran


def test_the_policies_are_the_files_of_the_folder() -> None:
    assert POLICIES == ("decode_first", "fcfs", "priority", "shortest_prompt")
    with pytest.raises(ConfigError, match="there is no 'fcsf'; did you mean 'fcfs'"):
        plugin.load(PACKAGE, "fcsf")


@pytest.mark.parametrize("name", POLICIES)
def test_of_two_that_differ_in_arrival_only_the_earlier_runs_first(name: str) -> None:
    policy = build(name)
    early, late = policy.rank(request("a"), 1.0), policy.rank(request("a"), 2.0)
    assert math.isfinite(early)
    assert early < late
    assert order_of(name, [(0.0, request("z")), (0.0, request("a"))]) == ["z", "a"]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("budget", [1, 7, 8, 2048])
def test_prompts_get_something_unless_decodes_fill_the_step(name: str, budget: int) -> None:
    policy = build(name)
    assert policy.prompt_tokens(budget, 0) == budget
    for num_decodes in range(1, min(budget, 20)):
        assert 1 <= policy.prompt_tokens(budget, num_decodes) <= budget - num_decodes
    assert policy.prompt_tokens(budget, budget) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_starves_behind_an_endless_row_of_better_ones(name: str) -> None:
    clock = Clock()
    engine = scheduler(name, clock)
    engine.add(request("unlucky", num_prompt=200, priority=3))
    num_added = 0
    while "unlucky" in engine._requests:
        while engine.num_waiting < 3:
            engine.add(request(f"lucky{num_added}", num_prompt=1, priority=0))
            num_added += 1
        run_step(engine)
        clock.now_s += 0.5
        assert clock.now_s < 2 * 3 * AGING_S
    assert num_added < 100


@pytest.mark.parametrize("name", POLICIES)
def test_the_last_in_the_order_is_the_victim(name: str) -> None:
    engine = scheduler(name, Clock(), max_num_seqs=2, num_blocks=6)
    engine.add(request("worse", num_prompt=9, priority=1, max_tokens=12))
    engine.add(request("better", num_prompt=8, priority=0, max_tokens=12))
    step = run_step(engine)
    while not engine.num_preemptions:
        step = run_step(engine)
    is_reordering = name in ("priority", "shortest_prompt")
    assert [sequence.request.request_id for sequence in step.sequences] == (
        ["better"] if is_reordering else ["worse"]
    )


def test_each_policy_has_its_order() -> None:
    arrivals = [
        (0.0, request("long", num_prompt=40, priority=1)),
        (0.1, request("urgent", num_prompt=20, priority=-1)),
        (0.2, request("short", num_prompt=2, priority=2)),
    ]
    assert {name: order_of(name, arrivals) for name in POLICIES} == {
        "fcfs": ["long", "urgent", "short"],
        "decode_first": ["long", "urgent", "short"],
        "priority": ["urgent", "long", "short"],
        "shortest_prompt": ["short", "urgent", "long"],
    }


def test_a_level_of_priority_is_worth_ten_seconds_of_waiting() -> None:
    old = (0.0, request("old", priority=1))
    assert order_of("priority", [old, (AGING_S - 0.1, request("new"))]) == ["new", "old"]
    assert order_of("priority", [old, (AGING_S + 0.1, request("new"))]) == ["old", "new"]


def test_a_hundred_tokens_of_prompt_are_worth_a_second_of_waiting() -> None:
    assert pytest.approx(1.0) == 100 * AGING_S_PER_TOKEN
    old = (0.0, request("old", num_prompt=104))
    new = request("new", num_prompt=4)
    assert order_of("shortest_prompt", [old, (0.9, new)]) == ["new", "old"]
    assert order_of("shortest_prompt", [old, (1.1, new)]) == ["old", "new"]


@pytest.mark.parametrize(("name", "expected"), [("fcfs", 63), ("decode_first", 8)])
def test_decode_first_keeps_prompts_to_an_eighth_of_a_step(name: str, expected: int) -> None:
    engine = scheduler(name, Clock(), max_num_seqs=2)
    engine.add(request("stream", max_tokens=20))
    run_step(engine)
    engine.add(request("long", num_prompt=100))
    assert run_step(engine).query_lens == [1, expected]


def test_a_better_arrival_shares_the_step_before_a_running_prompt() -> None:
    engine = scheduler("priority", Clock(), max_num_seqs=2, budget=16)
    engine.add(request("bulk", num_prompt=100, priority=1))
    run_step(engine)
    engine.add(request("urgent", num_prompt=10, priority=0))
    step = run_step(engine)
    assert [sequence.request.request_id for sequence in step.sequences] == ["urgent", "bulk"]
    assert step.query_lens == [10, 6]
