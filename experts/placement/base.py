"""Which rank holds which expert: what a strategy is given, and what it returns.

A strategy is one file of this folder with `place(stats, mesh, slots_per_rank, options, current)`.
Ranks are numbered node by node: rank r is on node r // ranks_per_node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_serve.errors import CapacityError, ConfigError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """Ranks, as many on each node."""

    num_ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.ranks_per_node < 1:
            raise ConfigError(
                f"{self.num_ranks} ranks, {self.ranks_per_node} on a node: give at least 1"
            )
        if self.num_ranks % self.ranks_per_node:
            raise ConfigError(
                f"{self.num_ranks} ranks cannot be {self.ranks_per_node} on every node; give a "
                "number of nodes that divides the ranks"
            )

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    def nodes(self) -> Array:
        """Return the node of each rank, int64 [num_ranks]."""
        return np.arange(self.num_ranks) // self.ranks_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingStats:
    """What was counted of a run, or of a trace, over `num_tokens` tokens.

    load: float64 [num_layers, num_experts], tokens that use an expert. coactivation: float64
    [num_layers, num_experts, num_experts], tokens that use both; the diagonal is 0. transitions:
    float64 [num_layers - 1, num_experts, num_experts], pairs of an expert of a layer and one of the
    next, each token counting 1 in all. ids: [num_tokens, num_layers, top_k], for strategies that
    look at paths, or None.
    """

    num_tokens: int
    top_k: int
    load: Array
    coactivation: Array
    transitions: Array
    ids: Array | None = None

    @property
    def num_layers(self) -> int:
        return int(self.load.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.load.shape[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementOptions:
    """How a strategy weighs what it weighs.

    balance: what a layer's squared imbalance counts beside its traffic, both relative to the
    start's (joint). most_imbalance: no rank of a layer gets more than 1 + this times the mean
    (joint; as near to it as can be). groups: of experts that one node keeps together (eplb; 0:
    none). restarts, seed: of strategies that start at random. bias: how many of a layer's hottest
    experts every rank holds, before other replicas are given (eplb).
    """

    balance: float = 3.0
    most_imbalance: float = 0.05
    groups: int = 0
    restarts: int = 4
    seed: int = 0
    bias: int = 0

    def __post_init__(self) -> None:
        for name in ("balance", "most_imbalance", "groups", "restarts", "bias"):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigError(f"{name} is {value}; give 0 or more")


@dataclass(frozen=True, slots=True)
class Placement:
    """ranks[layer][expert]: the ranks that hold it, rising, at least one, none twice."""

    mesh: Mesh
    num_experts: int
    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    strategy: str = ""
    trained_on: dict[str, Any] = field(default_factory=dict)
    model_id: str | None = None

    def __post_init__(self) -> None:
        for layer, experts in enumerate(self.ranks):
            if len(experts) != self.num_experts:
                raise ConfigError(
                    f"the placement's layer {layer} has {len(experts)} experts, not "
                    f"{self.num_experts}"
                )
            for expert, ranks in enumerate(experts):
                where = f"expert {expert} of the placement's layer {layer}"
                if not ranks:
                    raise ConfigError(f"{where} is on no rank")
                if len(set(ranks)) < len(ranks):
                    raise ConfigError(f"{where} is twice on a rank: {list(ranks)}")
                if not all(0 <= rank < self.mesh.num_ranks for rank in ranks):
                    raise ConfigError(
                        f"{where} is on ranks {list(ranks)}, of which there are "
                        f"{self.mesh.num_ranks}"
                    )

    @property
    def num_layers(self) -> int:
        return len(self.ranks)

    def holds(self) -> Array:
        """Return bool [num_layers, num_experts, num_ranks]."""
        held = np.zeros((self.num_layers, self.num_experts, self.mesh.num_ranks), bool)
        for layer, experts in enumerate(self.ranks):
            for expert, ranks in enumerate(experts):
                held[layer, expert, list(ranks)] = True
        return held

    def owners(self) -> Array:
        """Return each expert's first rank, int64 [num_layers, num_experts]."""
        return np.array([[ranks[0] for ranks in experts] for experts in self.ranks], np.int64)

    def experts_of(self, rank: int, layer: int) -> list[int]:
        """Return what `rank` holds of a layer, rising."""
        return [expert for expert, ranks in enumerate(self.ranks[layer]) if rank in ranks]

    def most_slots(self) -> int:
        """Return the most experts that any rank holds of any layer."""
        return int(self.holds().sum(axis=1).max())


def from_owners(mesh: Mesh, owners: Array, strategy: str) -> Placement:
    """Make a placement without replicas from int [num_layers, num_experts]."""
    ranks = tuple(tuple((int(rank),) for rank in layer) for layer in owners)
    return Placement(mesh, owners.shape[1], ranks, strategy)


def from_holds(mesh: Mesh, holds: Array, strategy: str) -> Placement:
    """Make a placement from bool [num_layers, num_experts, num_ranks]."""
    ranks = tuple(
        tuple(tuple(np.flatnonzero(expert).tolist()) for expert in layer) for layer in holds
    )
    return Placement(mesh, holds.shape[1], ranks, strategy)


def room_of(mesh: Mesh, num_experts: int, slots_per_rank: int | None) -> list[int]:
    """Return how many slots of a layer each rank has, [num_ranks].

    None: just as many as there are experts, spread as evenly as can be. Raises CapacityError where
    they hold fewer than all experts, or where a rank would have more slots than there are experts.
    """
    if slots_per_rank is None:
        base, more = divmod(num_experts, mesh.num_ranks)
        return [base + (rank < more) for rank in range(mesh.num_ranks)]
    if slots_per_rank * mesh.num_ranks < num_experts:
        raise CapacityError(
            f"{mesh.num_ranks} ranks with {slots_per_rank} slots a layer hold "
            f"{slots_per_rank * mesh.num_ranks} experts, but there are {num_experts}; give at "
            f"least {-(-num_experts // mesh.num_ranks)} slots"
        )
    if slots_per_rank > num_experts:
        raise CapacityError(
            f"{slots_per_rank} slots a layer on a rank, but there are {num_experts} experts; give "
            "at most that"
        )
    return [slots_per_rank] * mesh.num_ranks


def without_replicas(mesh: Mesh, num_experts: int, slots_per_rank: int | None) -> list[int]:
    """Return `room_of` for a strategy that makes no replicas: no more than all experts need."""
    room = room_of(mesh, num_experts, slots_per_rank)
    return room if sum(room) == num_experts else room_of(mesh, num_experts, None)


def blocks(room: Sequence[int], num_experts: int) -> Array:
    """Return int64 [num_experts], experts in rising order filled into ranks one after the other."""
    return np.repeat(np.arange(len(room)), room)[:num_experts]
