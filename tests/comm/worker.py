"""One rank of a test: every dispatcher must give what one process gives, in all bits.

Run as `python -m tests.comm.worker` with RANK, WORLD_SIZE and STORE_PORT in the environment; prints
JSON with what was counted.
"""

from __future__ import annotations

import datetime
import json
import os
import random
from typing import Any

import torch
import torch.distributed as dist

from moe_serve.comm import auto, local
from moe_serve.comm._layout import Layout
from moe_serve.comm._replica_choice import CHOICES
from moe_serve.comm._sums import Sums
from moe_serve.comm._world import World
from moe_serve.comm.base import Dispatcher
from moe_serve.experts.placement.base import Mesh, Placement
from moe_serve.kernels import suite
from moe_serve.kernels.suite import Kernels
from moe_serve.plugin import load
from moe_serve.types import Routing

NAMES = ("per_expert", "dedup", "all_gather", "static", "auto", "dedup_sums", "static_sums")
LAYERS = (1, 4)  # by the model's numbers
HIDDEN = 24
COLLECTIVES = {
    "per_expert": 3, "dedup": 3, "all_gather": 2, "static": 2, "dedup_sums": 3, "static_sums": 2,
}  # fmt: skip


def placement_of(chance: random.Random, num_experts: int, world_size: int) -> Placement:
    """Return a random placement: uneven, some experts on several ranks."""
    nodes = chance.choice([n for n in range(1, world_size + 1) if world_size % n == 0])
    layers = tuple(
        tuple(
            tuple(sorted(chance.sample(range(world_size), chance.randint(1, min(2, world_size)))))
            for _ in range(num_experts)
        )
        for _ in LAYERS
    )
    mesh = Mesh(num_ranks=world_size, ranks_per_node=world_size // nodes)
    return Placement(mesh, num_experts, layers)


def run_experts(placement: Placement, layer: int, rank: int, inbox: Any) -> torch.Tensor:
    """Return what this rank's experts make of their rows: something else for each expert."""
    names = torch.arange(placement.num_experts).repeat_interleave(inbox.counts)
    assert set(names.tolist()) <= set(placement.experts_of(rank, LAYERS.index(layer)))
    return expert_rows(inbox.rows[inbox.row_of_pair], names)


def expert_rows(rows: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    return (rows.float() * (1 + names[:, None] / 7)).sin().to(rows.dtype)


def step(
    world: World, placement: Placement, dispatcher: Dispatcher, tokens: list[int], seed: int,
    dtype: torch.dtype, top_k: int, kernels: Kernels,
) -> int:  # fmt: skip
    """Send a step's tokens through both layers; compare; return the collectives that it took."""
    num_experts = placement.num_experts
    source = torch.Generator().manual_seed(1000 * seed + world.rank)
    own = tokens[world.rank]
    hidden = torch.randn(own, HIDDEN, generator=source).to(dtype)
    reference = local.build(num_experts, kernels)
    dispatcher.begin_step(tokens)
    before = world.num_collectives
    for layer in LAYERS:
        scores = torch.rand(own, num_experts, generator=source)
        weights, ids = scores.sort(1, descending=True)
        routing = Routing(ids[:, :top_k].contiguous(), weights[:, :top_k].contiguous())
        shared = torch.randn(own, HIDDEN, generator=source).to(dtype) if seed % 2 else None
        inbox, receipt = dispatcher.dispatch(layer, hidden, routing)
        out = dispatcher.combine(run_experts(placement, layer, world.rank, inbox), receipt, shared)
        inbox, receipt = reference.dispatch(layer, hidden, routing)
        names = torch.arange(num_experts).repeat_interleave(inbox.counts)
        expected = reference.combine(
            expert_rows(inbox.rows[inbox.row_of_pair], names), receipt, shared
        )
        assert out.dtype == expected.dtype
        if isinstance(dispatcher, Sums):
            least = 2e-6 if dtype is torch.float32 else 2e-2  # parts of a sum were rounded
            assert torch.allclose(out, expected, rtol=least, atol=least * 4)
        else:
            assert torch.equal(out, expected), (type(dispatcher), tokens, seed)
    return (world.num_collectives - before) // len(LAYERS)


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", int(os.environ["STORE_PORT"]), size, rank == 0
    )
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    torch.set_num_threads(1)
    assert dist.group.WORLD is not None
    world = World(dist.group.WORLD)
    chance = random.Random(5)  # alike on all ranks
    sets = [suite.load("reference"), suite.load("auto")]
    counted: dict[str, set[int]] = {name: set() for name in NAMES}
    for case in range(int(os.environ.get("CASES", "40"))):
        num_experts = chance.choice((4, 7, 16))
        placement = placement_of(chance, num_experts, size)
        mesh = placement.mesh
        choice = CHOICES[case % len(CHOICES)]
        layout = Layout(placement.ranks, size, mesh.ranks_per_node, LAYERS, rank, choice)
        top_k = chance.randint(1, 4)
        tokens = [chance.choice((0, 0, 1, 3, 17, 70)) for _ in range(size)]
        dtype = chance.choice((torch.float32, torch.bfloat16))
        kernels = chance.choice(sets)
        for name in NAMES:
            dispatcher = load("moe_serve.comm", name).build(world, layout, kernels)
            if isinstance(dispatcher, auto.Auto) and case % 4 == 0:
                dispatcher.fit(LAYERS[0], torch.zeros(1, HIDDEN, dtype=dtype), top_k)
            took = step(world, placement, dispatcher, tokens, case, dtype, top_k, kernels)
            if "static" not in name or max(tokens) <= 64:
                counted[name].add(took)
    for name, expected in COLLECTIVES.items():
        assert counted[name] == {expected}, (name, counted[name])
    print(json.dumps({"bytes": world.bytes_sent, "collectives": world.num_collectives}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
