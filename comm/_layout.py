"""Where each expert is, as dispatchers look it up: ranks and local slots, by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Layout:
    """A placement as seen from one rank.

    A local slot is an expert's number among those that its rank holds of a layer, in rising order.
    Of replicas a token takes its own rank's, else one of its own node's, else any; of equals the
    row in the batch decides. So every rank chooses for its own tokens, and tells nobody.
    """

    def __init__(
        self,
        holders: Sequence[Sequence[Sequence[int]]],
        num_ranks: int,
        ranks_per_node: int,
        layers: Sequence[int],
        rank: int,
    ) -> None:
        """holders: the ranks of each expert of each layer, rising, as a `Placement` has them.

        layers: the model's numbers of these layers, in order.
        """
        self.rank = rank
        self.num_experts = len(holders[0])
        self._index = {layer: index for index, layer in enumerate(layers)}
        holds = torch.zeros(len(holders), self.num_experts, num_ranks, dtype=torch.bool)
        for index, layer in enumerate(holders):
            for expert, ranks in enumerate(layer):
                holds[index, expert, list(ranks)] = True
        slots = holds.cumsum(1) - 1
        self._slots = torch.where(holds, slots, -1)
        self._num_local = holds.sum(1).tolist()  # [num_layers][num_ranks]
        node = rank // ranks_per_node
        self._candidates: list[Tensor] = []
        self._counts: list[Tensor] = []
        for layer in holders:
            chosen = []
            for ranks in layer:
                near = [other for other in ranks if other // ranks_per_node == node]
                chosen.append([rank] if rank in ranks else near or list(ranks))
            most = max(map(len, chosen))
            self._candidates.append(
                torch.tensor([ranks + ranks[:1] * (most - len(ranks)) for ranks in chosen])
            )
            self._counts.append(torch.tensor([len(ranks) for ranks in chosen]))

    def num_local(self, layer: int) -> list[int]:
        """Return how many experts of a layer each rank holds."""
        counts: list[int] = self._num_local[self._index[layer]]
        return counts

    def choose(self, layer: int, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (rank, local slot) of each choice, int64 [num_tokens, top_k] both.

        layer: by the model's number.
        """
        layer = self._index[layer]
        candidates = self._candidates[layer]
        if candidates.shape[1] == 1:
            ranks = candidates[:, 0][expert_ids]
        else:
            turn = torch.arange(expert_ids.shape[0])[:, None] % self._counts[layer][expert_ids]
            ranks = candidates[expert_ids, turn]
        return ranks, self._slots[layer][expert_ids, ranks]
