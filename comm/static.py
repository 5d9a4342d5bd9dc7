"""Room of fixed size for each pair of ranks: no counts, the same shapes each time.

Two collectives. Rank-major: [ranks, capacity] rows out, unused ones naming no expert, and
[ranks, capacity, width] results back, where width is the most experts of a layer that a token can
have on one rank. The capacity is the step's most tokens, rounded up to a power of two, and at most
MOST_ROWS (`_rounds`): what does not fit goes in another round, nothing is dropped. Exact.

On a GPU a CUDA graph can hold dispatch, experts and combine: the host waits for nothing, and no
shape depends on the routing. The inbox has room for the most pairs that there may be, `counts`, on
the device, say how many there are, and results of none go nowhere. Such a graph is good for one
number of this rank's tokens, one capacity and number of rounds, and until a layer is placed anew;
the memory that it uses stays where it is. (With replicas chosen by water_filling there can be none:
they are chosen on the host.) A CPU's kernels know how many pairs there are, and make no such room.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_serve.comm._between import Meanwhile
from moe_serve.comm._layout import Layout
from moe_serve.comm._rounds import InRounds
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox, Receipt
from moe_serve.kernels.exchange.base import RowPlan
from moe_serve.kernels.suite import Kernels
from moe_serve.types import Routing


@dataclass(frozen=True, slots=True)
class StaticReceipt(Receipt):
    """place_of_pair: int64 [num_pairs], where in the slots for results each pair's goes."""

    place_of_pair: Tensor
    num_slots: int


class Static(InRounds):
    """See `comm.base.Dispatcher`."""

    def dispatch(
        self, layer: int, hidden: Tensor, routing: Routing, meanwhile: Meanwhile = None
    ) -> tuple[Inbox, Receipt]:
        top_k = routing.expert_ids.shape[1]
        width = min(top_k, max(self._layout.num_held(layer)))
        plan = RowPlan(self._world.size, self._capacity, self._rounds, width)
        assert hidden.shape[0] <= self._rounds * self._capacity, "the step has said another number"
        rows, packed = self._pack(layer, hidden, routing, plan)
        came = self._in_rounds(rows, self._room(rows.shape[0], rows), meanwhile)
        inbox, places, _ = self._unpack(came, None, hidden, top_k, plan)
        num_slots = rows.shape[0] * width
        return inbox, StaticReceipt(packed.place_of_choice, routing.weights, places, num_slots)

    def _send_back(self, outbox: Tensor, receipt: Receipt) -> Tensor:
        assert isinstance(receipt, StaticReceipt)
        num_slots, size, dtype = receipt.num_slots, outbox.shape[1], outbox.dtype
        results = self._buffers.take("results", num_slots, size, dtype)
        self._kernels.scatter_rows(outbox, receipt.place_of_pair, results)
        return self._in_rounds(results, self._buffers.take("home", num_slots, size, dtype))


def build(world: World, layout: Layout, kernels: Kernels) -> Static:
    """Build the dispatcher of this rank."""
    return Static(world, layout, kernels)
