"""A token's row once to each rank that needs it, a row for each expert back.

Exact; three collectives. Of u ranks that a token's k experts are on, u copies go out where
per_expert sends k.
"""

from __future__ import annotations

from torch import Tensor

from moe_serve.comm._between import Meanwhile
from moe_serve.comm._layout import Layout
from moe_serve.comm._rows import RowsOnce
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.kernels.exchange.base import RowPlan
from moe_serve.kernels.suite import Kernels
from moe_serve.types import Routing


class Dedup(RowsOnce):
    """See `comm.base.Dispatcher`."""

    def dispatch(
        self, layer: int, hidden: Tensor, routing: Routing, meanwhile: Meanwhile = None
    ) -> tuple[Inbox, Receipt]:
        world = self._world
        plan = RowPlan(world.size)
        rows, packed = self._pack(layer, hidden, routing, plan)
        in_rows, (out_rows, each, pairs_in, pairs_out) = self._told(packed)
        room = self._room(sum(each), rows)
        came = world.exchange(rows[: sum(out_rows)], out_rows, each, meanwhile, room)
        top_k = routing.expert_ids.shape[1]
        inbox, places, _ = self._unpack(came, in_rows, hidden, top_k, plan)
        return self._received(inbox, places, routing, packed, pairs_in, pairs_out)


def build(world: World, layout: Layout, kernels: Kernels) -> Dedup:
    """Build the dispatcher of this rank."""
    return Dedup(world, layout, kernels)
