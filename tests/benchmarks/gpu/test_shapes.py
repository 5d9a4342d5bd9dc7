from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.cases import Bench, attention, expert_table, linear, moe
from benchmarks.gpu.shapes import QWEN3_30B, REAL, TINY, flop, prompt_flop, with_layers
from moe_serve.kernels import suite


def test_the_shape_is_that_of_the_published_model() -> None:
    # 30.5 B parameters, 3.3 B of them active (the model's card); the embedding is not multiplied
    shape = QWEN3_30B
    embedding = shape.vocab_size * shape.hidden_size
    experts = shape.num_layers * shape.num_experts * shape.expert_elements
    assert (shape.dense_elements + embedding + experts) / 1e9 == pytest.approx(30.5, rel=0.01)
    active = flop(shape, 1, 1, 0) / 2
    assert (active + embedding) / 1e9 == pytest.approx(3.3, rel=0.02)


def test_a_prompt_is_its_tokens_one_head_and_what_they_see() -> None:
    shape = with_layers(QWEN3_30B, 2)
    head = 2.0 * shape.hidden_size * shape.vocab_size
    pairs = sum(range(1, 11))
    attention_flop = 4.0 * shape.num_heads * shape.head_dim * 2 * pairs
    one = flop(shape, 1, 0, 0)
    assert prompt_flop(shape, 10) == pytest.approx(10 * one + head + attention_flop)


def test_cases_count_what_moves_and_what_is_computed() -> None:
    torch.manual_seed(0)
    bench = Bench(TINY, suite.load("reference"))
    case = next(linear(bench, (3,), ("qkv",)))
    assert case.num_bytes == 2 * (64 * 64 + 3 * 64 + 3 * 64)
    assert case.flop == 2 * 3 * 64 * 64
    case = next(moe(bench, (1,)))
    assert case.flop == 2 * 2 * 3 * 64 * 32
    assert case.num_bytes == 2 * (2 * 3 * 64 * 32 + 64 + 2 * 2 * 32 + 2 * 64)
    case = next(attention(bench, ((1, 3, 5),)))
    assert case.flop == 4 * 2 * 16 * (3 + 4 + 5)
    assert case.num_bytes == 2 * (2 * 5 * 16 + 2 * 3 * 2 * 16)


def test_experts_are_filled() -> None:
    table = expert_table(Bench(TINY, suite.load("reference")))
    assert table.num_experts == TINY.num_experts
    assert (table.records.float().std(1) > 10).all()


def test_shapes_have_whole_groups_of_heads() -> None:
    for shape in (*REAL.values(), TINY):
        assert shape.num_heads % shape.num_kv_heads == 0
