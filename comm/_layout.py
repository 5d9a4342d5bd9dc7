"""Where each expert is, as dispatchers look it up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serve.comm._replica_choice import candidates, filled
from moe_serve.comm._world import HOST
from moe_serve.kernels.exchange.base import Replicas


class Layout:
    """A placement as seen from one rank; `place` changes it, between steps.

    Which replica a token takes every rank chooses for its own tokens; see `_replica_choice`.
    epoch: how often a layer was placed anew.
    """

    def __init__(
        self,
        holders: Sequence[Sequence[Sequence[int]]],
        num_ranks: int,
        ranks_per_node: int,
        layers: Sequence[int],
        rank: int,
        replica_choice: str = "nearest",
        device: torch.device = HOST,
    ) -> None:
        """holders: each layer's ranks of each expert, rising, as a `Placement` has them.

        layers: the model's numbers of these layers, in order. replica_choice: one of `CHOICES`.
        device: where the tensors are, those that it gives and those that it is asked about.
        """
        self._replica_choice = replica_choice
        self._device = device
        self.rank = rank
        self.num_ranks = num_ranks
        self._ranks_per_node = ranks_per_node
        self.layers = tuple(layers)
        self.num_experts = len(holders[0])
        self._index = {layer: index for index, layer in enumerate(layers)}
        self.epoch = 0
        size = len(holders)
        self._key_of_held: list[Tensor] = [torch.empty(0)] * size
        self._rank_of_held: list[Tensor] = [torch.empty(0)] * size
        self._is_filled = [False] * size
        self._num_held: list[list[int]] = [[]] * size
        self._held: list[Tensor] = [torch.empty(0)] * size
        self._replicas = [Replicas(torch.empty(0), torch.empty(0))] * size
        for layer, ranks_of_expert in zip(layers, holders, strict=True):
            self._place(layer, ranks_of_expert)

    def place(self, layer: int, holders: Sequence[Sequence[int]]) -> None:
        """Place a layer anew: a new epoch. holders: the ranks of each expert, rising.

        All ranks must do so at once, between steps.
        """
        self._place(layer, holders)
        self.epoch += 1

    def _place(self, layer: int, holders: Sequence[Sequence[int]]) -> None:
        index = self._index[layer]
        holds = torch.zeros(self.num_experts, self.num_ranks, dtype=torch.bool)
        for expert, ranks in enumerate(holders):
            holds[expert, list(ranks)] = True
        is_held = holds.T.flatten()  # [num_ranks * num_experts]
        self._key_of_held[index] = (is_held.cumsum(0) - 1).to(self._device)
        self._rank_of_held[index] = holds.T.nonzero()[:, 0].to(self._device)
        self._num_held[index] = holds.sum(0).tolist()
        self._held[index] = holds[:, self.rank].nonzero()[:, 0].to(self._device)
        chosen = candidates(holders, self.rank, self._ranks_per_node, self._replica_choice)
        is_filling = self._replica_choice == "water_filling"
        self._is_filled[index] = is_filling and chosen.ranks.shape[1] > 1
        # what is filled is filled on the host
        self._replicas[index] = chosen if self._is_filled[index] else chosen.to(self._device)

    def num_held(self, layer: int) -> list[int]:
        """Return how many experts of a layer each rank holds."""
        return self._num_held[self._index[layer]]

    def held(self, layer: int) -> Tensor:
        """Return which experts of a layer this rank holds, int64, rising."""
        return self._held[self._index[layer]]

    def keys(self, layer: int, ranks: Tensor, expert_ids: Tensor) -> Tensor:
        """Number what ranks hold of a layer, rank by rank, experts rising; return those numbers.

        ranks, expert_ids: int64, of one shape; each rank must hold its expert.
        """
        numbers: Tensor = self._key_of_held[self._index[layer]][
            ranks * self.num_experts + expert_ids
        ]
        return numbers

    def rank_of_key(self, layer: int) -> Tensor:
        """Return the rank of each of those numbers, int64, rising."""
        return self._rank_of_held[self._index[layer]]

    def is_filled(self, layer: int) -> bool:
        """Return whether `replicas` looks at `expert_ids`, which must come to the host for it."""
        return self._is_filled[self._index[layer]]

    def replicas(self, layer: int, expert_ids: Tensor) -> Replicas:
        """Return which rank each token takes for each expert of a layer.

        expert_ids: int64 [num_tokens, top_k], of this rank's tokens.
        """
        replicas = self._replicas[self._index[layer]]
        if self._is_filled[self._index[layer]]:
            return filled(replicas, expert_ids.cpu(), self.num_ranks).to(self._device)
        return replicas

    def choose(self, layer: int, expert_ids: Tensor) -> Tensor:
        """Return the rank for each choice, int64 [num_tokens, top_k] like `expert_ids`."""
        return chosen(self.replicas(layer, expert_ids), expert_ids)


def chosen(replicas: Replicas, expert_ids: Tensor) -> Tensor:
    """Return the rank that each token takes for each choice, int64, like `expert_ids`."""
    ranks, counts = replicas
    if ranks.shape[1] == 1:
        return ranks[:, 0][expert_ids]
    turn = torch.arange(expert_ids.shape[0], device=expert_ids.device)[:, None]
    return ranks[expert_ids, turn % counts[expert_ids]]
