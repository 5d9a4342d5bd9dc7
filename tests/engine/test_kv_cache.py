"""Block tables: sharing, copies on write, windows, and prefixes that are found again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe_serve.engine.kv_cache import KVCacheManager
from moe_serve.engine.prefix_cache import hash_block
from moe_serve.engine.routing_log import RoutingLog
from moe_serve.engine.sequence import Sequence
from moe_serve.errors import ConfigError
from moe_serve.types import CacheGroup, CacheKind, Request, SamplingParams

FULL = CacheGroup("full", (0,), 4)


def sliding(window: int | None) -> CacheGroup:
    return CacheGroup("sliding", (1,), 4, window)


def manager(
    *groups: CacheGroup,
    num_blocks: int = 16,
    block_size: int = 4,
    is_caching: bool = True,
    hash_block: Callable[[int, tuple[int, ...]], int] = hash_block,
) -> KVCacheManager:
    groups = groups or (FULL,)
    return KVCacheManager(
        groups,
        (num_blocks,) * len(groups),
        block_size,
        max_num_seqs=4,
        max_model_len=64,
        enable_prefix_caching=is_caching,
        hash_block=hash_block,
    )


def waiting(prompt: range | tuple[int, ...], **fields: Any) -> Sequence:
    sampling = SamplingParams(prompt_logprobs=fields.pop("prompt_logprobs", None))
    return Sequence(Request(request_id="r", prompt_ids=tuple(prompt), sampling=sampling, **fields))


def start(kv: KVCacheManager, sequence: Sequence) -> int:
    """Admit a sequence with what the cache has of it; return how many tokens that is."""
    kv.admit(sequence, kv.find_prefix(sequence))
    return sequence.num_computed_tokens


def compute(kv: KVCacheManager, sequence: Sequence, num_tokens: int | None = None) -> bool:
    """Run the next `num_tokens` (default: all) of a sequence; False: there is no room."""
    left = len(sequence.token_ids) - sequence.num_computed_tokens
    size = left if num_tokens is None else num_tokens
    if not kv.extend(sequence, size):
        return False
    sequence.num_computed_tokens += size
    kv.register(sequence)
    return True


def hits(kv: KVCacheManager, prompt: range | tuple[int, ...], **fields: Any) -> int:
    """Return how many tokens of a prompt the cache has."""
    return len(kv.find_prefix(waiting(prompt, **fields))) * kv.block_size


def entries(kv: KVCacheManager, sequence: Sequence, group: int = 0) -> list[int]:
    table: list[int] = kv.tables[group][sequence.row].tolist()
    return table


@pytest.mark.parametrize("kind", ["mla_latent", "recurrent"])
def test_a_kind_that_is_not_served_is_refused_by_name(kind: CacheKind) -> None:
    with pytest.raises(ConfigError, match=f"cache group 1 is '{kind}', which is not served"):
        manager(FULL, CacheGroup(kind, (1,), 4))


@pytest.mark.parametrize("block_size", [0, 65])
def test_block_size_is_from_1_to_64(block_size: int) -> None:
    with pytest.raises(ConfigError, match=f"block_size is {block_size}; it must be from 1 to 64"):
        manager(block_size=block_size)


@pytest.mark.parametrize(
    ("groups", "num_blocks", "message"),
    [
        ((), (), "at least one group"),
        ((FULL,), (4, 4), "2 numbers of blocks for 1 cache groups"),
        ((FULL,), (0,), "cache group 0 has 0 blocks"),
        ((sliding(None),), (4,), "cache group 0 is sliding with window None"),
    ],
)
def test_groups_and_blocks_must_fit_together(
    groups: tuple[CacheGroup, ...], num_blocks: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        KVCacheManager(groups, num_blocks, 4, 4, 64, True)


def test_tables_hold_real_blocks_and_then_the_null_block() -> None:
    kv = manager()
    sequence = waiting(range(9))
    start(kv, sequence)
    assert compute(kv, sequence, 5)
    assert [block > 0 for block in entries(kv, sequence)] == [True, True] + [False] * 14
    assert compute(kv, sequence, 4)
    row = sequence.row
    assert len(set(entries(kv, sequence)[:3])) == 3

    kv.release(sequence)
    assert sequence.row == -1
    assert not kv.tables[0][row].any()


def test_extend_takes_all_that_it_needs_or_nothing() -> None:
    kv = manager(FULL, FULL, num_blocks=3)
    first, second = waiting(range(8)), waiting(range(20, 28))
    start(kv, first)
    start(kv, second)
    assert compute(kv, first)

    assert not kv.extend(second, 8)
    assert [pool.num_available for pool in kv.pools] == [1, 1]
    assert kv.extend(second, 4)
    assert kv.extend(second, 4)  # the same tokens again
    assert [pool.num_available for pool in kv.pools] == [0, 0]


def test_a_hit_leaves_a_token_to_compute() -> None:
    kv = manager()
    sequence = waiting(range(8))
    start(kv, sequence)
    compute(kv, sequence)

    assert hits(kv, range(8)) == 4
    assert hits(kv, range(9)) == 8
    assert hits(kv, range(20)) == 8
    assert hits(kv, (0, 1, 2, 9, 4, 5, 6, 7, 8)) == 0


def test_a_running_prefix_is_shared_and_read_by_both() -> None:
    kv = manager()
    first, second = waiting(range(9)), waiting((*range(8), 50))
    start(kv, first)
    compute(kv, first)

    assert start(kv, second) == 8
    assert entries(kv, second)[:2] == entries(kv, first)[:2]
    assert compute(kv, second)
    assert entries(kv, second)[2] != entries(kv, first)[2]


def test_blocks_filled_by_decode_are_found() -> None:
    kv = manager()
    sequence = waiting(range(6))
    start(kv, sequence)
    compute(kv, sequence)
    for token in (6, 7, 8):
        sequence.token_ids.append(token)
        assert compute(kv, sequence, 1)

    assert hits(kv, range(9)) == 8


def test_a_salt_hides_a_prefix_from_others() -> None:
    kv = manager()
    sequence = waiting(range(9), cache_salt="mine")
    start(kv, sequence)
    compute(kv, sequence)

    assert hits(kv, range(9)) == 0
    assert hits(kv, range(9), cache_salt="yours") == 0
    assert hits(kv, range(9), cache_salt="mine") == 8


def test_wanted_prompt_logprobs_are_not_read_from_the_cache() -> None:
    kv = manager()
    sequence = waiting(range(9))
    start(kv, sequence)
    compute(kv, sequence)

    assert hits(kv, range(9), prompt_logprobs=0) == 0
    again = waiting(range(9), prompt_logprobs=0)
    again.prompt_logprobs = [None] * 9  # all known: only its tokens are computed again
    assert len(kv.find_prefix(again)) == 2


def test_tokens_whose_experts_are_wanted_and_not_known_are_computed() -> None:
    kv = manager()
    sequence = waiting(range(13))
    start(kv, sequence)
    compute(kv, sequence)

    asking = waiting(range(13))
    asking.routing = RoutingLog()
    assert (kv.num_searched(asking), kv.find_prefix(asking)) == (0, [])
    asking.routing.new(0, np.zeros((7, 1, 1), np.int16))  # preempted within a block
    assert (kv.num_searched(asking), len(kv.find_prefix(asking))) == (7, 1)
    asking.routing.new(7, np.zeros((6, 1, 1), np.int16))
    assert (kv.num_searched(asking), len(kv.find_prefix(asking))) == (12, 3)


def test_without_prefix_caching_nothing_is_kept() -> None:
    kv = manager(is_caching=False)
    sequence = waiting(range(9))
    start(kv, sequence)
    compute(kv, sequence)
    kv.release(sequence)

    assert hits(kv, range(9)) == 0
    assert kv.pools[0].kept_blocks() == []


def test_prompts_whose_hashes_all_collide_share_nothing_that_differs() -> None:
    kv = manager(hash_block=lambda parent_key, tokens: 7)
    first, second = waiting(range(9)), waiting(range(20, 29))
    for sequence in (first, second):
        assert start(kv, sequence) == 0
        compute(kv, sequence)

    assert hits(kv, range(9)) == 4  # its second block has the key of the first
    assert hits(kv, range(20, 29)) == 0


def test_blocks_leave_least_recently_used_first_and_tails_before_heads() -> None:
    kv = manager(num_blocks=4)
    old, new = waiting(range(8)), waiting(range(20, 28))
    for sequence in (old, new):
        start(kv, sequence)
        compute(kv, sequence)
    kv.release(old)
    kv.release(new)
    other = waiting(range(40, 60))
    start(kv, other)

    found = []
    for _ in range(4):
        found.append((hits(kv, range(9)), hits(kv, range(20, 29))))
        compute(kv, other, 4)
    assert found == [(8, 8), (4, 8), (0, 8), (0, 4)]


def test_admission_counts_a_kept_hit_as_a_block_that_is_taken() -> None:
    kv = manager(num_blocks=3)
    sequence = waiting(range(9))
    start(kv, sequence)
    compute(kv, sequence)
    kv.release(sequence)
    again = waiting(range(12))
    prefix = kv.find_prefix(again)
    assert len(prefix) == 2

    assert kv.can_admit(again, prefix, (), 0, 12)
    assert not kv.can_admit(again, prefix, (), 1, 12)


def test_admission_leaves_what_running_prompts_still_lack() -> None:
    kv = manager(num_blocks=5)
    running, next_one = waiting(range(16)), waiting(range(20, 25))
    start(kv, running)
    compute(kv, running, 4)

    assert not kv.can_admit(next_one, [], (running,), 0, 16)  # 3 promised, 4 there, 2 lacking
    assert kv.can_admit(waiting(range(20, 24)), [], (running,), 0, 16)


@pytest.mark.parametrize("num_prompt", [6, 8])
def test_the_first_writers_of_a_shared_block_copy_it_and_the_last_does_not(num_prompt: int) -> None:
    kv = manager()
    parent = waiting(range(num_prompt))
    forks = [Sequence(parent.request, index) for index in (1, 2)]
    start(kv, parent)
    compute(kv, parent)
    shared = entries(kv, parent)
    for fork in forks:
        assert kv.fork(parent, fork)
        assert entries(kv, fork) == shared
    for sequence in (parent, *forks):
        sequence.token_ids.append(9)
        assert kv.extend(sequence, 1)

    copies = kv.take_copies()[0]
    tables = [entries(kv, sequence) for sequence in (parent, *forks)]
    if num_prompt == 8:  # a new block for each
        assert copies == []
        assert len({table[2] for table in tables}) == 3
    else:
        assert copies == [(shared[1], tables[0][1]), (shared[1], tables[1][1])]
        assert tables[2] == shared
    assert all(table[0] == shared[0] for table in tables)
    assert kv.take_copies() == ([],)


def test_a_copy_for_one_that_is_released_in_the_same_step_is_not_made() -> None:
    kv = manager()
    parent = waiting(range(6))
    fork = Sequence(parent.request, 1)
    start(kv, parent)
    compute(kv, parent)
    kv.fork(parent, fork)
    assert kv.extend(parent, 1)
    kv.release(parent)

    assert kv.extend(fork, 1)
    assert kv.take_copies() == ([],)


def test_a_fork_needs_a_free_row() -> None:
    kv = manager()
    parent = waiting(range(4))
    start(kv, parent)
    compute(kv, parent)
    forks = [Sequence(parent.request, index) for index in range(1, 5)]

    assert [kv.fork(parent, fork) for fork in forks] == [True, True, True, False]
    assert forks[3].row == -1


@pytest.mark.parametrize("window", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_window_gives_back_what_no_later_query_sees(window: int, chunk: int) -> None:
    kv = manager(FULL, sliding(window), is_caching=False)
    sequence = waiting(range(48))
    start(kv, sequence)
    most = 0
    for begin in range(0, 48, chunk):
        assert compute(kv, sequence, chunk)
        table = entries(kv, sequence, group=1)
        seen = range(max(0, begin - window + 1) // 4, (begin + chunk - 1) // 4 + 1)
        assert [index for index, block in enumerate(table) if block] == list(seen)
        most = max(most, len(seen))
    assert most <= kv.most_blocks(1, 48, chunk) <= most + 1
    assert kv.most_blocks(0, 48, chunk) == 12
    assert sum(block > 0 for block in entries(kv, sequence)) == 12


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_most_blocks_is_what_some_alignment_needs(block_size: int) -> None:
    for window in range(1, 10):
        kv = manager(sliding(window), block_size=block_size)
        for chunk in range(1, 10):
            spans = [
                (position + chunk - 1) // block_size - (position - window + 1) // block_size + 1
                for position in range(20, 20 + block_size)
            ]
            most = kv.most_blocks(0, 64, chunk)
            assert max(spans) <= most <= max(spans) + 1
            assert kv.most_blocks(0, 1, chunk) == 1


def test_a_hit_needs_of_a_sliding_group_only_what_its_window_sees() -> None:
    kv = manager(FULL, sliding(4))
    sequence = waiting(range(17))
    start(kv, sequence)
    for _ in range(4):
        compute(kv, sequence, 4)
    compute(kv, sequence)
    kv.release(sequence)
    assert hits(kv, range(17)) == 16
    later = kv.pools[1]
    for _ in range(len(later.free_blocks()) + 3):
        later.allocate()  # takes the blocks that left the window first

    assert hits(kv, range(17)) == 16
    again = waiting(range(17))
    assert start(kv, again) == 16
    assert [index for index, block in enumerate(entries(kv, again, 1)) if block] == [3]
    assert [index for index, block in enumerate(entries(kv, again, 0)) if block] == [0, 1, 2, 3]


def test_without_the_windows_blocks_a_shorter_prefix_is_the_hit() -> None:
    kv = manager(FULL, sliding(4))
    short, long = waiting(range(9)), waiting(range(17))
    for sequence in (short, long):
        start(kv, sequence)
        compute(kv, sequence)
    kv.release(long)  # its tail leaves first
    while kv.pools[1].free_blocks():
        kv.pools[1].allocate()
    kv.pools[1].allocate()

    assert hits(kv, range(17)) == 12
    kv.pools[1].allocate()
    assert hits(kv, range(17)) == 8  # held by the short one
