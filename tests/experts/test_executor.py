"""Resident experts: each layer's rows reach that layer's experts, and are counted there."""

from __future__ import annotations

import torch

from moe_serve.comm.base import Inbox
from moe_serve.experts.executor import ResidentExperts
from moe_serve.types import Routing
from tests.experts.arenas import arena, random_experts, table
from tests.kernels.implementations import EACH, kernels
from tests.kernels.row_independence import same_bits


@EACH
def test_each_layer_has_its_own_experts(name: str) -> None:
    chosen = kernels(name)
    gate_up, down = random_experts(6, 32, 16, torch.float32)
    both = arena(chosen, [1, 4], gate_up.view(2, 3, 32, 32), down.view(2, 3, 32, 16))
    experts = ResidentExperts(chosen.moe, {layer: both.table(layer) for layer in (1, 4)}, 1)
    inbox = Inbox(torch.randn(5, 32), torch.tensor([0, 4, 2, 2, 1]), torch.tensor([2, 0, 3]))
    routing = Routing(torch.tensor([[0], [2], [2], [2], [0]]), torch.ones(5, 1))
    for layer, part in ((1, slice(0, 3)), (4, slice(3, 6))):
        alone = table(chosen, gate_up[part], down[part])
        want = chosen.moe(inbox.rows, inbox.row_of_pair, inbox.counts, alone)
        assert same_bits(experts.run(layer, inbox, routing, inbox.rows), want)
    assert experts.layers[1].uses.tolist() == [2, 0, 3]
    experts.run(4, inbox, routing, inbox.rows)
    assert experts.layers[1].uses.tolist() == [2, 0, 3]
    assert experts.layers[4].uses.tolist() == [4, 0, 6]
