"""The table of tiles, and what is planned with it."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_serve.kernels.gpu import gemm_tiles
from moe_serve.kernels.gpu.gemm_tiles import Tiles, chosen, operands, row_tiles, schedule
from moe_serve.kernels.gpu.numerics import NUMERICS, Numerics

# out_features, in_features: of Qwen3-30B-A3B, DeepSeek-V2-Lite and Mixtral, and odd ones
WEIGHTS = [
    (5120, 2048), (2048, 4096), (151936, 2048), (128, 2048), (576, 2048), (2048, 1408),
    (6144, 4096), (1, 1), (33, 4097), (700, 63),
]  # fmt: skip
KINDS = ["half", "router", "float32"]
ROWS = [1, 2, 16, 17, 64, 65, 128, 129, 500, 1024, 4096]
SHARED_BYTES = 227 * 1024  # that one program may have


def test_exact_tiles_sum_a_row_in_one_way() -> None:
    for table in (gemm_tiles.LINEAR, gemm_tiles.GATE_UP, gemm_tiles.DOWN):
        for kind, by_size in table["exact"].items():
            tiles = list(itertools.chain(*by_size.values()))
            assert len({(t.columns, t.depth) for t in tiles}) == 1
            if kind != "float32":  # which has no tensor cores, and so no choice of instructions
                assert all(t.rows % 64 == 0 for t in tiles), "of 16 rows: another instruction"


@pytest.mark.parametrize("numerics", NUMERICS)
def test_tiles_fit_into_shared_memory(numerics: Numerics) -> None:
    for table in (gemm_tiles.LINEAR, gemm_tiles.GATE_UP, gemm_tiles.DOWN):
        for kind, by_size in table[numerics].items():
            row_bytes, weight_bytes = {"half": (2, 2), "router": (2, 4), "float32": (4, 4)}[kind]
            for t in itertools.chain(*by_size.values()):
                stage = t.depth * (t.rows * row_bytes + t.columns * weight_bytes)
                assert t.stages * stage <= SHARED_BYTES, t


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize(("out_features", "in_features"), WEIGHTS)
def test_every_step_is_in_one_part(
    numerics: Numerics, kind: str, out_features: int, in_features: int
) -> None:
    plans = [schedule(numerics, kind, rows, out_features, in_features) for rows in ROWS]
    for rows, plan in zip(ROWS, plans, strict=True):
        all_steps = -(-in_features // plan.tiles.depth)
        assert (plan.splits - 1) * plan.steps < all_steps <= plan.splits * plan.steps
        num_tiles = -(-rows // plan.tiles.rows) * -(-out_features // plan.tiles.columns)
        assert not plan.is_spread or plan.splits > 1
        assert not plan.is_spread or num_tiles <= gemm_tiles.MOST_SPREAD_TILES
        # one program adds parts of its own only to get the bits of those that are spread
        assert plan.is_spread or plan.splits == 1 or numerics == "exact"
    if numerics == "exact":
        assert len({(plan.splits, plan.steps, plan.tiles.columns) for plan in plans}) == 1


def test_few_rows_are_read_by_many_programs() -> None:
    for numerics, (out_features, in_features) in itertools.product(NUMERICS, WEIGHTS[:3]):
        plan = schedule(numerics, "half", 1, out_features, in_features)
        programs = -(-out_features // plan.tiles.columns) * (plan.splits if plan.is_spread else 1)
        assert programs >= 96, (numerics, out_features)


def test_there_are_tiles_for_every_split_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        num_experts, most = (int(n) for n in torch.randint(1, 40, (2,), generator=generator))
        counts = torch.randint(0, most, (num_experts,), generator=generator)
        counts *= torch.randint(0, 2, (num_experts,), generator=generator)
        num_rows = int(counts.sum())
        for size in (16, 64):
            used = int((-(-counts // size)).sum())
            assert used <= row_tiles(Tiles(size, 64, 64, 4, 3), num_rows, num_experts)
    # and none too many: one expert may have all rows but one for each of the others
    assert row_tiles(Tiles(16, 64, 64, 4, 3), 100, 5) == 1 * 4 + 6
    assert row_tiles(Tiles(16, 64, 64, 4, 3), 3, 5) == 3
    assert [row_tiles(Tiles(16, 64, 64, 4, 3), rows) for rows in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_the_first_tiles_that_fill_the_chip_are_taken() -> None:
    large, small = Tiles(128, 256, 64, 8, 4), Tiles(64, 128, 64, 4, 4)
    table = {1: (small,), 100: (large, small)}
    assert chosen(table, 99, 1, 10**6) == small
    assert chosen(table, 100, 1, 132 * 256) == large
    assert chosen(table, 100, 1, 131 * 256) == small
    assert chosen(table, 100 * 8, 8, 17 * 256) == large  # 8 tiles of rows, or more
    assert chosen(table, 99 * 8, 8, 17 * 256) == small


def test_operands_are_told_by_dtype() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert [operands(bf16, bf16), operands(fp16, fp16)] == ["half"] * 2
    assert operands(bf16, fp32) == "router"
    assert [operands(fp32, fp32), operands(fp16, fp32)] == ["float32"] * 2
