"""Takes another placement over while the engine serves: some experts a step, on all ranks alike.

Layer by layer: a layer's experts travel, each as one checksummed record, and once all are there the
layer is placed anew on all ranks, between two steps. So no token ever sees half of a placement, and
a rank holds hardly more than its share. (That moves must be whole, bounded and seen by all at once
is what others' reports of wrong text after rebalancing teach: research of this field, EPLB.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_serve.comm._layout import Layout
from moe_serve.comm._world import World
from moe_serve.experts.placement.base import Placement
from moe_serve.experts.rank_experts import RankExperts


@dataclass(frozen=True, slots=True)
class Move:
    """One expert's record, from one rank to another that is to hold it."""

    expert: int
    source: int
    target: int


def moves_of(
    old: Sequence[Sequence[int]], new: Sequence[Sequence[int]], ranks_per_node: int
) -> list[Move]:
    """Return what must travel for one layer, the same on all ranks.

    old, new: the ranks of each expert, rising. A record comes from the target's own node where it
    can; of several sources, they take turns.
    """
    moves = []
    for expert, (before, after) in enumerate(zip(old, new, strict=True)):
        for target in after:
            if target in before:
                continue
            node = target // ranks_per_node
            near = [rank for rank in before if rank // ranks_per_node == node] or list(before)
            moves.append(Move(expert, near[expert % len(near)], target))
    return moves


class Mover:
    """From the placement that is to another one. `advance` must be called on all ranks at once."""

    def __init__(
        self,
        world: World,
        layout: Layout,
        experts: RankExperts,
        old: Placement,
        new: Placement,
    ) -> None:
        self.new = new
        self._world = world
        self._layout = layout
        self._experts = experts
        self._ranks_per_node = old.mesh.ranks_per_node
        self._left = [
            (layer, old.ranks[index], new.ranks[index])
            for index, layer in enumerate(layout.layers)
            if old.ranks[index] != new.ranks[index]
        ]
        self._moves: list[Move] | None = None  # of the first of these layers, what has not come

    @property
    def is_done(self) -> bool:
        return not self._left

    def advance(self, most_bytes: int) -> tuple[int, int]:
        """Let records of `most_bytes` travel, one at least; return how many did, and their bytes.

        Of all ranks together. 0: nothing happens. Raises CommError.
        """
        left = most_bytes
        num_moved = 0
        while self._left and left > 0:
            layer, old, new = self._left[0]
            if self._moves is None:
                self._moves = (
                    moves_of(old, new, self._ranks_per_node)
                    if self._experts.is_moving_records
                    else []
                )
            size = self._experts.message_bytes(layer)
            count = max(1, left // size) if left == most_bytes else left // size
            now, self._moves = self._moves[:count], self._moves[count:]
            if now:
                self._travel(layer, now)
                left -= len(now) * size
                num_moved += len(now)
            elif self._moves:
                break
            if not self._moves:
                held = [expert for expert, ranks in enumerate(new) if self._world.rank in ranks]
                self._experts.take_over(layer, held)
                self._layout.place(layer, new)
                self._left.pop(0)
                self._moves = None
        return num_moved, most_bytes - left

    def _travel(self, layer: int, moves: Sequence[Move]) -> None:
        rank, ranks = self._world.rank, range(self._world.size)
        sent = [[m.expert for m in moves if (m.source, m.target) == (rank, to)] for to in ranks]
        came = [[m.expert for m in moves if (m.source, m.target) == (of, rank)] for of in ranks]
        rows = self._experts.packed(layer, [expert for some in sent for expert in some])
        rows = self._world.exchange(rows, [len(some) for some in sent], [len(c) for c in came])
        self._experts.receive(layer, [expert for some in came for expert in some], rows)
