"""One rank of a test: every dispatcher must give what one process gives, in all bits.

Run as `python -m tests.comm.worker` with RANK, WORLD_SIZE and STORE_PORT in the environment, and
KERNELS, names with blanks between, MOST_TOKENS of a rank, CASES, and DEVICE, cpu or cuda; prints
JSON with what was counted.
"""

from __future__ import annotations

import datetime
import json
import os
import random
from collections.abc import Callable
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
DEVICE = torch.device(os.environ.get("DEVICE", "cpu"))
HIDDEN = 24
COLLECTIVES = {
    "per_expert": 3, "dedup": 3, "all_gather": 2, "static": 2, "dedup_sums": 3, "static_sums": 2,
}  # fmt: skip
WITHOUT_WAITING = ("static", "static_sums")


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
    experts = torch.arange(placement.num_experts, device=DEVICE)
    names = experts.repeat_interleave(inbox.counts)
    assert set(names.tolist()) <= set(placement.experts_of(rank, LAYERS.index(layer)))
    assert len(names) == len(inbox.row_of_pair) or inbox.has_room
    out: torch.Tensor = inbox.rows.new_full(
        (len(inbox.row_of_pair), inbox.rows.shape[1]), float("nan")
    )
    out[: len(names)] = expert_rows(inbox.rows[inbox.row_of_pair[: len(names)]], names)
    return out


def expert_rows(rows: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    return (rows.float() * (1 + names[:, None] / 7)).sin().to(rows.dtype)


def step(
    world: World, placement: Placement, dispatcher: Dispatcher, tokens: list[int], seed: int,
    dtype: torch.dtype, top_k: int, kernels: Kernels,
) -> tuple[int, int]:  # fmt: skip
    """Send a step's tokens through both layers; compare.

    Returns the collectives, and the waits for the device, that a layer took.
    """
    num_experts = placement.num_experts
    source = torch.Generator().manual_seed(1000 * seed + world.rank)
    own = tokens[world.rank]
    hidden = torch.randn(own, HIDDEN, generator=source).to(DEVICE, dtype)
    reference = local.build(num_experts, kernels)
    dispatcher.begin_step(tokens)
    before = world.num_collectives, world.num_waits
    for layer in LAYERS:
        scores = torch.rand(own, num_experts, generator=source).to(DEVICE)
        weights, ids = scores.sort(1, descending=True)
        routing = Routing(ids[:, :top_k].contiguous(), weights[:, :top_k].contiguous())
        added = torch.randn(own, HIDDEN, generator=source).to(DEVICE, dtype)
        shared = added if seed % 2 else None
        inbox, receipt = dispatcher.dispatch(layer, hidden, routing)
        out = dispatcher.combine(run_experts(placement, layer, world.rank, inbox), receipt, shared)
        inbox, receipt = reference.dispatch(layer, hidden, routing)
        names = torch.arange(num_experts, device=DEVICE).repeat_interleave(inbox.counts)
        expected = reference.combine(
            expert_rows(inbox.rows[inbox.row_of_pair], names), receipt, shared
        )
        assert out.dtype == expected.dtype
        if isinstance(dispatcher, Sums):
            least = 2e-6 if dtype is torch.float32 else 2e-2  # parts of a sum were rounded
            assert torch.allclose(out, expected, rtol=least, atol=least * 4)
        else:
            assert torch.equal(out, expected), (type(dispatcher), tokens, seed)
    took = world.num_collectives - before[0], world.num_waits - before[1]
    return took[0] // len(LAYERS), took[1]


def held(work: Callable[[], None]) -> Callable[[], None]:
    """Return what does `work` again: a CUDA graph, or on a CPU itself."""
    if DEVICE.type == "cpu":
        return work
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(beside):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # other threads, of NCCL, may ask for events meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


def check_held(world: World, kernels: Kernels) -> None:
    """Check that a layer through static, done once and again with other tokens, stays right.

    The memory that it uses must stay in place, also while steps with more tokens go by.
    """
    num_experts, top_k, num_tokens = 4, 2, 3
    holders = [[(expert % world.size,) for expert in range(num_experts)]]
    layout = Layout(holders, world.size, world.size, (0,), world.rank, device=DEVICE)
    names = ("static", "static_sums")
    for name in names:
        dispatcher = load("moe_serve.comm", name).build(world, layout, kernels)
        hidden = torch.zeros(num_tokens, HIDDEN, device=DEVICE)
        ids = torch.zeros(num_tokens, top_k, dtype=torch.int64, device=DEVICE)
        weights = torch.full((num_tokens, top_k), 0.5, device=DEVICE)
        found = torch.zeros_like(hidden)

        def work(dispatcher: Any = dispatcher, source: Any = (hidden, ids, weights, found)) -> None:
            hidden, ids, weights, found = source
            inbox, receipt = dispatcher.dispatch(0, hidden, Routing(ids, weights))
            found.copy_(dispatcher.combine(inbox.rows[inbox.row_of_pair] * 3, receipt))

        dispatcher.begin_step([num_tokens] * world.size)
        again = held(work)
        for turn in range(2):
            if turn == 1:  # 8 slots for each rank, which is other memory
                many = torch.randn(7, HIDDEN, device=DEVICE)
                dispatcher.begin_step([7] * world.size)
                routing = Routing(ids[:1].expand(7, -1), weights[:1].expand(7, -1))
                _, receipt = dispatcher.dispatch(0, many, routing)
                del receipt, many
                dispatcher.begin_step([num_tokens] * world.size)
            source = torch.Generator().manual_seed(10 * turn + world.rank)
            hidden.copy_(torch.randn(num_tokens, HIDDEN, generator=source))
            ids.copy_(torch.rand(num_tokens, num_experts, generator=source).argsort(1)[:, :top_k])
            again()
            torch.testing.assert_close(found, hidden * 3, rtol=1e-6, atol=1e-6)


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", int(os.environ["STORE_PORT"]), size, rank == 0
    )
    timeout = datetime.timedelta(seconds=30)
    backend = "gloo" if DEVICE.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    torch.set_num_threads(1)
    assert dist.group.WORLD is not None
    world = World(dist.group.WORLD, DEVICE)
    world.connect()
    assert world.share(bytes([rank])) == [bytes([other]) for other in range(size)]
    world.forget()
    chance = random.Random(5)  # alike on all ranks
    is_interpreted = DEVICE.type == "cpu" and os.environ["KERNELS"] == "triton"
    sets = [suite.load(name) for name in os.environ["KERNELS"].split()]
    counted: dict[str, set[int]] = {name: set() for name in NAMES}
    for case in range(int(os.environ.get("CASES", "40"))):
        num_experts = chance.choice((4, 7, 16)[: 1 if is_interpreted else None])
        placement = placement_of(chance, num_experts, size)
        mesh = placement.mesh
        choice = CHOICES[case % len(CHOICES)]
        layout = Layout(placement.ranks, size, mesh.ranks_per_node, LAYERS, rank, choice, DEVICE)
        top_k = chance.randint(1, 4)
        most = int(os.environ["MOST_TOKENS"])
        tokens = [chance.choice((0, 0, 1, 3, min(17, most), most)) for _ in range(size)]
        dtype = chance.choice((torch.float32, torch.bfloat16))
        kernels = chance.choice(sets)
        for name in NAMES:
            dispatcher = load("moe_serve.comm", name).build(world, layout, kernels)
            # which takes longer than all the rest of a case, and too long where it is interpreted
            is_fitted = case % 12 == 0 and not is_interpreted
            if isinstance(dispatcher, auto.Auto) and is_fitted:
                dispatcher.fit(LAYERS[0], torch.zeros(1, HIDDEN, dtype=dtype, device=DEVICE), top_k)
            took, waits = step(world, placement, dispatcher, tokens, case, dtype, top_k, kernels)
            num_filled = sum(layout.is_filled(layer) for layer in LAYERS)
            if name != "auto":
                wanted = 0 if name in WITHOUT_WAITING else len(LAYERS)
                assert waits == wanted + num_filled, (name, waits)
            if "static" not in name or max(tokens) <= 64:
                counted[name].add(took)
    for name, expected in COLLECTIVES.items():
        assert counted[name] == {expected}, (name, counted[name])
    if sets[-1].name == "triton":
        check_held(world, sets[-1])
    print(json.dumps({"bytes": world.bytes_sent, "collectives": world.num_collectives}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
