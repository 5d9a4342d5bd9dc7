"""Kernels do what they do whatever torch's default dtype is, and refuse what they cannot read."""

from __future__ import annotations

import pytest
import torch

from moe_serve import LLM, SamplingParams
from moe_serve.kernels.moe.base import ExpertTable
from tests.kernels.implementations import EACH_NATIVE, kernels
from tests.kernels.row_independence import same_bits


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "layer by layer"])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_an_engine_under_another_default_dtype(
    default: torch.dtype, fused: bool, implementation: str
) -> None:
    def run() -> list[object]:
        llm = LLM(kernels=implementation, fused=fused, num_kv_blocks=64)
        params = [
            SamplingParams(max_tokens=4, temperature=temperature, seed=1, logprobs=3)
            for temperature in (0.0, 0.9)
        ]
        return [o.outputs for o in llm.generate(["Once upon a time"] * 2, params, use_tqdm=False)]

    want = run()
    torch.set_default_dtype(default)
    assert run() == want


@EACH_NATIVE
def test_what_would_be_read_as_something_else_is_refused(name: str) -> None:
    native = kernels(name)
    weight = native.pack(torch.randn(8, 16))
    halves = torch.randn(3, 16, dtype=torch.float16)
    with pytest.raises(TypeError, match="float16"):
        native.rms_norm(halves, halves[0], 1e-6)
    with pytest.raises(TypeError, match="int32"):
        native.gather(weight, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(IndexError, match="8"):
        native.gather(weight, torch.tensor([8]))
    with pytest.raises(TypeError, match="float64"):
        native.combine(torch.randn(4, 8), torch.arange(4).view(2, 2), torch.rand(2, 2).double())
    with pytest.raises(TypeError, match="strides"):
        native.rms_norm(torch.randn(3, 16), torch.randn(32)[::2], 1e-6)
    records = torch.zeros(2, native.record_bytes(16, 8, torch.bfloat16), dtype=torch.uint8)
    table = ExpertTable(
        records, torch.arange(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), 16, 8,
        torch.bfloat16,
    )  # fmt: skip
    with pytest.raises(TypeError, match="float32"):
        native.moe(torch.randn(2, 16), torch.arange(2), torch.tensor([1, 1]), table)


@EACH_NATIVE
def test_rows_of_another_dtype_are_converted_first(name: str) -> None:
    torch.manual_seed(0)
    native = kernels(name)
    weight, bias = torch.randn(40, 24, dtype=torch.bfloat16), torch.randn(40)
    rows = torch.randn(5, 24)
    packed = native.pack(weight)
    want = native.linear(rows.bfloat16(), packed, bias.bfloat16())
    assert same_bits(native.linear(rows, packed, bias), want)
