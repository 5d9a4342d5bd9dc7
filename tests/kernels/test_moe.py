"""Expert MLPs against float64, on every kind of split of rows over experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_serve.kernels.moe import reference
from tests.kernels.row_independence import same_bits, subsets


def _weights(experts: int, hidden: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    gate_up = (torch.randn(experts, 2 * size, hidden) * hidden**-0.5).to(dtype)
    return gate_up, (torch.randn(experts, hidden, size) * size**-0.5).to(dtype)


def _by_hand(row: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    both = gate_up.double() @ row.double()
    gate, up = both.chunk(2)
    result: Tensor = down.double() @ (torch.nn.functional.silu(gate) * up)
    return result


@pytest.mark.parametrize(
    "counts",
    [[0, 0, 0], [1, 0, 0], [0, 0, 40], [3, 0, 5], [13, 1, 2], [16, 16, 16]],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_empty")
def test_equals_float64(counts: list[int]) -> None:
    gate_up, down = _weights(3, 63, 50, torch.float32)
    hidden = torch.randn(7, 63)
    row_of_pair = torch.randint(0, 7, (sum(counts),))
    got = reference.moe(hidden, row_of_pair, counts, gate_up, down)
    assert got.shape == (sum(counts), 63)
    pair = 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            want = _by_hand(hidden[row_of_pair[pair]], gate_up[expert], down[expert])
            torch.testing.assert_close(got[pair].double(), want, rtol=1e-4, atol=1e-5)
            pair += 1


def test_the_input_is_left_as_it_was() -> None:
    gate_up, down = _weights(2, 64, 64, torch.float32)
    hidden = torch.randn(32, 64)
    before = hidden.clone()
    reference.moe(hidden, torch.arange(32), [16, 16], gate_up, down)
    assert same_bits(hidden, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("hidden_size", "size"), [(64, 24), (256, 64), (1024, 384)])
def test_pairs_do_not_see_each_other(dtype: torch.dtype, hidden_size: int, size: int) -> None:
    gate_up, down = _weights(4, hidden_size, size, dtype)
    hidden = torch.randn(60, hidden_size).to(dtype)
    experts = torch.randint(0, 4, (60,))

    def run(rows: Tensor) -> Tensor:
        order = torch.sort(experts[rows], stable=True).indices
        counts = experts[rows].bincount(minlength=4).tolist()
        out = reference.moe(hidden, rows[order], counts, gate_up, down)
        back = torch.empty_like(out)
        back[order] = out
        return back

    whole = run(torch.arange(60))
    for rows, threads in subsets(60, seed=size, count=20):
        torch.set_num_threads(threads)
        assert same_bits(run(rows), whole[rows]), (len(rows), threads)


@pytest.mark.usefixtures("poisoned_empty")
def test_silu_does_not_see_where_a_value_stands() -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(400, 2 * 100)
    whole = reference.silu_and_mul(gate_up)
    for rows, threads in subsets(400, seed=1, count=30):
        torch.set_num_threads(threads)
        assert same_bits(reference.silu_and_mul(gate_up[rows]), whole[rows])
