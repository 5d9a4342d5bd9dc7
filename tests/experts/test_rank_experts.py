"""What a rank counts of the pairs that come to its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_serve.comm.base import Inbox
from moe_serve.experts.executor import ResidentExperts
from moe_serve.experts.rank_experts import RankExperts
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.types import Routing

TABLE = ExpertTable(
    torch.zeros(3, 64, dtype=torch.uint8),
    torch.arange(3, dtype=torch.int32),
    torch.zeros(3, dtype=torch.int64),
    hidden_size=4,
    intermediate_size=4,
    dtype=torch.float32,
)
ROUTING = Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def failing(rows: Tensor, row_of_pair: Tensor, counts: Tensor, experts: ExpertTable) -> Tensor:
    if len(row_of_pair) > 5:
        raise MemoryError("too many")
    return rows[row_of_pair]


def test_pairs_are_counted_also_where_there_is_room_for_more() -> None:
    experts = RankExperts(ResidentExperts(failing, {0: TABLE}, top_k=1))
    rows, counts = torch.ones(2, 4), torch.tensor([2, 0, 1])
    experts.run(0, Inbox(rows, torch.tensor([0, 1, 0]), counts), ROUTING, rows)
    assert experts.pairs_computed == 3
    with_room = Inbox(rows, torch.tensor([0, 1, 0, 0, 0]), counts, has_room=True)
    for _ in range(2):
        assert experts.run(0, with_room, ROUTING, rows).shape == (5, 4)
    assert experts.pairs_computed == 9
    # what fails has come as well, and its rows say so
    lost = Inbox(rows, torch.zeros(6, dtype=torch.int64), counts, has_room=True)
    assert bool(experts.run(0, lost, ROUTING, rows).isnan().all())
    assert experts.pairs_computed == 12
