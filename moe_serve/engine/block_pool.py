"""One cache group's blocks: who holds each, and which is given away next.

A block is held (by one or more tables), kept (held by nobody, but still findable by its prefix) or
free. What a prefix is, is the business of `prefix_cache.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from moe_serve.engine.prefix_cache import PrefixNode


class BlockPool:
    """Reference-counted block ids 1 .. num_blocks; 0 is the null block, which nobody is given.

    on_evict is called with the prefix that a kept block held when the block is given away.
    holders: how many tables hold each block [num_blocks + 1]. prefix: what each block is findable
    by, or None [num_blocks + 1].
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[PrefixNode], None]) -> None:
        self.num_blocks = num_blocks
        self.holders = [0] * (num_blocks + 1)
        self.prefix: list[PrefixNode | None] = [None] * (num_blocks + 1)
        self._on_evict = on_evict
        self._free = list(range(num_blocks, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """How many blocks hold nothing."""
        return len(self._free)

    @property
    def num_kept(self) -> int:
        """How many blocks are held by nobody and can still be found."""
        return len(self._kept)

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can give now: free and kept."""
        return len(self._free) + len(self._kept)

    def allocate(self) -> int:
        """Give a block to one holder; when none is free, the one kept longest loses its prefix."""
        if self._free:
            block = self._free.pop()
        else:
            assert self._kept, "allocate() of an exhausted pool; look at num_available first"
            block, _ = self._kept.popitem(last=False)
            node = self.prefix[block]
            assert node is not None
            self.prefix[block] = None
            self._on_evict(node)
        self.holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a holder to a block that is held or kept."""
        if self.holders[block] == 0:
            del self._kept[block]
        self.holders[block] += 1

    def release(self, block: int) -> None:
        """Take one holder away; without any, a block that has a prefix is kept, else it is free."""
        assert self.holders[block] > 0, f"block {block} released, and nobody holds it"
        self.holders[block] -= 1
        if self.holders[block] == 0:
            if self.prefix[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = None

    def free_blocks(self) -> list[int]:
        """List the blocks that hold nothing."""
        return list(self._free)

    def kept_blocks(self) -> list[int]:
        """List the blocks held by nobody and still findable, the next to be given away first."""
        return list(self._kept)
