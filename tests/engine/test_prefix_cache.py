"""A prefix is found by its exact tokens after its exact parent, whatever the hashes say."""

from __future__ import annotations

from moe_serve.engine.prefix_cache import PrefixCache, PrefixNode


def extended(cache: PrefixCache, parent: PrefixNode, *tokens: int, block: int) -> PrefixNode:
    found = cache.extend(parent, tokens)
    assert found is not None
    found.blocks[0] = block
    return found


def test_the_same_tokens_after_another_prefix_are_another_node() -> None:
    cache = PrefixCache(1)
    root = cache.hold_root("")
    one = extended(cache, root, 1, block=1)
    two = extended(cache, root, 2, block=2)
    after_one = extended(cache, one, 3, block=3)

    assert cache.find(one, (3,)) is after_one
    assert cache.find(two, (3,)) is None
    assert extended(cache, two, 3, block=4) is not after_one


def test_salts_do_not_see_each_other() -> None:
    cache = PrefixCache(1)
    mine, yours = cache.hold_root("mine"), cache.hold_root("yours")
    extended(cache, mine, 1, 2, block=1)

    assert cache.root("mine") is mine
    assert cache.find(yours, (1, 2)) is None
    assert cache.root("nobody") is None


def test_a_hash_collision_finds_nothing_and_registers_nothing() -> None:
    cache = PrefixCache(1, hash_block=lambda parent_key, tokens: 7)
    root = cache.hold_root("")
    one = extended(cache, root, 1, block=1)

    assert cache.find(root, (2,)) is None  # other tokens
    assert cache.extend(root, (2,)) is None
    assert cache.find(one, (1,)) is None  # the same tokens after another parent
    assert cache.extend(one, (1,)) is None
    assert cache.find(root, (1,)) is one


def test_a_node_stays_while_a_block_or_a_child_needs_it() -> None:
    cache = PrefixCache(1)
    root = cache.hold_root("")
    head = extended(cache, root, 1, block=1)
    tail = extended(cache, head, 2, block=2)

    cache.evict(head, 0)
    assert cache.find(root, (1,)) is head  # no block, but a child
    cache.evict(tail, 0)
    assert cache.num_nodes == 0
    assert cache.root("") is root
    cache.drop(root)
    assert cache.root("") is None
