"""Which blocks hold the keys and values of which prefix: chains of block hashes, checked exactly.

A chain belongs to tokens, not to cache groups: one node stands for one full block of tokens after
one exact prefix under one salt, and names the block that holds it in each group (0: none).
"""

from __future__ import annotations

from collections.abc import Callable


def hash_block(parent_key: int, tokens: tuple[int, ...]) -> int:
    """Return the key of a block of tokens after the prefix whose key is `parent_key`."""
    return hash((parent_key, tokens))


class PrefixNode:
    """One block of tokens after its parent's prefix.

    blocks: per group, the block that holds it, or 0. references: its children, and the sequences
    whose last registered block it is; a node goes when it has neither references nor blocks.
    """

    __slots__ = ("blocks", "key", "parent", "references", "salt", "tokens")

    def __init__(
        self,
        key: int,
        parent: PrefixNode | None,
        tokens: tuple[int, ...],
        num_groups: int,
        salt: str,
    ) -> None:
        self.key = key
        self.parent = parent
        self.tokens = tokens
        self.blocks = [0] * num_groups
        self.references = 0
        self.salt = salt


class PrefixCache:
    """All nodes, by key. A key only finds a candidate: tokens and parent decide.

    Two prefixes of one key cannot both be here: the later is not registered, which costs hits and
    never text.
    """

    def __init__(
        self,
        num_groups: int,
        hash_block: Callable[[int, tuple[int, ...]], int] = hash_block,
    ) -> None:
        self._num_groups = num_groups
        self._hash_block = hash_block
        self._roots: dict[str, PrefixNode] = {}
        self._nodes: dict[int, PrefixNode] = {}

    @property
    def num_nodes(self) -> int:
        return len(self._nodes)

    def root(self, salt: str) -> PrefixNode | None:
        """Return the empty prefix under `salt`, or None when nothing is registered there."""
        return self._roots.get(salt)

    def hold_root(self, salt: str) -> PrefixNode:
        """Return the empty prefix under `salt`, made if need be, with one more reference."""
        node = self._roots.get(salt)
        if node is None:
            node = PrefixNode(hash(salt), None, (), self._num_groups, salt)
            self._roots[salt] = node
        node.references += 1
        return node

    def find(self, parent: PrefixNode, tokens: tuple[int, ...]) -> PrefixNode | None:
        """Return the node of exactly these tokens after exactly this parent, or None."""
        node = self._nodes.get(self._hash_block(parent.key, tokens))
        if node is None or node.parent is not parent or node.tokens != tokens:
            return None
        return node

    def extend(self, parent: PrefixNode, tokens: tuple[int, ...]) -> PrefixNode | None:
        """Return the node of these tokens after `parent`, made if need be; None: its key is taken.

        The caller gives the node a block or a reference.
        """
        key = self._hash_block(parent.key, tokens)
        node = self._nodes.get(key)
        if node is None:
            node = PrefixNode(key, parent, tokens, self._num_groups, parent.salt)
            self._nodes[key] = node
            parent.references += 1
            return node
        return node if node.parent is parent and node.tokens == tokens else None

    def drop(self, node: PrefixNode) -> None:
        """Take one reference away."""
        node.references -= 1
        self._prune(node)

    def evict(self, node: PrefixNode, group: int) -> None:
        """Forget the block that holds `node` in `group`."""
        node.blocks[group] = 0
        self._prune(node)

    def _prune(self, node: PrefixNode) -> None:
        while not node.references and not any(node.blocks):
            parent = node.parent
            if parent is None:
                del self._roots[node.salt]
                return
            del self._nodes[node.key]
            parent.references -= 1
            node = parent
