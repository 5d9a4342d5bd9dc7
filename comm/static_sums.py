"""As static, but one row comes back for each row that went: the sum of its experts there.

Not exact. Two collectives; of a token's k results one for each rank travels.
"""

from __future__ import annotations

from torch import Tensor

from moe_serve.comm._between import Meanwhile
from moe_serve.comm._layout import Layout
from moe_serve.comm._rounds import InRounds
from moe_serve.comm._sums import Sums, SumsReceipt
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.kernels.exchange.base import RowPlan
from moe_serve.kernels.suite import Kernels
from moe_serve.types import Routing

IS_EXACT = False


class StaticSums(InRounds, Sums):
    """See `comm.base.Dispatcher`."""

    def dispatch(
        self, layer: int, hidden: Tensor, routing: Routing, meanwhile: Meanwhile = None
    ) -> tuple[Inbox, Receipt]:
        top_k = routing.expert_ids.shape[1]
        plan = RowPlan(self._world.size, self._capacity, self._rounds, top_k)
        weighted, rows, about = self._pack_weighted(layer, hidden, routing, plan)
        came = self._in_rounds(rows, self._room(rows.shape[0], rows), meanwhile)
        return self._unpack_weighted(came, None, weighted, hidden, routing, plan, about)

    def _send_back(self, outbox: Tensor, receipt: Receipt) -> Tensor:
        assert isinstance(receipt, SumsReceipt)
        sums = self._summed(outbox, receipt)
        return self._in_rounds(
            sums, self._buffers.take("home", len(sums), sums.shape[1], sums.dtype)
        )


def build(world: World, layout: Layout, kernels: Kernels) -> StaticSums:
    """Build the dispatcher of this rank."""
    return StaticSums(world, layout, kernels)
