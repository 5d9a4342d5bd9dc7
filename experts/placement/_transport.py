"""The best way to fill ranks, exactly: experts to ranks with so much room each.

From a start, chains of moves from rank to rank are followed for as long as one gains; where none
does, nothing better exists (Klein 1967, of flows). The cheapest move between two ranks is kept in a
small table, so that a chain is looked for among as many nodes as there are ranks. Engine-side code
has no solver of others at hand (scipy is a study's).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_serve.experts.placement.base import Array


def assign(gain: Array, room: Sequence[int], start: Array | None = None) -> Array:
    """Return the rank of each expert, int64 [num_experts], with the highest sum of gains.

    gain: float64 [num_experts, num_ranks]; room: sums to at least num_experts. start: owners to
    begin at, which fit; the nearer to the best, the sooner it is found.
    """
    num_experts = len(gain)
    if not num_experts:
        return np.zeros(0, np.int64)
    assert sum(room) >= num_experts, (sum(room), num_experts)
    owners = _greedy(gain, room) if start is None else start.copy()
    moves = _Moves(gain, owners, room)
    tolerance = 1e-9 * max(1.0, float(np.abs(gain).max()))
    for _ in range(50 * num_experts):  # each gains; this many are not needed
        swap = moves.best_swap(tolerance)
        cycle = swap if swap is not None else moves.cycle(tolerance)
        if cycle is None:
            break
        moves.follow(cycle)
    return moves.owners


class _Moves:
    """The cheapest move from each rank to each other one, kept up to date.

    The last node stands for room: a move there costs nothing from where there is some, and one from
    there is that a rank has one expert less.
    """

    def __init__(self, gain: Array, owners: Array, room: Sequence[int]) -> None:
        self.owners = owners
        self._gain = gain
        self._num_ranks = num_ranks = gain.shape[1]
        self._left = np.array(room) - np.bincount(owners, minlength=num_ranks)
        assert (self._left >= 0).all(), "the start does not fit"
        self._cost = np.full((num_ranks + 1, num_ranks + 1), np.inf)
        self._mover = np.full((num_ranks, num_ranks), -1, np.int64)
        self._cost[num_ranks, :num_ranks] = 0.0
        for rank in range(num_ranks):
            self._refresh(rank)

    def best_swap(self, tolerance: float) -> list[int] | None:
        """Return two nodes between which there and back gains most, or None."""
        both = self._cost + self._cost.T
        first, second = divmod(int(both.argmin()), len(both))
        return [first, second] if both[first, second] < -tolerance else None

    def cycle(self, tolerance: float) -> list[int] | None:
        """Return nodes, each to move to the next and the last to the first, that gain, or None."""
        size = len(self._cost)
        distance = np.zeros(size)
        before = np.full(size, -1, np.int64)
        last = -1
        for _ in range(size + 1):  # Bellman-Ford: still better after `size` rounds is a cycle
            through = distance[:, None] + self._cost
            origin = through.argmin(axis=0)
            reached = through[origin, np.arange(size)]
            is_better = reached < distance - tolerance
            if not is_better.any():
                return None
            before[is_better] = origin[is_better]
            distance[is_better] = reached[is_better]
            last = int(np.flatnonzero(is_better)[0])
        for _ in range(size):
            last = int(before[last])
        nodes = [last]
        while (node := int(before[nodes[-1]])) != last:
            nodes.append(node)
        return nodes[::-1]

    def follow(self, nodes: list[int]) -> None:
        """Make the moves of a cycle."""
        hops = list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
        movers = [
            (int(self._mover[origin, target]), target)
            for origin, target in hops
            if self._num_ranks not in (origin, target)
        ]
        for expert, target in movers:
            self.owners[expert] = target
        for origin, target in hops:
            if target == self._num_ranks:
                self._left[origin] -= 1
            elif origin == self._num_ranks:
                self._left[target] += 1
        for node in nodes:
            if node < self._num_ranks:
                self._refresh(node)

    def _refresh(self, rank: int) -> None:
        members = np.flatnonzero(self.owners == rank)
        row = self._cost[rank]
        if len(members):
            loss = self._gain[members, rank][:, None] - self._gain[members]
            best = loss.argmin(axis=0)
            row[:-1] = loss[best, np.arange(self._num_ranks)]
            self._mover[rank] = members[best]
        else:
            row[:-1] = np.inf
        row[rank] = np.inf
        row[-1] = 0.0 if self._left[rank] > 0 else np.inf


def _greedy(gain: Array, room: Sequence[int]) -> Array:
    """Give each expert its best rank with room, those that would lose most first."""
    left = np.array(room)
    owners = np.empty(len(gain), np.int64)
    ordered = np.sort(gain, axis=1)
    regret = ordered[:, -1] - ordered[:, -2] if gain.shape[1] > 1 else ordered[:, -1]
    for expert in np.argsort(-regret, kind="stable").tolist():
        rank = int(np.where(left > 0, gain[expert], -np.inf).argmax())
        owners[expert] = rank
        left[rank] -= 1
    return owners
