"""Any schedule gives the tokens that the model gives, and reads only what it wrote.

The fake model's next token is a function of all tokens before it. Beside it a shadow of the cache
notes which prefix each slot holds, and every step checks that all that a query can see is its own
sequence's prefix: a wrong share, a lost copy or a block given away too soon is seen at once.
"""

from __future__ import annotations

import os
import random
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from moe_serve import plugin
from moe_serve.engine.kv_cache import KVCacheManager
from moe_serve.engine.prefix_cache import hash_block
from moe_serve.engine.scheduler import Scheduler
from moe_serve.engine.sequence import SamplerOutput, ScheduledStep, Sequence
from moe_serve.errors import CapacityError
from moe_serve.types import CacheGroup, Request, SamplingParams, StepOutput

EXAMPLES, STEPS = 300, 50
LONG_RUN_STEPS = int(os.environ.get("SCHEDULER_MACHINE_STEPS", "1000000"))

POLICIES = plugin.names("moe_serve.engine.policies")
MAX_MODEL_LEN = 24
EOS, STOP_ID = 0, 9
WINDOWS: tuple[tuple[int | None, ...], ...] = ((None,), (None, 5), (1,), (7,), (None, 3, None, 8))


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A scheduler to be tested. windows: one per cache group, None for full attention.

    num_tokens: what the blocks of each group hold, about.
    """

    policy: str
    windows: tuple[int | None, ...]
    block_size: int
    num_tokens: int
    max_num_seqs: int
    budget: int
    max_chunk: int | None
    horizon: int
    is_caching: bool
    is_colliding: bool

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_size)

    @property
    def chunk(self) -> int:
        return min(self.max_chunk or self.budget, self.budget)

    def fits(self, num_tokens: int) -> bool:
        """Say whether an empty cache holds the keys of `num_tokens`, in the worst step."""
        for window in self.windows:
            needed = -(-num_tokens // self.block_size)
            if window is not None:
                needed = min(needed, -(-(window - 1 + self.chunk) // self.block_size) + 1)
            if needed > self.num_blocks:
                return False
        return True


SETUPS = st.builds(
    Setup,
    policy=st.sampled_from(POLICIES),
    windows=st.sampled_from(WINDOWS),
    block_size=st.sampled_from((1, 2, 3, 4, 8)),
    num_tokens=st.integers(8, 44),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(1, 20),
    max_chunk=st.one_of(st.none(), st.integers(1, 9)),
    horizon=st.sampled_from((0, 0, 3, 16)),
    is_caching=st.booleans(),
    is_colliding=st.booleans(),
)


def next_token(request: Request, seed: int, tokens: list[int]) -> int | None:
    """Return the token after `tokens`, or None where the row fails."""
    value = zlib.crc32(bytes([seed % 251, *tokens])) % 41
    if value == 2:
        return None
    num_output = len(tokens) - len(request.prompt_ids)
    if value < 2 and num_output >= request.sampling.min_tokens:
        return (EOS, STOP_ID)[value]
    return 1 + value % 3


def whole_output(request: Request, index: int) -> tuple[list[int], str]:
    """Return the tokens of an output computed alone, and why it ends."""
    tokens = list(request.prompt_ids)
    start, sampling = len(tokens), request.sampling
    while True:
        token = next_token(request, request.seed + index, tokens)
        if token is None:
            return tokens[start:], "error"
        tokens.append(token)
        if token == STOP_ID or (token == EOS and not sampling.ignore_eos):
            return tokens[start:], "stop"
        if len(tokens) == MAX_MODEL_LEN or len(tokens) - start == sampling.max_tokens:
            return tokens[start:], "length"


class World:
    """A scheduler, a fake model with a shadow of its cache, and what each output must become."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        groups = tuple(
            CacheGroup("full", (layer,), 4)
            if window is None
            else CacheGroup("sliding", (layer,), 4, window)
            for layer, window in enumerate(setup.windows)
        )
        self.kv = KVCacheManager(
            groups,
            (setup.num_blocks,) * len(groups),
            setup.block_size,
            setup.max_num_seqs,
            MAX_MODEL_LEN,
            setup.is_caching,
            hash_block=(lambda key, tokens: sum(tokens) % 3) if setup.is_colliding else hash_block,
        )
        self.now_s = 0.0
        self.scheduler = Scheduler(
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.budget,
            max_prefill_chunk=setup.max_chunk,
            policy=plugin.load("moe_serve.engine.policies", setup.policy).build(),
            kv=self.kv,
            max_model_len=MAX_MODEL_LEN,
            clock=lambda: self.now_s,
            admission_horizon=setup.horizon,
        )
        self.num_added = 0
        self.num_steps = 0
        self.requests: dict[str, Request] = {}  # those that have not ended
        self.given: dict[tuple[str, int], list[int]] = {}  # tokens so far, of outputs not ended
        self.slots: list[dict[int, int]] = [{} for _ in groups]  # slot -> prefix
        self.prefixes: dict[tuple[object, int], int] = {}  # (prefix before, token) -> prefix
        self.seen: Counter[str] = Counter()

    def add(self, prompt: tuple[int, ...], sampling: SamplingParams, **fields: Any) -> None:
        request = Request(
            request_id=f"r{self.num_added}",
            prompt_ids=prompt,
            sampling=sampling,
            seed=len(prompt),
            eos_token_ids=frozenset({EOS}),
            **fields,
        )
        end = min(len(prompt) + (sampling.max_tokens or MAX_MODEL_LEN), MAX_MODEL_LEN)
        if not self.setup.fits(end - 1):
            with pytest.raises(CapacityError, match=r"KV blocks of \d+ tokens, and there are \d+"):
                self.scheduler.add(request)
            self.seen["refused"] += 1
            return
        self.scheduler.add(request)
        self.num_added += 1
        self.requests[request.request_id] = request
        for index in range(sampling.n):
            self.given[request.request_id, index] = []

    def abort(self, choice: int) -> None:
        """Abort one of the requests, if there is any."""
        if self.requests:
            request_id = sorted(self.requests)[choice % len(self.requests)]
            assert self.scheduler.abort(request_id)
            assert not self.scheduler.abort(request_id)
            for index in range(self.requests[request_id].sampling.n):
                self.given.pop((request_id, index), None)
            del self.requests[request_id]
            self.seen["aborted"] += 1

    def stop(self, choice: int) -> None:
        """Stop one of the outputs that have tokens, if there is any."""
        begun = sorted(output for output, tokens in self.given.items() if tokens)
        if begun:
            request_id, index = begun[choice % len(begun)]
            assert self.scheduler.stop(request_id, index)
            assert not self.scheduler.stop(request_id, index)
            self.end(request_id, index)
            self.seen["stopped"] += 1

    def end(self, request_id: str, index: int) -> None:
        del self.given[request_id, index]
        if not any(other == request_id for other, _ in self.given):
            del self.requests[request_id]

    def step(self, abort_choice: int | None = None) -> None:
        """Run one step; with `abort_choice`, abort a request while it runs."""
        num_preemptions, num_hits = self.scheduler.num_preemptions, self.scheduler.prefix_hit_tokens
        step = self.scheduler.schedule()
        if step is None:
            assert not self.requests, "requests wait, and nothing runs"
            return
        self.num_steps += 1
        self.seen["preempted"] += self.scheduler.num_preemptions - num_preemptions
        self.seen["hit"] += self.scheduler.prefix_hit_tokens - num_hits
        self.seen["copied"] += sum(len(copies) for copies in step.block_copies)
        self.check_step(step)
        output = self.run(step)
        if abort_choice is not None:
            self.abort(abort_choice)
        for new in self.scheduler.finish(step, output):
            self.check_output(new)

    def run(self, step: ScheduledStep) -> SamplerOutput:
        """Compute a step as a model would: copy blocks, write keys, look at them, sample."""
        size = self.setup.block_size
        for slots, copies in zip(self.slots, step.block_copies, strict=True):
            copied = {
                destination * size + offset: slots[source * size + offset]
                for source, destination in copies
                for offset in range(size)
                if source * size + offset in slots
            }
            assert len({destination for _, destination in copies}) == len(copies)
            slots.update(copied)
        for sequence, query_len in zip(step.sequences, step.query_lens, strict=True):
            self.write(sequence, query_len)
        for sequence, query_len in zip(step.sequences, step.query_lens, strict=True):
            self.look(sequence, query_len)
        tokens = [next_token(s.request, s.seed, s.token_ids) for s in step.sampled]
        return SamplerOutput(
            [0 if token is None else token for token in tokens],
            errors={index: "NaN" for index, token in enumerate(tokens) if token is None},
        )

    def prefixes_of(self, sequence: Sequence) -> list[int]:
        """Number each prefix of a sequence: equal numbers, equal tokens and salt."""
        before: object = sequence.request.cache_salt
        found = []
        for token in sequence.token_ids:
            before = self.prefixes.setdefault((before, token), len(self.prefixes))
            found.append(before)
        return found

    def write(self, sequence: Sequence, query_len: int) -> None:
        prefixes, size, start = (
            self.prefixes_of(sequence),
            self.setup.block_size,
            sequence.num_computed_tokens,
        )
        for pool, table, slots in zip(self.kv.pools, self.kv.tables, self.slots, strict=True):
            row = table[sequence.row].tolist()
            for position in range(start, start + query_len):
                block = row[position // size]
                assert block > 0, "a key is written to the null block"
                assert pool.holders[block] == 1, "a key is written to a block that others hold"
                assert pool.prefix[block] is None, "a key is written to a block that is findable"
                slots[block * size + position % size] = prefixes[position]

    def look(self, sequence: Sequence, query_len: int) -> None:
        prefixes, size, start = (
            self.prefixes_of(sequence),
            self.setup.block_size,
            sequence.num_computed_tokens,
        )
        for window, table, slots in zip(
            self.setup.windows, self.kv.tables, self.slots, strict=True
        ):
            row = table[sequence.row].tolist()
            first = 0 if window is None else max(0, start - window + 1)
            for position in range(first, start + query_len):
                slot = row[position // size] * size + position % size
                assert slots.get(slot) == prefixes[position], "a query sees another prefix"

    def check_step(self, step: ScheduledStep) -> None:
        setup, scheduler = self.setup, self.scheduler
        assert 0 < step.num_tokens <= setup.budget
        assert min(step.query_lens) >= 1
        assert len(step.sequences) == len(step.query_lens) <= setup.max_num_seqs
        assert len({id(sequence) for sequence in step.sequences}) == len(step.sequences)
        rows = {sequence.row for sequence in step.sequences}
        assert len(rows) == len(step.sequences)
        assert min(rows) >= 0
        assert 0 < scheduler.num_running <= setup.max_num_seqs
        wanted: list[tuple[int, str, int]] = []
        for index, (sequence, length) in enumerate(
            zip(step.sequences, step.query_lens, strict=True)
        ):
            end = sequence.num_computed_tokens + length
            assert end <= len(sequence.token_ids)
            assert length <= max(1, setup.chunk)
            if end == len(sequence.token_ids):
                request = sequence.request
                is_fresh = sequence.num_output_tokens == 0
                indices = range(request.sampling.n) if is_fresh else (sequence.index,)
                wanted += [(index, request.request_id, output) for output in indices]
        assert wanted == [
            (source, sequence.request.request_id, sequence.index)
            for source, sequence in zip(step.sample_sources, step.sampled, strict=True)
        ]
        running = [s for s in (*scheduler._decodes, *scheduler._prompts) if s.row >= 0]
        first = min(running, key=scheduler._rank)
        num_decodes = sum(sequence in scheduler._decodes for sequence in step.sequences)
        assert first in step.sequences or num_decodes == setup.budget, "the first must go on"

    def check_output(self, new: StepOutput) -> None:
        key = new.request_id, new.index
        request = self.requests[new.request_id]
        expected, reason = whole_output(request, new.index)
        given = self.given[key]
        if given:
            assert new.num_cached_tokens == 0
        else:
            assert new.num_cached_tokens % self.setup.block_size == 0
            assert new.num_cached_tokens < len(request.prompt_ids)
        assert new.prompt_logprobs is None
        given += new.token_ids
        assert given == expected[: len(given)]
        if new.finish_reason is None:
            assert len(new.token_ids) == 1
        else:
            assert (given, new.finish_reason) == (expected, reason)
            assert (new.error is not None) == (reason == "error")
            self.end(*key)
            self.seen[reason] += 1

    def check_blocks(self) -> None:
        """Every block is held, kept or free, once; holders and tables agree; no prefix leaks."""
        for group, (pool, table) in enumerate(zip(self.kv.pools, self.kv.tables, strict=True)):
            held = Counter(table[table > 0].tolist())
            assert pool.holders == [held[block] for block in range(pool.num_blocks + 1)]
            free, kept = pool.free_blocks(), pool.kept_blocks()
            assert sorted([*held, *free, *kept]) == list(range(1, pool.num_blocks + 1))
            assert pool.num_available == len(free) + len(kept)
            for block, node in enumerate(pool.prefix):
                assert node is None or node.blocks[group] == block
                assert (block not in kept) or node is not None
                assert (block not in free) or node is None
        self.check_prefixes()
        scheduler = self.scheduler
        assert scheduler.has_unfinished == bool(self.requests)
        assert self.kv.num_free_rows == self.setup.max_num_seqs - scheduler.num_running
        running = [*scheduler._decodes, *scheduler._prompts]
        used = {sequence.row for sequence in running}
        for table in self.kv.tables:
            assert set(np.flatnonzero(table.any(axis=1)).tolist()) <= used
        assert self.kv.rows_to_copy <= used
        for _, sequence in scheduler._waiting:
            assert (sequence.row, sequence.num_computed_tokens) == (-1, 0)
        open_outputs = scheduler.num_running + scheduler.num_waiting
        assert open_outputs <= len(self.given)

    def check_prefixes(self) -> None:
        cache = self.kv._prefixes
        if cache is None:
            return
        references = Counter(id(node.parent) for node in cache._nodes.values())
        references.update(id(tail) for tail in self.kv._tails if tail is not None)
        for node in (*cache._nodes.values(), *cache._roots.values()):
            assert node.references == references[id(node)]
            assert node.references or any(node.blocks)
            for group, block in enumerate(node.blocks):
                assert not block or self.kv.pools[group].prefix[block] is node

    def drain(self) -> None:
        """Run until every request has ended, and see that nothing is left behind."""
        most = 50 + 200 * len(self.given)
        while self.requests:
            self.step()
            self.check_blocks()
            most -= 1
            assert most > 0, "requests do not end"
        assert not self.given
        assert self.scheduler.schedule() is None
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert not any(table.any() for table in self.kv.tables)
        for pool in self.kv.pools:
            assert pool.num_available == pool.num_blocks


BASES = ((1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3), (2, 1) * 9)
PROMPTS = st.builds(
    lambda base, length, tail: BASES[base][:length] + tuple(tail),
    st.integers(0, 1),
    st.integers(0, 16),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
)
SAMPLING = st.builds(
    lambda n, min_tokens, extra, ignore_eos: SamplingParams(
        n=n,
        min_tokens=min_tokens,
        max_tokens=None if extra is None else max(1, min_tokens + extra),
        ignore_eos=ignore_eos,
        stop_token_ids=(STOP_ID,),
    ),
    n=st.integers(1, 3),
    min_tokens=st.sampled_from((0, 0, 2)),
    extra=st.one_of(st.none(), st.integers(0, 12)),
    ignore_eos=st.booleans(),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Hypothesis chooses what happens."""

    world: World

    @initialize(setup=SETUPS)
    def begin(self, setup: Setup) -> None:
        self.world = World(setup)

    @rule(
        prompt=PROMPTS,
        sampling=SAMPLING,
        priority=st.integers(-2, 2),
        cache_salt=st.sampled_from(("", "", "", "other")),
    )
    def add(
        self, prompt: tuple[int, ...], sampling: SamplingParams, priority: int, cache_salt: str
    ) -> None:
        self.world.add(prompt, sampling, priority=priority, cache_salt=cache_salt)

    @precondition(lambda self: self.world.requests)
    @rule()
    def step(self) -> None:
        self.world.step()

    @precondition(lambda self: self.world.requests)
    @rule(count=st.integers(2, 6))
    def run_for(self, count: int) -> None:
        for _ in range(count):
            self.world.step()
            self.world.check_blocks()

    @precondition(lambda self: self.world.requests)
    @rule(choice=st.integers(0, 20), is_running=st.booleans())
    def abort(self, choice: int, is_running: bool) -> None:
        if is_running:
            self.world.step(abort_choice=choice)
        else:
            self.world.abort(choice)

    @precondition(lambda self: self.world.requests)
    @rule(choice=st.integers(0, 20))
    def stop(self, choice: int) -> None:
        self.world.stop(choice)

    @rule(seconds=st.sampled_from((0.01, 1.0, 15.0)))
    def wait(self, seconds: float) -> None:
        self.world.now_s += seconds

    @invariant()
    def blocks_are_owned_once(self) -> None:
        self.world.check_blocks()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


def test_any_schedule_gives_the_models_tokens() -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def random_setup(rng: random.Random) -> Setup:
    return Setup(
        policy=rng.choice(POLICIES),
        windows=rng.choice(WINDOWS),
        block_size=rng.choice((1, 2, 3, 4, 8)),
        num_tokens=rng.randint(8, 44),
        max_num_seqs=rng.randint(1, 6),
        budget=rng.randint(1, 20),
        max_chunk=rng.choice((None, rng.randint(1, 9))),
        horizon=rng.choice((0, 0, 3, 16)),
        is_caching=rng.random() < 0.7,
        is_colliding=rng.random() < 0.2,
    )


def random_event(world: World, rng: random.Random) -> None:
    """Let one thing happen: mostly steps, and arrivals while there are not too many."""
    event = rng.random()
    if event < 0.2 and len(world.given) < 12:
        min_tokens = rng.choice((0, 0, 2))
        length, tail = rng.randint(0, 16), [rng.randint(1, 3) for _ in range(rng.randint(1, 4))]
        world.add(
            rng.choice(BASES)[:length] + tuple(tail),
            SamplingParams(
                n=rng.choice((1, 1, 2, 3)),
                min_tokens=min_tokens,
                max_tokens=rng.choice((None, max(1, min_tokens + rng.randint(0, 12)))),
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=(STOP_ID,),
            ),
            priority=rng.randint(-2, 2),
            cache_salt=rng.choice(("", "", "", "other")),
        )
    elif event < 0.22:
        world.abort(rng.randrange(100))
    elif event < 0.24:
        world.stop(rng.randrange(100))
    elif event < 0.26:
        world.now_s += rng.choice((0.01, 1.0, 15.0))
    else:
        world.step(rng.randrange(100) if event > 0.99 else None)


def run_at_random(num_steps: int, seed: int) -> Counter[str]:
    """Run worlds of 200 events until `num_steps` steps were made; return what happened."""
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    while seen["steps"] < num_steps:
        world = World(random_setup(rng))
        for _ in range(200):
            random_event(world, rng)
            world.check_blocks()
        world.drain()
        seen += world.seen
        seen["steps"] += world.num_steps
    return seen


def test_random_runs_meet_everything_that_is_to_be_tested() -> None:
    seen = run_at_random(5000, seed=1)

    for event in ("preempted", "hit", "copied", "refused", "aborted", "stopped", "error", "stop"):
        assert seen[event] > 20, f"{event}: only {seen[event]} in {seen['steps']} steps"


@pytest.mark.slow
def test_long_run() -> None:
    seen = run_at_random(LONG_RUN_STEPS, seed=2)

    assert seen["preempted"] > LONG_RUN_STEPS // 1000
