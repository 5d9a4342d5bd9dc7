"""As dedup, but one row comes back for each row that went: the sum of its experts there.

Not exact. Three collectives; of u ranks that a token's experts are on, u rows go and u come back.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moe_serve.comm._between import Meanwhile
from moe_serve.comm._layout import Layout
from moe_serve.comm._sums import Sums, SumsReceipt
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.kernels.exchange.base import RowPlan
from moe_serve.kernels.suite import Kernels
from moe_serve.types import Routing

IS_EXACT = False


class DedupSums(Sums):
    """See `comm.base.Dispatcher`."""

    def dispatch(
        self, layer: int, hidden: Tensor, routing: Routing, meanwhile: Meanwhile = None
    ) -> tuple[Inbox, Receipt]:
        world = self._world
        plan = RowPlan(world.size, width=routing.expert_ids.shape[1])
        weighted, rows, about = self._pack_weighted(layer, hidden, routing, plan)
        in_rows, (out_rows, each, _, pairs_out) = self._told(about)
        came = world.exchange(rows[: sum(out_rows)], out_rows, each, meanwhile)
        inbox, receipt = self._unpack_weighted(
            came, in_rows, weighted, hidden, routing, plan, about, sum(pairs_out)
        )
        return inbox, replace(receipt, in_rows=each, out_rows=out_rows)

    def _send_back(self, outbox: Tensor, receipt: Receipt) -> Tensor:
        assert isinstance(receipt, SumsReceipt)
        assert receipt.in_rows is not None
        assert receipt.out_rows is not None
        sums = self._summed(outbox, receipt)
        return self._world.exchange(sums, receipt.in_rows, receipt.out_rows)


def build(world: World, layout: Layout, kernels: Kernels) -> DedupSums:
    """Build the dispatcher of this rank."""
    return DedupSums(world, layout, kernels)
