"""What `moe-serve place` computes: a placement from one part of a trace, judged on other parts.

Two layouts are judged. two_exchange is what this runtime does: after every layer a token's results
return to its home rank, so what costs is how many ranks its experts are on. coherent is ExFlow's
(arXiv 2401.08383), simulated only: every rank has every token's context, a token goes on from the
rank of its heaviest expert, and what costs is how often that changes.

Definitions, all means over tokens and layers. ranks_per_token: ranks that hold a token's experts,
its own included. local_share: (token, expert) pairs that need no other rank. remote_ranks,
remote_nodes: other ranks (nodes) that a token's row must reach; a row that goes to a node for
several of its ranks counts once for the node. hop_cross, hop_cross_node: hops from a layer's
heaviest expert to the next one's that change rank (node).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from moe_serve.errors import ConfigError
from moe_serve.experts.placement.base import Array, Mesh, Placement
from moe_serve.experts.trace import Trace

_BATCH = 1024  # tokens whose load is compared at once, as TensorRT-LLM does


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Rates of a machine, for modelled times.

    rank_gb_per_s: between two ranks of a node, each way; node_gb_per_s: out of one rank to other
    nodes; latency_us: of one collective; expert_us: of one row in one expert.
    """

    rank_gb_per_s: float = 400.0
    node_gb_per_s: float = 40.0
    latency_us: float = 20.0
    expert_us: float = 0.5


def read_topology(path: Path | None) -> Topology:
    """Read a JSON object of `Topology`'s fields; None: the defaults. Raises ConfigError."""
    if path is None:
        return Topology()
    try:
        given = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a topology ({error})") from error
    known = {name.name for name in fields(Topology)}
    if not isinstance(given, dict) or not set(given) <= known:
        raise ConfigError(f"{path}: a topology is an object of {', '.join(sorted(known))}")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise ConfigError(f"{path}: {name} is {value!r}; give a number above 0")
    return Topology(**given)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A placement on some tokens; see the module."""

    num_tokens: int
    ranks_per_token: float
    local_share: float
    remote_ranks: float
    remote_nodes: float
    hop_cross: float
    hop_cross_node: float
    imbalance: float  # (max - mean) / mean of all tokens' load, mean over layers
    imbalance_of_batches: float  # TensorRT-LLM: the same of 1,024 tokens, mean over batches too
    balancedness: float  # vLLM: sum over layers of means / sum of maxima
    utilisation: float  # SGLang: mean over layers of mean / max
    bytes_two_exchange: dict[str, float]
    bytes_coherent: float
    us_two_exchange: float
    us_coherent: float
    traffic: Array  # float64 [num_ranks, num_ranks], rows from home to rank, a token and layer

    def as_json(self) -> dict[str, Any]:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**values, "traffic": self.traffic.tolist()}


def judge_placement(
    placement: Placement,
    trace: Trace,
    hidden_size: int = 2048,
    bytes_per_value: int = 2,
    topology: Topology | None = None,
) -> Judged:
    """Judge a placement on a trace's tokens; homes are sequences, dealt out by their lengths."""
    topology = topology or Topology()
    mesh = placement.mesh
    homes = deal_homes(trace, mesh)
    nodes = mesh.nodes()
    num_tokens, num_layers, top_k = trace.ids.shape
    holds = placement.holds()
    visited_sum = local = remote_ranks = remote_nodes = 0.0
    traffic = np.zeros((mesh.num_ranks, mesh.num_ranks))
    loads = np.zeros((num_layers, -(-num_tokens // _BATCH), mesh.num_ranks))
    first = np.empty((num_tokens, num_layers), np.int64)
    batch = np.arange(num_tokens) // _BATCH
    for layer in range(num_layers):
        ranks = choose_replicas(holds[layer], trace.ids[:, layer].astype(np.int64), homes, mesh)
        heaviest = trace.weights[:, layer].argmax(axis=1)  # not all traces have it first
        first[:, layer] = ranks[np.arange(num_tokens), heaviest]
        visited = np.zeros((num_tokens, mesh.num_ranks), bool)
        visited[np.arange(num_tokens)[:, None], ranks] = True
        visited_sum += visited.sum()
        local += (ranks == homes[:, None]).sum()
        away = visited.copy()
        away[np.arange(num_tokens), homes] = False
        remote_ranks += away.sum()
        of_node: Array = np.any(away.reshape(num_tokens, mesh.num_nodes, -1), axis=2)
        of_node[np.arange(num_tokens), nodes[homes]] = False
        remote_nodes += of_node.sum()
        for home in range(mesh.num_ranks):
            traffic[home] += visited[homes == home].sum(axis=0)
        np.add.at(loads[layer], (np.repeat(batch, top_k), ranks.ravel()), 1.0)
    count = float(num_tokens * num_layers)
    hops = max(1, num_tokens * (num_layers - 1))
    changes = first[:, 1:] != first[:, :-1]
    cross = float(changes.sum()) / hops
    node_changes = nodes[first[:, 1:]] != nodes[first[:, :-1]]
    row = hidden_size * bytes_per_value
    pairs_away = top_k - float(local) / count
    u = float(remote_ranks) / count
    of_bytes = {
        "per_expert": 2 * pairs_away * row,
        "dedup": (u + pairs_away) * row,
        "all_gather": (mesh.num_ranks - 1 + pairs_away) * row,
        "partial": 2 * u * row,
    }
    means, highest = loads.mean(axis=2), loads.max(axis=2)
    totals = loads.sum(axis=1)
    slowest_us = float(highest.mean()) * topology.expert_us
    wire = traffic / count
    np.fill_diagonal(wire, 0.0)
    return Judged(
        num_tokens=num_tokens,
        ranks_per_token=float(visited_sum) / count,
        local_share=float(local) / (count * top_k),
        remote_ranks=u,
        remote_nodes=float(remote_nodes) / count,
        hop_cross=cross,
        hop_cross_node=float(node_changes.sum()) / hops,
        imbalance=float((totals.max(axis=1) / totals.mean(axis=1) - 1).mean()),
        imbalance_of_batches=float(((highest - means) / means).mean()),
        balancedness=float(totals.mean(axis=1).sum() / totals.max(axis=1).sum()),
        utilisation=float(((totals.mean(1) + 1e-5) / (totals.max(1) + 1e-5)).mean()),
        bytes_two_exchange=of_bytes,
        bytes_coherent=cross * row,
        us_two_exchange=(
            2 * topology.latency_us + slowest_us + 2 * _BATCH * _wire_us(wire, row, nodes, topology)
        ),
        us_coherent=(
            topology.latency_us + slowest_us
            + _BATCH * row * cross / mesh.num_ranks / topology.rank_gb_per_s / 1e3
        ),
        traffic=traffic / count,
    )  # fmt: skip


def _wire_us(rows: Array, row_bytes: int, nodes: Array, topology: Topology) -> float:
    """Return the microseconds that the busiest rank sends for, a token of the batch."""
    is_near = nodes[:, None] == nodes[None, :]
    near = (rows * is_near).sum(axis=1) * row_bytes / topology.rank_gb_per_s
    far = (rows * ~is_near).sum(axis=1) * row_bytes / topology.node_gb_per_s
    return float((near + far).max()) / 1e3


def deal_homes(trace: Trace, mesh: Mesh) -> Array:
    """Return each token's home rank: whole sequences, each to the rank with the fewest tokens."""
    lengths = np.diff(trace.seq_offsets)
    tokens = [0] * mesh.num_ranks
    homes = np.empty(len(lengths), np.int64)
    for index, length in enumerate(lengths.tolist()):
        homes[index] = rank = tokens.index(min(tokens))
        tokens[rank] += length
    of_tokens: Array = np.repeat(homes, lengths)
    return of_tokens


def choose_replicas(holds: Array, ids: Array, homes: Array, mesh: Mesh) -> Array:
    """Return the rank of each choice, int64 [num_tokens, top_k]: home, its node, or by turns.

    holds: bool [num_experts, num_ranks]; ids: [num_tokens, top_k].
    """
    nodes = mesh.nodes()
    # how near each rank is to each home: 2 itself, 1 its node, 0 elsewhere
    near = (nodes[:, None] == nodes[None, :]).astype(np.int64) + np.eye(mesh.num_ranks, dtype=int)
    counts = holds.sum(axis=1)
    chosen: Array = holds.argmax(axis=1)[ids]
    for expert in np.flatnonzero(counts > 1).tolist():
        tokens, choices = np.nonzero(ids == expert)
        ranks = np.flatnonzero(holds[expert])
        nearness = near[homes[tokens]][:, ranks]
        best = nearness == nearness.max(axis=1, keepdims=True)
        turn = tokens % best.sum(axis=1)
        place = (best.cumsum(axis=1) == turn[:, None] + 1).argmax(axis=1)
        chosen[tokens, choices] = ranks[place]
    return chosen


def least_ranks(trace: Trace, room: int) -> float:
    """Return a bound on ranks_per_token for any placement without replicas, `room` to a rank.

    Of m experts on one rank m - 1 visits are saved, no more than the pairs among them; and each
    expert has at most room - 1 others beside it, at best those that it is used with most.
    """
    ids = trace.ids.astype(np.int64)
    num_tokens, num_layers, top_k = ids.shape
    rows = np.arange(num_tokens)[:, None]
    total: float = 0.0
    for layer in range(num_layers):
        used = np.zeros((num_tokens, trace.num_experts), np.float32)
        used[rows, ids[:, layer]] = 1.0
        together = used.T @ used
        np.fill_diagonal(together, 0.0)
        best = np.sort(together, axis=1)[:, ::-1][:, : max(0, room - 1)].sum() / 2
        total += max(1.0, float(top_k - best / num_tokens))
    return total / int(num_layers)
