"""One rank of `benchmarks.comm`: times each dispatcher in turns, and prints JSON."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks.comm.bounds import needed_bytes
from benchmarks.comm.shape import BARE, NAMES, Shape
from moe_serve.comm import auto, local
from moe_serve.comm._layout import Layout
from moe_serve.comm._world import World
from moe_serve.comm.base import Dispatcher
from moe_serve.experts.placement import contiguous
from moe_serve.experts.placement.base import Mesh, PlacementOptions
from moe_serve.experts.records import ExpertArena
from moe_serve.experts.routing_stats import count
from moe_serve.kernels import suite
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.kernels.suite import Kernels
from moe_serve.plugin import load
from moe_serve.types import Routing

LAYER = 0
REPEATS = 5  # calls a sample, whose mean it is


def table_of(experts: list[int], shape: Shape, kernels: Kernels) -> ExpertTable:
    """Return random experts, the same for the same numbers wherever they are."""
    arena = ExpertArena(
        (LAYER,), shape.num_experts, shape.hidden_size, shape.intermediate_size, torch.bfloat16,
        kernels.record_bytes(shape.hidden_size, shape.intermediate_size, torch.bfloat16),
        held={LAYER: experts},
    )  # fmt: skip
    for part in arena.plain_weights(LAYER):
        for row, expert in zip(part, experts, strict=True):
            source = torch.Generator().manual_seed(expert)
            row.copy_(torch.randn(row.shape, generator=source) / row.shape[-1] ** 0.5)
    arena.pack(kernels.pack_records_, kernels.record_layout)
    return arena.table(LAYER)


def layer(
    dispatcher: Dispatcher, table: ExpertTable, kernels: Kernels, tokens: list[int],
    hidden: torch.Tensor, routing: Routing,
) -> torch.Tensor:  # fmt: skip
    """Run the layer once."""
    dispatcher.begin_step(tokens)
    inbox, receipt = dispatcher.dispatch(LAYER, hidden, routing)
    outbox = kernels.moe(inbox.rows, inbox.row_of_pair, inbox.counts, table)
    return dispatcher.combine(outbox, receipt)


def bare_exchanges(world: World, bytes_sent: int) -> Callable[[], None]:
    """Return a call of two even exchanges that together send so many bytes, the ranks' mean."""
    shared = world.share(bytes_sent.to_bytes(8, "little"))
    sent = sum(int.from_bytes(row, "little") for row in shared) // world.size
    each = max(1, sent // 2 // max(1, world.size - 1))
    rows = torch.zeros(world.size, each, dtype=torch.uint8)
    into = torch.empty_like(rows)

    def exchange() -> None:
        for _ in range(2):
            world.exchange_evenly(rows, into=into)

    return exchange


def main() -> None:
    num_tokens, rounds = int(sys.argv[1]), int(sys.argv[2])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", int(os.environ["STORE_PORT"]), size, rank == 0
    )
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    torch.set_num_threads(1)
    assert dist.group.WORLD is not None
    world, shape, kernels = World(dist.group.WORLD), Shape(), suite.load()
    source = torch.Generator().manual_seed(rank)
    scores = torch.rand(num_tokens, shape.num_experts, generator=source)
    weights, ids = scores.sort(1, descending=True)
    top_k = shape.top_k
    routing = Routing(ids[:, :top_k].contiguous(), weights[:, :top_k].contiguous())
    hidden = torch.randn(num_tokens, shape.hidden_size, generator=source).bfloat16()
    stats = count(routing.expert_ids[:, None].numpy(), shape.num_experts)
    mesh = Mesh(num_ranks=size, ranks_per_node=size)
    placement = contiguous.place(stats, mesh, None, PlacementOptions())
    layout = Layout(placement.ranks, size, size, (LAYER,), rank)
    table = table_of(placement.experts_of(rank, LAYER), shape, kernels)
    tokens = [num_tokens] * size
    reference = layer(
        local.build(shape.num_experts, kernels),
        table_of(list(range(shape.num_experts)), shape, kernels), kernels, tokens, hidden, routing,
    )  # fmt: skip

    dispatchers: dict[str, Dispatcher] = {}
    for name in NAMES:
        dispatchers[name] = load("moe_serve.comm", name).build(world, layout, kernels)
    chooser = dispatchers["auto"]
    assert isinstance(chooser, auto.Auto)
    chooser.fit(LAYER, hidden[:1], top_k)
    found: dict[str, dict[str, object]] = {}

    def once(dispatcher: Dispatcher) -> Callable[[], torch.Tensor]:
        return lambda: layer(dispatcher, table, kernels, tokens, hidden, routing)

    calls: dict[str, Callable[[], object]] = {}
    for name, dispatcher in dispatchers.items():
        calls[name] = once(dispatcher)
        before = world.bytes_sent
        assert torch.equal(once(dispatcher)(), reference), name
    calls[BARE] = bare_exchanges(world, world.bytes_sent - before)  # auto is the last
    names = tuple(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for turn in range(len(names)):
            name = names[(turn + number) % len(names)]
            start_s = time.perf_counter()
            for _ in range(REPEATS):
                calls[name]()
            times[name].append((time.perf_counter() - start_s) / REPEATS * 1e3)
    ranks = layout.choose(LAYER, routing.expert_ids)
    for name in names:
        collectives, sent = world.num_collectives, world.bytes_sent
        calls[name]()
        chosen = chooser.chosen if name == "auto" else name
        found[name] = {
            "ms": times[name],
            "collectives": world.num_collectives - collectives,
            "bytes": (world.bytes_sent - sent) / num_tokens,
            "needed": needed_bytes(chosen, shape, ranks, rank, size),
            "chosen": chosen,
        }
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
