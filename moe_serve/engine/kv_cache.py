"""Which blocks hold a running sequence's keys and values: rows of block tables, sharing, windows.

Owns the tables that the model reads, one per cache group, and serves all groups of a sequence as
one. Knows nothing of steps, budgets or who deserves to run: that is `scheduler.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from moe_serve.engine.block_pool import BlockPool
from moe_serve.engine.prefix_cache import PrefixCache, PrefixNode, hash_block
from moe_serve.engine.sequence import Sequence as RunningSequence
from moe_serve.errors import ConfigError
from moe_serve.types import CacheGroup


class KVCacheManager:
    """Block tables of the running sequences, for all cache groups of a model.

    groups, num_blocks: the model's cache groups and how many usable blocks each has; ids are 1 ..
        num_blocks. Block 0 is the null block, always zeros: every unused table entry is 0.
    block_size: tokens in a block, 1 to 64.
    tables: per group, int32 [max_num_seqs, max_blocks]; a sequence's row is `Sequence.row`.
    pools: per group, who holds each block.
    rows_to_copy: rows whose last block may be shared with another row: `extend` must be called
        for them before they write.
    num_changes: grows when blocks are given back or become findable: who was refused may fit.
    """

    def __init__(
        self,
        groups: tuple[CacheGroup, ...],
        num_blocks: tuple[int, ...],
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        enable_prefix_caching: bool,
        *,
        hash_block: Callable[[int, tuple[int, ...]], int] = hash_block,
    ) -> None:
        _check(groups, num_blocks, block_size)
        self.groups = groups
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.rows_to_copy: set[int] = set()
        self.num_changes = 0
        max_blocks = self.num_blocks_of(max_model_len)
        self.tables: tuple[npt.NDArray[np.int32], ...] = tuple(
            np.zeros((max_num_seqs, max_blocks), np.int32) for _ in groups
        )
        self._prefixes = PrefixCache(len(groups), hash_block) if enable_prefix_caching else None
        self.pools = tuple(
            BlockPool(count, partial(self._forget, group)) for group, count in enumerate(num_blocks)
        )
        self._windows = tuple(
            (group, spec.window)
            for group, spec in enumerate(groups)
            if spec.kind == "sliding" and spec.window is not None
        )
        self._full = tuple(group for group, spec in enumerate(groups) if spec.kind == "full")
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._num_entries = [0] * max_num_seqs
        self._first_entry = tuple([0] * max_num_seqs for _ in groups)  # [group][row]
        self._tails: list[PrefixNode | None] = [None] * max_num_seqs
        self._num_registered = [0] * max_num_seqs
        self._copies: list[tuple[int, int, int, int]] = []  # row, group, source, destination

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def num_blocks_of(self, num_tokens: int) -> int:
        """Return how many blocks hold the first `num_tokens` tokens of a sequence."""
        return -(-num_tokens // self.block_size)

    def most_blocks(self, group: int, num_tokens: int, max_chunk: int) -> int:
        """Return the most blocks of `group` that one sequence of `num_tokens` holds at any time.

        max_chunk: the most tokens that it computes in one step.
        """
        needed = self.num_blocks_of(num_tokens)
        window = self.groups[group].window
        if self.groups[group].kind == "full" or window is None:
            return needed
        return min(needed, self.num_blocks_of(window - 1 + max_chunk) + 1)

    def num_searched(self, sequence: RunningSequence) -> int:
        """Return how many of a waiting sequence's first tokens may be found in the cache.

        All but one, which is left to compute. None while the logprobs of the prompt are still
        wanted, which need every token computed. Where the tokens' experts are wanted, only those
        whose experts are known already: others' blocks do not tell theirs.
        """
        if self._prefixes is None:
            return 0
        wants_prompt = sequence.request.sampling.prompt_logprobs is not None and sequence.index == 0
        if wants_prompt and len(sequence.prompt_logprobs) < sequence.num_prompt_tokens:
            return 0
        most = len(sequence.token_ids) - 1
        return most if sequence.routing is None else min(most, sequence.routing.num_tokens)

    def find_prefix(self, sequence: RunningSequence) -> list[PrefixNode]:
        """Return the longest cached prefix of a waiting sequence, block by block; changes nothing.

        Of `num_searched` tokens at most. Full groups must have all of its blocks, sliding ones
        those that a query after it can see.
        """
        num_searched = self.num_searched(sequence)
        if self._prefixes is None or not num_searched:
            return []
        node = self._prefixes.root(sequence.request.cache_salt)
        tokens, size = sequence.token_ids, self.block_size
        chain: list[PrefixNode] = []
        for start in range(0, num_searched - size + 1, size):
            if node is None:
                break
            node = self._prefixes.find(node, tuple(tokens[start : start + size]))
            if node is None or not all(node.blocks[group] for group in self._full):
                break
            chain.append(node)
        while chain and not self._has_windows(chain):
            chain.pop()
        return chain

    def _has_windows(self, chain: list[PrefixNode]) -> bool:
        """Say whether each sliding group has what a query just after `chain` can see of it."""
        for group, window in self._windows:
            first = self._first_seen(window, len(chain) * self.block_size)
            for index in range(len(chain) - 1, first - 1, -1):
                if not chain[index].blocks[group]:
                    return False
        return True

    def _first_seen(self, window: int, position: int) -> int:
        """Return the index of the first block that queries from `position` on can see."""
        return max(0, position - window + 1) // self.block_size

    def can_admit(
        self,
        sequence: RunningSequence,
        prefix: list[PrefixNode],
        running: Iterable[RunningSequence],
        spare: int,
        max_chunk: int,
    ) -> bool:
        """Say whether all known tokens of a waiting sequence fit beside what is promised.

        Promised are the blocks that the `running` prompts still lack, and `spare` of each group.
        """
        promised = [spare] * len(self.groups)
        for other in running:
            start = other.num_computed_tokens
            for group in range(len(self.groups)):
                held = self._num_entries[other.row] - self._first_entry[group][other.row]
                promised[group] += self._lacking(group, other, start, held, max_chunk)
        start = len(prefix) * self.block_size
        for group, pool in enumerate(self.pools):
            first = self._first_kept(group, start)
            hits = [node.blocks[group] for node in prefix[first:]]
            num_kept = sum(pool.holders[block] == 0 for block in hits)
            lacking = self._lacking(group, sequence, start, len(hits), max_chunk)
            if pool.num_available - num_kept < promised[group] + lacking:
                return False
        return True

    def _first_kept(self, group: int, start: int) -> int:
        window = self.groups[group].window
        if self.groups[group].kind == "full" or window is None:
            return 0
        return self._first_seen(window, start)

    def _lacking(
        self, group: int, sequence: RunningSequence, start: int, num_held: int, max_chunk: int
    ) -> int:
        """Return how many more blocks a prompt of which `start` tokens are computed will hold."""
        num_tokens = len(sequence.token_ids)
        left = self.num_blocks_of(num_tokens) - self.num_blocks_of(start)
        most = self.most_blocks(group, num_tokens, max_chunk)
        return max(0, min(left, most - num_held))

    def admit(self, sequence: RunningSequence, prefix: list[PrefixNode]) -> None:
        """Give a waiting sequence a row, and the blocks of a prefix found in this step."""
        row = self._take_row(sequence)
        num_hits = len(prefix)
        sequence.num_computed_tokens = num_hits * self.block_size
        self._num_entries[row] = num_hits
        for group, pool in enumerate(self.pools):
            first = self._first_kept(group, sequence.num_computed_tokens)
            self._first_entry[group][row] = first
            blocks = [node.blocks[group] for node in prefix[first:]]
            for block in blocks:
                pool.share(block)
            self.tables[group][row, first:num_hits] = blocks
        self._num_registered[row] = num_hits
        if self._prefixes is None:
            return
        if prefix:
            prefix[-1].references += 1
            self._tails[row] = prefix[-1]
        else:
            self._tails[row] = self._prefixes.hold_root(sequence.request.cache_salt)

    def _take_row(self, sequence: RunningSequence) -> int:
        assert sequence.row < 0, f"{sequence.request.request_id} has row {sequence.row} already"
        sequence.row = row = self._free_rows.pop()
        return row

    def extend(self, sequence: RunningSequence, num_tokens: int) -> bool:
        """Make room for the next `num_tokens` of a running sequence; False: there is not enough.

        Gives back the blocks that its windows have left. The block that it writes first is copied
        if others hold it too (`take_copies`). Calling it again for the same tokens changes nothing.
        """
        row, start = sequence.row, sequence.num_computed_tokens
        for group, window in self._windows:
            self._leave(group, row, self._first_seen(window, start))
        have = self._num_entries[row]
        needed = (start + num_tokens - 1) // self.block_size + 1
        shared = self._shared_groups(row, start, have) if row in self.rows_to_copy else ()
        for group, pool in enumerate(self.pools):
            if pool.num_available < needed - have + (group in shared):
                return False
        for group in shared:
            self._copy(group, row, start // self.block_size)
        self.rows_to_copy.discard(row)
        if needed > have:
            self._num_entries[row] = needed
            for pool, table in zip(self.pools, self.tables, strict=True):
                for index in range(have, needed):
                    table[row, index] = pool.allocate()
        return True

    def _shared_groups(self, row: int, start: int, have: int) -> tuple[int, ...]:
        index = start // self.block_size
        if index >= have:
            return ()
        return tuple(
            group
            for group, pool in enumerate(self.pools)
            if pool.holders[int(self.tables[group][row, index])] > 1
        )

    def _copy(self, group: int, row: int, index: int) -> None:
        pool, table = self.pools[group], self.tables[group]
        source, destination = int(table[row, index]), pool.allocate()
        pool.release(source)
        table[row, index] = destination
        self._copies.append((row, group, source, destination))

    def _leave(self, group: int, row: int, first: int) -> None:
        """Give back the blocks before index `first`: no query to come can see them."""
        begin = self._first_entry[group][row]
        if first <= begin:
            return
        table = self.tables[group]
        for block in table[row, begin:first].tolist():
            self.pools[group].release(block)
        table[row, begin:first] = 0
        self._first_entry[group][row] = first
        self.num_changes += 1

    def take_copies(self) -> tuple[list[tuple[int, int]], ...]:
        """Return, per group, the (source, destination) blocks to copy before this step runs."""
        copies: tuple[list[tuple[int, int]], ...] = tuple([] for _ in self.groups)
        for _, group, source, destination in self._copies:
            copies[group].append((source, destination))
        self._copies.clear()
        return copies

    def register(self, sequence: RunningSequence) -> None:
        """Make a sequence's full, computed blocks findable by other prompts."""
        row = sequence.row
        node = self._tails[row]
        if self._prefixes is None or node is None:
            return
        size = self.block_size
        first, last = self._num_registered[row], sequence.num_computed_tokens // size
        for index in range(first, last):
            tokens = tuple(sequence.token_ids[index * size : (index + 1) * size])
            child = self._prefixes.extend(node, tokens)
            if child is None:  # another prefix has this key: this chain ends here
                self._prefixes.drop(node)
                self._tails[row] = None
                return
            child.references += 1
            for group, pool in enumerate(self.pools):
                block = int(self.tables[group][row, index])
                if block and not child.blocks[group]:
                    child.blocks[group] = block
                    pool.prefix[block] = child
            self._prefixes.drop(node)
            self._tails[row] = node = child
        self._num_registered[row] = max(first, last)
        self.num_changes += last > first

    def fork(self, parent: RunningSequence, child: RunningSequence) -> bool:
        """Give `child` a row that shares every block of `parent`; False: there is no free row."""
        if not self._free_rows:
            return False
        source, row = parent.row, self._take_row(child)
        count = self._num_entries[row] = self._num_entries[source]
        for group, (pool, table) in enumerate(zip(self.pools, self.tables, strict=True)):
            first = self._first_entry[group][row] = self._first_entry[group][source]
            table[row, :count] = table[source, :count]
            for block in table[row, first:count].tolist():
                pool.share(block)
        child.num_computed_tokens = parent.num_computed_tokens
        self._num_registered[row] = self._num_registered[source]
        tail = self._tails[row] = self._tails[source]
        if tail is not None:
            tail.references += 1
        if parent.num_computed_tokens % self.block_size:
            self.rows_to_copy.update((source, row))
        return True

    def release(self, sequence: RunningSequence) -> None:
        """Take a sequence's row and blocks away; its full blocks stay findable until given away."""
        row, count = sequence.row, self._num_entries[sequence.row]
        for group, (pool, table) in enumerate(zip(self.pools, self.tables, strict=True)):
            first = self._first_entry[group][row]
            for block in reversed(table[row, first:count].tolist()):  # a chain's tail leaves first
                pool.release(block)
            table[row, :count] = 0
        self._num_entries[row] = self._num_registered[row] = 0
        tail = self._tails[row]
        if tail is not None and self._prefixes is not None:
            self._tails[row] = None
            self._prefixes.drop(tail)
        if self._copies:
            self._copies = [copy for copy in self._copies if copy[0] != row]
        self.rows_to_copy.discard(row)
        self._free_rows.append(row)
        sequence.row = -1
        self.num_changes += 1

    def _forget(self, group: int, node: PrefixNode) -> None:
        assert self._prefixes is not None
        self._prefixes.evict(node, group)


def _check(groups: Sequence[CacheGroup], num_blocks: Sequence[int], block_size: int) -> None:
    if not 1 <= block_size <= 64:
        raise ConfigError(f"block_size is {block_size}; it must be from 1 to 64")
    if not groups or len(groups) != len(num_blocks):
        raise ConfigError(
            f"{len(num_blocks)} numbers of blocks for {len(groups)} cache groups; "
            "give one for each of at least one group"
        )
    for index, (group, count) in enumerate(zip(groups, num_blocks, strict=True)):
        if group.kind not in ("full", "sliding"):
            raise ConfigError(
                f"cache group {index} is {group.kind!r}, which is not served yet; "
                "use a model whose layers are all full or sliding-window attention"
            )
        if group.kind == "sliding" and (group.window is None or group.window < 1):
            raise ConfigError(
                f"cache group {index} is sliding with window {group.window}; it must be at least 1"
            )
        if count < 1:
            raise ConfigError(f"cache group {index} has {count} blocks; it must have at least 1")
