"""Blocks are held, kept or free, and leave in the order of their last use."""

from __future__ import annotations

import pytest

from moe_serve.engine.block_pool import BlockPool
from moe_serve.engine.prefix_cache import PrefixNode


def node(name: int) -> PrefixNode:
    return PrefixNode(name, None, (name,), 1, "")


def test_every_block_but_the_null_block_is_given_once() -> None:
    pool = BlockPool(4, lambda node: None)

    assert sorted(pool.allocate() for _ in range(4)) == [1, 2, 3, 4]
    assert pool.num_available == 0
    with pytest.raises(AssertionError, match="exhausted"):
        pool.allocate()


def test_a_block_is_free_only_when_its_last_holder_releases_it() -> None:
    pool = BlockPool(1, lambda node: None)
    block = pool.allocate()
    pool.share(block)

    pool.release(block)
    assert (pool.num_available, pool.free_blocks()) == (0, [])
    assert (pool.num_free, pool.num_kept) == (0, 0)
    pool.release(block)
    assert pool.free_blocks() == [block]
    assert (pool.num_free, pool.num_kept) == (1, 0)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.release(block)


def test_kept_blocks_leave_least_recently_used_first_and_free_ones_before() -> None:
    evicted: list[int] = []
    pool = BlockPool(4, lambda node: evicted.append(node.key))
    first, second, third = (pool.allocate() for _ in range(3))
    for name, block in enumerate((first, second, third)):
        pool.prefix[block] = node(name)
        pool.release(block)
    pool.share(first)  # used again: now the most recent
    pool.release(first)

    assert pool.kept_blocks() == [second, third, first]
    free = pool.allocate()
    assert free not in (first, second, third)
    assert [pool.allocate() for _ in range(3)] == [second, third, first]
    assert evicted == [1, 2, 0]
    assert pool.prefix == [None] * 5
