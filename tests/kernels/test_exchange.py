"""Rows between ranks: every choice's row arrives, and its result comes back to its place."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_serve.kernels.exchange import reference
from moe_serve.kernels.exchange.base import NAME, Packed, Replicas, RowPlan, Unpacked, row_bytes
from moe_serve.kernels.gpu.row_tiles import Tiles
from tests.kernels.implementations import (
    DTYPES,
    EACH,
    EACH_NATIVE,
    EACH_ON_A_GPU,
    IMPLEMENTATIONS,
    INTERPRETED,
    TRITON,
    each_exact_with,
    kernels,
)
from tests.kernels.row_independence import same_bits

pytestmark = pytest.mark.usefixtures("poisoned_integers")
POISON_BYTE = 0xA5
EACH_HOST = pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n not in TRITON])
# capacity and width: slots for both (static), for rows (all_gather), for neither (dedup)
LAYOUTS = pytest.mark.parametrize("layout", ["slots", "row slots", "packed"])


class Case(NamedTuple):
    hidden: Tensor
    expert_ids: Tensor
    replicas: Replicas
    num_experts: int
    num_ranks: int

    def ranks(self) -> Tensor:
        """Return the rank of each choice, one by one."""
        ids, (ranks, counts) = self.expert_ids, self.replicas
        return torch.tensor(
            [[int(ranks[e, t % int(counts[e])]) for e in row] for t, row in enumerate(ids.tolist())]
        ).view(ids.shape)


def case_of(
    seed: int, num_tokens: int, top_k: int, num_experts: int, num_ranks: int, size: int,
    dtype: torch.dtype, most_replicas: int,
) -> Case:  # fmt: skip
    torch.manual_seed(seed)
    chance = random.Random(seed)
    chosen = [
        chance.sample(range(num_ranks), chance.randint(1, min(most_replicas, num_ranks)))
        for _ in range(num_experts)
    ]
    most = max(map(len, chosen), default=1)
    replicas = Replicas(
        torch.tensor([ranks + [-99] * (most - len(ranks)) for ranks in chosen]).view(-1, most),
        torch.tensor([len(ranks) for ranks in chosen], dtype=torch.int64),
    )
    ids = [torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)]
    expert_ids = torch.stack(ids) if ids else torch.zeros(0, top_k, dtype=torch.int64)
    hidden = torch.randn(num_tokens, size).to(dtype)
    return Case(hidden, expert_ids, replicas, num_experts, num_ranks)


def plan_of(layout: str, case: Case) -> RowPlan:
    num_tokens, top_k = case.expert_ids.shape
    if layout == "packed":
        return RowPlan(case.num_ranks)
    if layout == "row slots":
        return RowPlan(case.num_ranks, capacity=num_tokens)
    capacity = max(1, num_tokens // 3)  # several rounds
    return RowPlan(case.num_ranks, capacity, max(1, -(-num_tokens // capacity)), top_k)


def packed_by(name: str, case: Case, plan: RowPlan) -> tuple[Tensor, Packed]:
    num_tokens, top_k = case.expert_ids.shape
    size = row_bytes(case.hidden.shape[1], case.hidden.dtype, top_k)
    shape = plan.num_rows(num_tokens, top_k), size
    out = torch.full(shape, POISON_BYTE, dtype=torch.uint8)
    pack_rows = kernels(name).pack_rows
    return out, pack_rows(case.hidden, case.expert_ids, case.replicas, plan, out)


def rows_for(rank: int, out: Tensor, packed: Packed, plan: RowPlan) -> Tensor:
    """Return what this one rank sends to another."""
    if plan.capacity is not None:
        slots = out.view(plan.rounds, plan.num_ranks, plan.capacity, out.shape[1])
        return slots[:, rank].flatten(0, 1)
    counts = packed.rows_of_rank.tolist()
    return out[sum(counts[:rank]) : sum(counts[: rank + 1])]


def cut(name: str, got: Unpacked, num_rows: int) -> Unpacked:
    """Return what there is of what a GPU has room for; what is none must say so."""
    if name not in TRITON:
        return got
    num_pairs = int(got.counts.sum())
    assert got.row_of_pair[num_pairs:].tolist() == [0] * (len(got.row_of_pair) - num_pairs)
    assert got.place_of_pair[num_pairs:].tolist() == [-1] * (len(got.row_of_pair) - num_pairs)
    return got._replace(
        rows=got.rows[:num_rows],
        row_of_pair=got.row_of_pair[:num_pairs],
        place_of_pair=got.place_of_pair[:num_pairs],
    )


def check_equal(name: str, case: Case, layout: str) -> None:
    """Check that integers and bytes are those of the reference."""
    num_experts, top_k = case.num_experts, case.expert_ids.shape[1]
    size, dtype = case.hidden.shape[1], case.hidden.dtype
    plan = plan_of(layout, case)
    (out, packed), (wanted, expected) = (packed_by(one, case, plan) for one in (name, "reference"))
    for mine, theirs in zip(packed, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(out, wanted), "also what nobody needs is left alone"
    num_rows = len(out) if layout != "packed" else int(packed.rows_of_rank.sum())
    came = out[:num_rows]
    rows_of_rank = None if layout == "slots" else packed.rows_of_rank
    rooms = [torch.full((num_rows, size), float("nan"), dtype=dtype) for _ in range(2)]
    got, want = (
        kernels(one).unpack_rows(came, rows_of_rank, num_experts, top_k, plan, room)
        for one, room in zip((name, "reference"), rooms, strict=True)
    )
    got = cut(name, got, len(want.rows))
    assert same_bits(got.rows, want.rows)
    told = () if rows_of_rank is None else ("pairs_of_rank",)
    for field in ("row_of_pair", "place_of_pair", "counts", *told):
        assert torch.equal(getattr(got, field), getattr(want, field)), field


CASES = [
    # tokens, top_k, experts, ranks, size
    (0, 2, 5, 3, 8), (1, 1, 1, 1, 1), (1, 4, 32, 4, 512), (7, 3, 9, 2, 33), (40, 1, 1, 4, 5),
    (30, 4, 16, 3, 24), (65, 8, 40, 5, 7), (12, 2, 300, 8, 16),
]  # fmt: skip
FEW_CASES = [(0, 2, 5, 3, 8), (1, 1, 1, 1, 1), (5, 3, 7, 2, 300)]


@each_exact_with("sizes", CASES, FEW_CASES)
@DTYPES
@LAYOUTS
@pytest.mark.parametrize("most_replicas", [1, 3])
def test_every_choice_gets_its_result_back(
    name: str, dtype: torch.dtype, layout: str, most_replicas: int, sizes: tuple[int, ...]
) -> None:
    """One rank's tokens on all ranks in turn, each of which marks rows with the expert it ran."""
    num_tokens, top_k, num_experts, num_ranks, size = sizes
    case = case_of(1, num_tokens, top_k, num_experts, num_ranks, size, dtype, most_replicas)
    plan = plan_of(layout, case)
    out, packed = packed_by(name, case, plan)
    ranks = case.ranks()
    visits = [len({t for t, c in (ranks == r).nonzero().tolist()}) for r in range(num_ranks)]
    if plan.capacity is None:
        assert packed.rows_of_rank.tolist() == visits
    else:
        assert packed.rows_of_rank.tolist() == [plan.rounds * plan.capacity] * num_ranks
    assert packed.pairs_of_rank.tolist() == [int((ranks == r).sum()) for r in range(num_ranks)]
    home, num_back = [], 0
    for rank in range(num_ranks):
        came = rows_for(rank, out, packed, plan)
        rows = torch.full((len(came), size), float("nan"), dtype=dtype)
        came_from = torch.zeros(num_ranks, dtype=torch.int64)
        came_from[-1] = len(came)  # as if all were of the last rank
        rows_of_rank = None if layout == "slots" else came_from
        got = kernels(name).unpack_rows(came, rows_of_rank, num_experts, top_k, plan, rows)
        here = sorted(
            (int(case.expert_ids[t, c]), t, c) for t, c in (ranks == rank).nonzero().tolist()
        )
        ids = torch.tensor([expert for expert, _, _ in here], dtype=torch.int64)
        assert got.counts.tolist() == ids.bincount(minlength=num_experts).tolist()
        got = cut(name, got, visits[rank])
        assert got.rows.shape == (visits[rank], size)
        tokens = [token for _, token, _ in here]
        assert same_bits(got.rows[got.row_of_pair], case.hidden[tokens])
        if rows_of_rank is not None:
            assert got.pairs_of_rank.tolist() == [0] * (num_ranks - 1) + [len(here)]
        num_results = len(here) if plan.width is None else len(came) * plan.width
        results = torch.full((num_results, 2), -1, dtype=torch.float32)
        marks = torch.tensor([[expert, token] for expert, token, _ in here]).view(-1, 2).float()
        kernels(name).scatter_rows(marks, got.place_of_pair, results)
        assert int((results[:, 0] >= 0).sum()) == len(here)
        home.append(results)
        num_back += len(here)
    assert num_back == num_tokens * top_k
    if plan.width is None:
        came_home = torch.cat(home)
    else:  # round, rank, slot, turn
        in_rounds = [part.view(plan.rounds, -1, 2) for part in home]
        came_home = torch.stack(in_rounds, 1).reshape(-1, 2)
    back = came_home[packed.place_of_choice]
    assert torch.equal(back[..., 0], case.expert_ids.float())
    assert torch.equal(back[..., 1], torch.arange(num_tokens)[:, None].expand(-1, top_k).float())


@each_exact_with("sizes", CASES, FEW_CASES)
@DTYPES
@LAYOUTS
def test_it_equals_the_reference(
    name: str, dtype: torch.dtype, layout: str, sizes: tuple[int, ...]
) -> None:
    num_tokens, top_k, num_experts, num_ranks, size = sizes
    for seed in range(1 if name in INTERPRETED else 4):
        case = case_of(seed, num_tokens, top_k, num_experts, num_ranks, size, dtype, 2)
        check_equal(name, case, layout)


@EACH
def test_all_to_one_rank(name: str) -> None:
    """The others get nothing, not even a row."""
    replicas = Replicas(torch.full((6, 1), 2), torch.ones(6, dtype=torch.int64))
    ids = torch.stack([torch.randperm(6)[:4] for _ in range(5)])
    case = Case(torch.randn(5, 3), ids, replicas, 6, 4)
    _, packed = packed_by(name, case, RowPlan(4))
    assert packed.rows_of_rank.tolist() == [0, 0, 5, 0]
    assert packed.pairs_of_rank.tolist() == [0, 0, 20, 0]
    assert packed.place_of_choice.flatten().tolist() == list(range(20))


@EACH_HOST
def test_an_expert_that_there_is_none_of_is_refused(name: str) -> None:
    packed = torch.zeros(2, row_bytes(4, torch.float32, 1), dtype=torch.uint8)
    packed[:, 16:].view(NAME)[:] = torch.tensor([[0], [9]], dtype=NAME)
    counts = torch.tensor([2])
    with pytest.raises(ValueError, match="expert"):
        kernels(name).unpack_rows(packed, counts, 9, 1, RowPlan(1), torch.zeros(2, 4))


@EACH_HOST
def test_a_place_outside_is_refused(name: str) -> None:
    with pytest.raises(IndexError):
        kernels(name).scatter_rows(torch.zeros(2, 3), torch.tensor([0, 4]), torch.zeros(4, 3))


@EACH_ON_A_GPU
def test_a_gpu_passes_over_what_it_cannot_refuse(name: str) -> None:
    packed = torch.zeros(3, row_bytes(4, torch.float32, 1), dtype=torch.uint8)
    packed[:, :16] = torch.arange(12.0).view(3, 4).view(torch.uint8)
    packed[:, 16:].view(NAME)[:] = torch.tensor([[9], [-7], [8]], dtype=NAME)
    rows = torch.zeros(3, 4)
    got = kernels(name).unpack_rows(packed, torch.tensor([3]), 9, 1, RowPlan(1), rows)
    assert got.counts.tolist() == [0] * 8 + [1]
    assert got.pairs_of_rank.tolist() == [1]
    assert (got.row_of_pair.tolist(), got.place_of_pair.tolist()) == ([0, 0, 0], [0, -1, -1])
    assert got.rows[0].tolist() == [8.0, 9.0, 10.0, 11.0]
    out = torch.zeros(4, 3)
    places = torch.tensor([2, 4, -1, -5, 2**40])
    kernels(name).scatter_rows(torch.ones(5, 3), places, out)
    assert out.sum(1).tolist() == [0, 0, 3, 0]


@EACH_ON_A_GPU
@LAYOUTS
def test_what_is_looked_at_in_parts_is_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, layout: str
) -> None:
    """Many tokens and rows take more programs than one for a rank or an expert."""
    from moe_serve.kernels.exchange import triton  # which a machine may not have

    monkeypatch.setattr(triton, "CHOICES", (Tiles(4, 16, 4),))
    monkeypatch.setattr(triton, "_LEAST_CHUNKS", 1)
    check_equal(name, case_of(3, 10, 3, 4, 2, 6, torch.bfloat16, 2), layout)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton, and no GPU")
def test_no_number_of_replicas_is_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled, they are as many as tokens, which another step has another number of."""
    from triton.runtime.interpreter import InterpretedFunction  # which a machine may not have

    launched: dict[str, list[dict[str, int]]] = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: int) -> None:
        launched.setdefault(kernel.fn.__name__, []).append(constants)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    case = case_of(1, 5, 2, 4, 2, 8, torch.float32, 1)
    plan = plan_of("packed", case)
    size = row_bytes(8, torch.float32, 2)
    for most in (1, 3, 5):
        replicas = Replicas(torch.zeros(4, most, dtype=torch.int64), case.replicas.counts)
        out = torch.zeros(plan.num_rows(5, 2), size, dtype=torch.uint8)
        kernels("triton-exact").pack_rows(case.hidden, case.expert_ids, replicas, plan, out)
    assert "_place_choices" in launched
    for name, constants in launched.items():
        assert constants == [constants[0]] * 3, name


@EACH_ON_A_GPU
@LAYOUTS
def test_nothing_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, layout: str
) -> None:
    from tests.kernels.no_waiting import no_waiting  # which needs Triton

    monkeypatch.undo()  # what poisons memory is no part of it
    case = case_of(0, 9, 2, 4, 2, 8, torch.bfloat16, 2)
    plan, pack = plan_of(layout, case), kernels(name)
    out = torch.zeros(plan.num_rows(9, 2), row_bytes(8, torch.bfloat16, 2), dtype=torch.uint8)
    rows = torch.zeros(len(out), 8, dtype=torch.bfloat16)
    results = torch.zeros(len(out) * 2, 8, dtype=torch.bfloat16)
    with no_waiting():
        packed = pack.pack_rows(case.hidden, case.expert_ids, case.replicas, plan, out)
        of_rank = None if layout == "slots" else packed.rows_of_rank
        got = pack.unpack_rows(out, of_rank, 4, 2, plan, rows)
        pack.scatter_rows(rows, got.place_of_pair[: len(rows)], results)


@EACH_NATIVE
def test_what_does_not_fit_is_refused(name: str) -> None:
    case = case_of(0, 6, 2, 4, 2, 8, torch.float32, 1)
    plan = RowPlan(2, capacity=2, rounds=2, width=2)
    for one in (name, "reference"):
        with pytest.raises(AssertionError):
            packed_by(one, case, plan)
    with pytest.raises(AssertionError):
        reference.pack_rows(
            case.hidden, case.expert_ids, case.replicas, plan, torch.zeros(1, dtype=torch.uint8)
        )
    out = torch.zeros(12, row_bytes(8, torch.float32, 2), dtype=torch.uint8)
    with pytest.raises(TypeError):
        kernels(name).pack_rows(case.hidden, case.expert_ids.int(), case.replicas, RowPlan(2), out)
