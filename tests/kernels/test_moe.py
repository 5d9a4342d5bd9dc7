"""Expert MLPs against float64, on every kind of split of rows over experts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_serve.kernels.moe.base import HEADER_BYTES, plain_weights
from tests.experts.arenas import random_experts, table
from tests.kernels.implementations import (
    DTYPES,
    EACH,
    EACH_EXACT,
    EACH_NATIVE,
    EXACT,
    INTERPRETED,
    TRITON,
    kernels,
)
from tests.kernels.row_independence import check_rows, same_bits

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
EACH_TRITON = pytest.mark.parametrize("name", TRITON)
# numpy, behind Triton's interpreter, warns of what a GPU computes in silence
UNUSUAL = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def _silu(values: Tensor) -> Tensor:
    result: Tensor = torch.nn.functional.silu(values)
    return result


def _by_hand(
    hidden: Tensor, row_of_pair: Tensor, counts: list[int], gate_up: Tensor, down: Tensor
) -> Tensor:
    """Compute in float64, rounded where the reference says: float64 [num_pairs, hidden_size]."""
    dtype = hidden.dtype
    parts = []
    for expert, rows in enumerate(torch.split(hidden[row_of_pair].double(), counts)):
        gate, up = (rows @ gate_up[expert].double().T).to(dtype).double().chunk(2, dim=1)
        parts.append((_silu(gate) * up).to(dtype).double() @ down[expert].double().T)
    return torch.cat(parts)


@EACH
@DTYPES
@pytest.mark.parametrize(
    ("counts", "hidden_size", "size"),
    [
        ([0, 0, 0], 63, 50), ([1, 0, 0], 63, 50), ([0, 0, 40], 63, 50), ([3, 0, 5], 7, 1),
        ([13, 1, 2], 1, 7), ([16, 16, 16], 64, 64), ([7, 15, 17], 31, 33), ([12, 2, 1], 100, 15),
        ([500, 0, 193], 33, 17),  # more than the native kernels multiply at once
        ([0, 2, 0], 256, 1000),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("poisoned_empty")
def test_equals_float64(
    name: str, dtype: torch.dtype, counts: list[int], hidden_size: int, size: int
) -> None:
    if name in INTERPRETED:
        size = min(size, 300)
    gate_up, down = random_experts(3, hidden_size, size, dtype)
    hidden = torch.randn(7, hidden_size).to(dtype)
    row_of_pair = torch.randint(0, 7, (sum(counts),))
    experts = table(kernels(name), gate_up, down)
    got = kernels(name).moe(hidden, row_of_pair, torch.tensor(counts), experts)
    want = _by_hand(hidden, row_of_pair, counts, gate_up, down)
    assert got.dtype == dtype
    assert got.shape == (sum(counts), hidden_size)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance / 2)
    if dtype == torch.bfloat16:  # rounded in the same places, but for ties and what follows them
        assert int((got != want.to(dtype)).sum()) <= 0.05 * want.numel() + 1


@EACH
def test_uses_are_counted(name: str) -> None:
    gate_up, down = random_experts(3, 16, 16, torch.float32)
    experts = table(kernels(name), gate_up, down)
    for counts in ([2, 0, 5], [0, 0, 1]):
        rows = torch.zeros(sum(counts), dtype=torch.int64)
        kernels(name).moe(torch.randn(1, 16), rows, torch.tensor(counts), experts)
    assert experts.uses.tolist() == [2, 0, 6]


@EACH
@DTYPES
def test_slots_say_where_an_expert_is(name: str, dtype: torch.dtype) -> None:
    gate_up, down = random_experts(5, 40, 24, dtype)
    experts = table(kernels(name), gate_up, down)
    hidden = torch.randn(6, 40).to(dtype)
    rows, counts = torch.randint(0, 6, (9,)), torch.tensor([4, 0, 5])
    # expert 1 is absent, and asked nothing
    slots = torch.tensor([3, -1, 0], dtype=torch.int32)
    moved = replace(experts, slot_of_expert=slots, uses=torch.zeros(3, dtype=torch.int64))
    got = kernels(name).moe(hidden, rows, counts, moved)
    plain = torch.tensor([0, 0, 0, 4, 0]), torch.tensor([5, 0, 0, 0, 0])
    first = kernels(name).moe(hidden, rows[:4], plain[0], experts)
    last = kernels(name).moe(hidden, rows[4:], plain[1], experts)
    assert same_bits(got, torch.cat([first, last]))


@EACH
@DTYPES
def test_the_input_is_left_as_it_was_and_strides_do_not_matter(
    name: str, dtype: torch.dtype
) -> None:
    gate_up, down = random_experts(2, 50, 64, dtype)
    experts = table(kernels(name), gate_up, down)
    wide = torch.randn(32, 61).to(dtype)
    before = wide.clone()
    pairs, counts = torch.arange(32), torch.tensor([16, 16])
    got = kernels(name).moe(wide[:, 5:55], pairs, counts, experts)
    assert same_bits(wide, before)
    assert same_bits(got, kernels(name).moe(wide[:, 5:55].clone(), pairs, counts, experts))


@EACH_NATIVE
@DTYPES
@pytest.mark.parametrize(("hidden_size", "size"), [(1, 1), (7, 5), (33, 31), (64, 48), (50, 65)])
def test_packed_records_hold_each_weight_once_and_zeros(
    name: str, dtype: torch.dtype, hidden_size: int, size: int
) -> None:
    record_bytes = kernels(name).record_bytes(hidden_size, size, dtype)
    records = torch.full((3, record_bytes + 128), 255, dtype=torch.uint8)  # all bits: NaN
    gate_up, down = plain_weights(records, hidden_size, size, dtype)
    for slot in range(3):  # small whole numbers, which bfloat16 holds
        gate_up[slot] = slot + 1.0
        down[slot] = slot + 11.0
    kernels(name).pack_records_(records, hidden_size, size, dtype)
    for slot, record in enumerate(records):
        packed = record[HEADER_BYTES:record_bytes].view(dtype)
        assert int((packed == slot + 1.0).sum()) == gate_up[slot].numel()
        assert int((packed == slot + 11.0).sum()) == down[slot].numel()
        assert int((packed == 0).sum()) == packed.numel() - 3 * hidden_size * size
        rest = torch.cat([record[:HEADER_BYTES], record[record_bytes:]])
        assert bool((rest == 255).all()), "neither the header nor what follows is the kernels'"


@EACH
@DTYPES
def test_packing_does_not_depend_on_threads(name: str, dtype: torch.dtype) -> None:
    gate_up, down = random_experts(7, 33, 50, dtype)
    records = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        records.append(table(kernels(name), gate_up, down).records)
    assert torch.equal(records[0], records[1])
    assert torch.equal(records[0], records[2])


@pytest.mark.parametrize(
    ("name", "hidden_size", "size"),
    [
        (name, *sizes)
        for name in EXACT
        for sizes in (
            [(136, 40)] if name in TRITON else [(64, 24), (256, 64), (1024, 384), (2048, 40)]
        )
    ],
)
@DTYPES
def test_pairs_do_not_see_each_other(
    name: str, dtype: torch.dtype, hidden_size: int, size: int
) -> None:
    gate_up, down = random_experts(4, hidden_size, size, dtype)
    hidden = torch.randn(60, hidden_size).to(dtype)
    # gates and ups are 0 but for rounding, which any other order changes
    half = hidden_size // 2
    gate_up[:, :, half:] = gate_up[:, :, :half].roll(5, -1)
    hidden[:, half:] = -hidden[:, :half].roll(5, -1)
    experts = table(kernels(name), gate_up * 1000, down)
    expert_of_row = torch.randint(0, 4, (60,))

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        order = torch.sort(expert_of_row[rows], stable=True).indices
        counts = expert_of_row[rows].bincount(minlength=4)
        out = kernels(name).moe(hidden, rows[order], counts, experts)
        back = torch.empty_like(out)
        back[order] = out
        return (back,)

    assert int(run(torch.arange(60))[0].count_nonzero()) > 1000, "no rounding to compare"
    check_rows(name, 60, hidden_size, run)


@EACH_EXACT
@DTYPES
def test_many_rows_of_an_expert_do_not_see_each_other(name: str, dtype: torch.dtype) -> None:
    gate_up, down = random_experts(2, 64, 40, dtype)
    experts = table(kernels(name), gate_up, down)
    hidden = torch.randn(400, 64).to(dtype)

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        return (kernels(name).moe(hidden, rows, torch.tensor([0, len(rows)]), experts),)

    check_rows(name, 400, 0, run)


@UNUSUAL
@EACH
@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("hidden_size", "size"), [(64, 24), (33, 31)])
def test_what_is_not_finite_stays_in_its_row(
    name: str, dtype: torch.dtype, hidden_size: int, size: int, bad: float
) -> None:
    gate_up, down = random_experts(3, hidden_size, size, dtype)
    experts = table(kernels(name), gate_up, down)
    hidden = torch.randn(30, hidden_size).to(dtype)
    pairs, counts = torch.arange(30), torch.tensor([13, 1, 16])
    want = kernels(name).moe(hidden, pairs, counts, experts)
    broken = hidden.clone()
    # at the first and last column too: beside the rows before and after
    places = torch.tensor([0, 10, 13, 29])
    broken[places, torch.tensor([hidden_size - 1, 0, 7, 5])] = bad
    got = kernels(name).moe(broken, pairs, counts, experts)
    assert not bool(got[places].isfinite().all(-1).any())
    sound = torch.ones(30, dtype=torch.bool).index_fill(0, places, False)
    assert same_bits(got[sound], want[sound])
    # nor does it stay behind in memory that the next call works in
    assert same_bits(kernels(name).moe(hidden, pairs, counts, experts), want)


@EACH
@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 1), (3, 7), (17, 33), (5, 100), (40, 1000)])
@pytest.mark.usefixtures("poisoned_empty")
def test_silu_equals_float64(name: str, dtype: torch.dtype, rows: int, size: int) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(rows, 2 * size) * 10).to(dtype)
    got = kernels(name).silu_and_mul(gate_up)
    gate, up = gate_up.double().chunk(2, dim=1)
    want = _silu(gate) * up
    assert got.shape == (rows, size)
    torch.testing.assert_close(got, want.to(dtype), rtol=2**-7, atol=1e-6)
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@UNUSUAL
@EACH
def test_silu_at_its_ends(name: str) -> None:
    gates = [0.0, -0.0, 90.0, -90.0, 3e38, -3e38, float("inf"), float("nan"), 1e-40]
    gate_up = torch.tensor([gates + [2.0] * len(gates)])
    got = kernels(name).silu_and_mul(gate_up)[0]
    assert got[:2].tolist() == [0.0, 0.0]
    assert got[2:3].tolist() == [180.0]
    assert abs(float(got[3])) < 1e-35
    assert float(got[5]) == 0.0
    assert got[[4, 6]].tolist() == [float("inf")] * 2
    assert bool(got[7].isnan())
    assert 0 <= float(got[8]) < 1e-39


@EACH
@DTYPES
@pytest.mark.parametrize("size", [64, 100])
@pytest.mark.usefixtures("poisoned_empty")
def test_silu_does_not_see_where_a_value_stands(name: str, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(300, 2 * size).to(dtype)
    check_rows(name, 300, 1, lambda rows: (kernels(name).silu_and_mul(gate_up[rows]),))
    # one value in every column
    column = torch.randn(50, 1).to(dtype)
    out = kernels(name).silu_and_mul(column.expand(50, 2 * size).contiguous())
    for first, other in itertools.pairwise(range(0, size, 7)):
        assert same_bits(out[:, first], out[:, other])


@EACH
@DTYPES
@pytest.mark.usefixtures("poisoned_empty")
def test_experts_may_run_in_any_number_of_calls(name: str, dtype: torch.dtype) -> None:
    gate_up, down = random_experts(6, 40, 24, dtype)
    experts = table(kernels(name), gate_up, down)
    hidden = torch.randn(9, 40).to(dtype)
    counts = torch.tensor([4, 0, 5, 1, 70 if name in INTERPRETED else 300, 2])
    rows = torch.randint(0, 9, (int(counts.sum()),))
    want = kernels(name).moe(hidden, rows, counts, experts)
    whole_uses = experts.uses.clone()
    for calls in ([[0, 1, 2, 3, 4, 5]], [[4], [0, 1, 5], [2, 3]], [[5], [4], [3], [2], [0]]):
        experts.uses.zero_()
        out = hidden.new_empty(len(rows), 40)  # poisoned
        starts = [0, *counts.cumsum(0).tolist()]
        run: set[int] = set()
        for chosen in calls:
            only = torch.zeros(6, dtype=torch.uint8)
            only[chosen] = 1
            given = kernels(name).moe(hidden, rows, counts, experts, only, out)
            assert given.data_ptr() == out.data_ptr(), "the rows given are those filled"
            run.update(chosen)
            for expert in range(6):
                part = slice(starts[expert], starts[expert + 1])
                if expert in run:
                    assert same_bits(out[part], want[part])
                else:
                    assert bool(out[part].isnan().all()), "another expert's rows were written"
        assert same_bits(out, want)
        assert torch.equal(experts.uses, whole_uses), "each use counts once"


@EACH
def test_experts_that_do_not_run_need_no_slot(name: str) -> None:
    gate_up, down = random_experts(3, 16, 16, torch.float32)
    experts = table(kernels(name), gate_up, down)
    hidden, rows, counts = torch.randn(4, 16), torch.randint(0, 4, (7,)), torch.tensor([2, 3, 2])
    want = kernels(name).moe(hidden, rows, counts, experts)
    out = torch.empty(7, 16)
    for expert in (2, 0, 1):
        slots = torch.full((3,), -1, dtype=torch.int32)
        slots[expert] = expert
        only = torch.zeros(3, dtype=torch.uint8)
        only[expert] = 1
        alone = replace(experts, slot_of_expert=slots)
        kernels(name).moe(hidden, rows, counts, alone, only, out)
    assert same_bits(out, want)


@EACH
@pytest.mark.parametrize("shape", [(6, 16), (7, 15)])
def test_an_output_of_another_shape_is_refused(name: str, shape: tuple[int, int]) -> None:
    gate_up, down = random_experts(3, 16, 16, torch.float32)
    experts = table(kernels(name), gate_up, down)
    rows, counts = torch.zeros(7, dtype=torch.int64), torch.tensor([2, 3, 2])
    with pytest.raises((AssertionError, RuntimeError)):
        kernels(name).moe(torch.randn(1, 16), rows, counts, experts, None, torch.empty(shape))


@EACH_TRITON
@DTYPES
@pytest.mark.parametrize(
    "counts",
    [
        [15, 0, 16, 17], [63, 64, 0, 65], [129, 127, 0, 128], [1, 1, 1, 1], [0, 2, 0, 0],
        [0, 0, 0, 300], [400, 0, 1, 0],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("poisoned_empty")
def test_tiles_end_where_an_expert_s_pairs_do(
    name: str, dtype: torch.dtype, counts: list[int]
) -> None:
    gate_up, down = random_experts(4, 24, 33, dtype)
    hidden = torch.randn(9, 24).to(dtype)
    rows = torch.randint(0, 9, (sum(counts),))
    got = kernels(name).moe(hidden, rows, torch.tensor(counts), table(kernels(name), gate_up, down))
    want = _by_hand(hidden, rows, counts, gate_up, down)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance / 2)


@EACH_TRITON
@DTYPES
@pytest.mark.parametrize("is_chosen", [False, True], ids=["all", "some"])
@pytest.mark.usefixtures("poisoned_empty")
def test_experts_without_a_slot_are_left_out_and_told(
    name: str, dtype: torch.dtype, is_chosen: bool
) -> None:
    from moe_serve.kernels.moe.triton import missing  # which needs Triton

    gate_up, down = random_experts(6, 20, 12, dtype)
    whole = table(kernels(name), gate_up, down)
    hidden, counts = torch.randn(9, 20).to(dtype), torch.tensor([2, 0, 70, 3, 1, 4])
    rows = torch.randint(0, 9, (80,))
    want = kernels(name).moe(hidden, rows, counts, whole)
    absent = [1, 2, 4]
    slots = whole.slot_of_expert.clone()
    slots[absent] = -1
    part = replace(whole, slot_of_expert=slots, uses=torch.full((6,), 5))
    only = torch.tensor([1, 1, 1, 0, 0, 1], dtype=torch.uint8) if is_chosen else None
    asked = [0, 1, 2, 5] if is_chosen else list(range(6))
    ran = [expert for expert in asked if expert not in absent]
    flags, total = missing(counts, slots, only)
    assert (flags.dtype, total.dtype) == (torch.uint8, torch.int32)
    assert flags.nonzero().flatten().tolist() == [e for e in asked if e in (2, 4)]
    assert total.tolist() == [int(flags.sum())]
    out = torch.empty(80, 20, dtype=dtype)
    kernels(name).moe(hidden, rows, counts, part, only, out)
    starts = [0, *counts.cumsum(0).tolist()]
    for expert in range(6):
        own = slice(starts[expert], starts[expert + 1])
        if expert in ran:
            assert same_bits(out[own], want[own])
        else:
            assert bool(out[own].isnan().all()), "rows of an expert that did not run were written"
    assert part.uses.tolist() == [5 + int(counts[e]) * (e in ran) for e in range(6)]
    # those that were missing, once they are there, complete the uses and the rows
    kernels(name).moe(
        hidden, rows, counts, replace(part, slot_of_expert=whole.slot_of_expert), flags, out
    )
    assert bool((part.uses - 5 == counts)[asked].all())
    done = torch.isin(torch.arange(6).repeat_interleave(counts), torch.tensor(asked))
    assert same_bits(out[done], want[done])


@EACH_TRITON
def test_no_expert_is_missing_where_none_has_pairs(name: str) -> None:
    from moe_serve.kernels.moe.triton import missing  # which needs Triton

    for num_experts in (1, 5):
        slots = torch.full((num_experts,), -1, dtype=torch.int32)
        flags, total = missing(torch.zeros(num_experts, dtype=torch.int64), slots)
        assert flags.tolist() == [0] * num_experts
        assert total.tolist() == [0]


@EACH_TRITON
def test_slots_may_be_far_into_memory(name: str) -> None:
    dtype = torch.bfloat16
    gate_up, down = random_experts(1, 16, 8, dtype)
    near = table(kernels(name), gate_up, down)
    record_bytes, num_slots = 2**20, 2**12 + 10
    # of 4 GB, of which two records are touched
    far = torch.empty(num_slots, record_bytes, dtype=torch.uint8)
    used = near.records.shape[1]
    slots = torch.tensor([num_slots - 1, num_slots // 2 + 3], dtype=torch.int32)
    for slot in slots.tolist():
        far[slot, :used] = near.records[0]
    moved = replace(near, records=far, slot_of_expert=slots, uses=torch.zeros(2, dtype=torch.int64))
    hidden = torch.randn(3, 16).to(dtype)
    pairs = torch.tensor([0, 1, 2, 1])
    want = kernels(name).moe(hidden, pairs, torch.tensor([4]), near)
    assert same_bits(kernels(name).moe(hidden, pairs, torch.tensor([3, 1]), moved), want)


@EACH_TRITON
@DTYPES
def test_a_gpu_is_not_waited_for(name: str, dtype: torch.dtype) -> None:
    from moe_serve.kernels.moe.triton import missing  # both of which need Triton
    from tests.kernels.no_waiting import no_waiting

    experts = table(kernels(name), *random_experts(5, 20, 12, dtype))
    hidden = torch.randn(9, 20).to(dtype)
    only = torch.tensor([1, 1, 0, 0, 1], dtype=torch.uint8)
    for counts in (torch.zeros(5, dtype=torch.int64), torch.tensor([2, 0, 70, 3, 1])):
        rows = torch.arange(int(counts.sum())) % 9
        out = torch.empty(len(rows), 20, dtype=dtype)
        with no_waiting():
            kernels(name).moe(hidden, rows, counts, experts)
            kernels(name).moe(hidden, rows, counts, experts, only, out)
            missing(counts, experts.slot_of_expert, only)
            kernels(name).silu_and_mul(hidden)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(("hidden_size", "size"), [(2048, 768), (200, 72)])
def test_other_pairs_do_not_show_on_a_gpu(dtype: torch.dtype, hidden_size: int, size: int) -> None:
    gpu = kernels("triton-exact")
    gate_up, down = random_experts(4, hidden_size, size, dtype)
    on_host = table(gpu, gate_up, down)
    experts = replace(
        on_host,
        records=on_host.records.to(gpu.device),
        slot_of_expert=on_host.slot_of_expert.to(gpu.device),
        uses=on_host.uses.to(gpu.device),
    )
    hidden = torch.randn(4000, hidden_size).to(gpu.device, dtype)
    experts_of_rows = torch.randint(0, 4, (4000,)).sort().values
    counts = experts_of_rows.bincount(minlength=4)

    def run(rows: Tensor) -> Tensor:
        counts = experts_of_rows[rows].bincount(minlength=4)
        return gpu.moe(hidden, rows.to(gpu.device), counts.to(gpu.device), experts)

    whole = run(torch.arange(4000))
    want = _by_hand(hidden.cpu(), torch.arange(4000), counts.tolist(), gate_up, down)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(whole.cpu().double(), want, rtol=tolerance, atol=tolerance / 2)
    for count in (1, 4, 60, 300, 1500):
        rows = torch.randperm(4000)[:count].sort().values
        assert same_bits(run(rows), whole[rows.to(gpu.device)]), count
