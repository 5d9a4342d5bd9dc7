"""Linear layers against float64, and the promise that rows do not see each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.kernels.gpu import gemm_tiles
from moe_serve.kernels.gpu.gemm_tiles import Tiles
from moe_serve.kernels.linear import reference
from moe_serve.kernels.linear.cpu import LinearKernels
from moe_serve.kernels.native.loader import Native
from tests.kernels.implementations import (
    DTYPES,
    EACH,
    EACH_NATIVE,
    IMPLEMENTATIONS,
    NATIVE,
    TRITON,
    kernels,
)
from tests.kernels.row_independence import check_rows, same_bits

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # relative to the largest product
# rows, inputs, outputs: beside the edges of vectors (16), tiles (32), register blocks (2 and 12)
# and chunks (32 and 192) of the native kernels
SHAPES = [
    (0, 64, 8), (1, 1, 1), (1, 7, 3), (2, 15, 16), (3, 63, 500), (7, 17, 15), (11, 31, 33),
    (12, 32, 32), (13, 1000, 60), (31, 100, 17), (33, 33, 31), (63, 48, 100), (193, 257, 65),
    (400, 96, 47), (100, 1000, 1),
]  # fmt: skip


def _dtypes() -> list[tuple[torch.dtype, torch.dtype]]:
    """List (dtype of rows, dtype of weight): a router's weight is wider than its rows."""
    return [(t, t) for t in (torch.float32, torch.bfloat16)] + [(torch.bfloat16, torch.float32)]


# beside the edges of a GPU's tiles, and of parts of a sum that is split
TILED_SHAPES = [(16, 128, 64), (17, 127, 65), (64, 1025, 3), (65, 64, 129), (130, 513, 5)]
EACH_TRITON = pytest.mark.parametrize("name", TRITON)
# numpy, behind Triton's interpreter, warns of what a GPU computes in silence
UNUSUAL = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

WIDTHS = pytest.mark.parametrize(
    ("narrow", "dtype"), _dtypes(), ids=["fp32", "bf16", "bf16-rows-fp32-weight"]
)


@WIDTHS
@pytest.mark.parametrize(
    ("name", "rows", "size_in", "size_out"),
    [
        (name, *shape)
        for name in IMPLEMENTATIONS
        for shape in (SHAPES[:8] + TILED_SHAPES if name in TRITON else SHAPES)
    ],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_equals_float64(
    name: str,
    narrow: torch.dtype,
    dtype: torch.dtype,
    rows: int,
    size_in: int,
    size_out: int,
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(rows, size_in).to(narrow)
    weight = (torch.randn(size_out, size_in) * size_in**-0.5).to(dtype)
    bias = torch.randn(size_out).to(dtype)
    packed = kernels(name).pack(weight)
    product = inputs.double() @ weight.double().T
    tolerance = TOLERANCE[dtype]
    for got, want in (
        (kernels(name).linear(inputs, packed), product),
        (kernels(name).linear(inputs, packed, bias), product.to(dtype).double() + bias.double()),
    ):
        assert got.dtype == dtype
        assert got.shape == (rows, size_out)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=4 * tolerance)
        if dtype == torch.bfloat16:
            # rounded where the reference rounds, but for ties that float32 decides otherwise
            assert int((got != want.to(dtype)).sum()) <= 0.01 * got.numel() + 1


class _Idle(Native):
    """A library whose functions do nothing."""

    def __init__(self) -> None:
        self.isa = "idle"

    def function(self, name: str, codes: str, result: str = "") -> Callable[..., Any]:
        return lambda *_arguments: 100


@pytest.mark.usefixtures("poisoned_empty")
def test_what_native_code_does_not_write_stays_poisoned() -> None:
    idle = LinearKernels(_Idle())
    packed = idle.pack(torch.ones(3, 20))
    for out in (idle.linear(torch.ones(4, 20), packed), idle.gather(packed, torch.arange(2))):
        assert out.numel() > 0
        assert bool(out.isnan().all())


@EACH
@DTYPES
@pytest.mark.parametrize(("size_out", "size_in"), [(1, 1), (7, 5), (33, 31), (100, 64), (64, 17)])
@pytest.mark.usefixtures("poisoned_empty")
def test_rows_of_a_packed_weight_are_those_of_the_plain_one(
    name: str, dtype: torch.dtype, size_out: int, size_in: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(size_out, size_in).to(dtype)
    packed = kernels(name).pack(weight.clone())
    for ids in (torch.arange(size_out), torch.randint(size_out, (50,)), torch.arange(0)):
        got = kernels(name).gather(packed, ids)
        assert got.shape == (len(ids), size_in)
        assert same_bits(got, weight[ids])


@EACH_NATIVE
@DTYPES
@pytest.mark.usefixtures("poisoned_empty")
def test_padding_of_a_packed_weight_is_zero(name: str, dtype: torch.dtype) -> None:
    packed = kernels(name).pack(torch.ones(33, 7, dtype=dtype)).data
    assert int((packed == 1).sum()) == 33 * 7
    assert int((packed == 0).sum()) == packed.numel() - 33 * 7


@pytest.mark.parametrize("name", [*NATIVE, *TRITON])
@WIDTHS
def test_strides_do_not_matter(name: str, narrow: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(9, 50).to(narrow)
    weight = torch.randn(40, 50).to(dtype)
    want = kernels(name).linear(inputs, kernels(name).pack(weight))
    turned = weight.t().contiguous().t()
    assert not turned.is_contiguous()
    wide = torch.randn(9, 61).to(narrow)
    wide[:, 3:53] = inputs
    assert same_bits(kernels(name).linear(wide[:, 3:53], kernels(name).pack(turned)), want)


def cancelling(rows: int, size_in: int, size_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows and a weight whose products are 0 but for rounding: any other order shows."""
    half = -(-size_in // 2)
    terms = torch.randn(rows, half).to(dtype)
    weight = torch.randn(size_out, half).to(dtype)
    rest = size_in - half
    return torch.cat([terms, -terms[:, :rest]], 1), torch.cat([weight, weight[:, :rest]], 1)


@DTYPES
@pytest.mark.parametrize(
    ("size_in", "size_out"),
    [
        *itertools.product([16, 64, 256, 1024, 2048, 2880], [1, 7, 8, 24, 384, 512]),
        # matrices so small, or with sides so odd, that libraries have code of their own for them
        (56, 48), (40, 48), (24, 48), (1022, 8), (10, 8), (7, 11), (3, 5), (1, 1), (172, 64),
    ],
)  # fmt: skip
def test_rows_do_not_see_each_other(dtype: torch.dtype, size_in: int, size_out: int) -> None:
    torch.manual_seed(0)
    inputs, weight = cancelling(260, size_in, size_out, dtype)
    whole = reference.linear(inputs, weight)
    for count, threads in itertools.product((1, 2, 3, 4, 5, 9, 31, 37, 130), (1, 2)):
        rows = torch.randperm(260)[:count]
        torch.set_num_threads(threads)
        assert same_bits(reference.linear(inputs[rows], weight), whole[rows]), (count, threads)


@EACH_NATIVE
@WIDTHS
@pytest.mark.parametrize("size_in", [64, 256, 1024, 2048])
def test_rows_do_not_see_each_other_in_any_mix(
    name: str, narrow: torch.dtype, dtype: torch.dtype, size_in: int
) -> None:
    torch.manual_seed(0)
    inputs, weight = cancelling(210, size_in, 40, narrow)
    packed = kernels(name).pack(weight.to(dtype))
    assert int(kernels(name).linear(inputs, packed).count_nonzero()) > 1000, (
        "no rounding to compare"
    )
    check_rows(name, 210, size_in, lambda rows: (kernels(name).linear(inputs[rows], packed),))


@pytest.mark.parametrize("size_in", [200, 1024])
@WIDTHS
@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
def test_rows_do_not_see_each_other_on_a_gpu(
    narrow: torch.dtype, dtype: torch.dtype, size_in: int
) -> None:
    torch.manual_seed(0)
    inputs, weight = cancelling(140, size_in, 40, narrow)
    weight, gpu = weight.to(dtype), kernels("triton-exact")
    assert int(gpu.linear(inputs, weight).count_nonzero()) > 1000, "no rounding to compare"
    check_rows("triton-exact", 140, size_in, lambda rows: (gpu.linear(inputs[rows], weight),))


@DTYPES
@pytest.mark.parametrize("size_in", [1024, 1300])
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
def test_one_program_adds_as_many_programs_do(
    dtype: torch.dtype, size_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    inputs, weight = cancelling(70, size_in, 40, dtype)
    gpu, kind = kernels("triton-exact"), gemm_tiles.operands(dtype, dtype)
    assert gemm_tiles.schedule("exact", kind, 70, 40, size_in).is_spread
    want = gpu.linear(inputs, weight)
    monkeypatch.setattr(gemm_tiles, "MOST_SPREAD_TILES", 0)
    assert not gemm_tiles.schedule("exact", kind, 70, 40, size_in).is_spread
    assert same_bits(gpu.linear(inputs, weight), want)
    # nor do taller tiles show
    (tiles,) = gemm_tiles.LINEAR["exact"][kind][1]
    taller = Tiles(2 * tiles.rows, tiles.columns, tiles.depth, 8, 3)
    monkeypatch.setitem(gemm_tiles.LINEAR["exact"], kind, {1: (taller,)})
    assert same_bits(gpu.linear(inputs, weight), want)


@EACH_TRITON
@pytest.mark.usefixtures("poisoned_empty")
def test_a_call_leaves_nothing_for_the_next(name: str) -> None:
    torch.manual_seed(0)
    inputs, weight = cancelling(5, 1100, 70, torch.bfloat16)
    other = torch.randn(33, 1500).bfloat16()
    want = kernels(name).linear(inputs, weight)
    for _ in range(2):
        kernels(name).linear(torch.randn(20, 1500).bfloat16(), other)
        assert same_bits(kernels(name).linear(inputs, weight), want)


@EACH_TRITON
@WIDTHS
def test_a_gpu_is_not_waited_for(name: str, narrow: torch.dtype, dtype: torch.dtype) -> None:
    from tests.kernels.no_waiting import no_waiting  # which needs Triton

    weight, bias = torch.randn(20, 600).to(dtype), torch.randn(20).to(dtype)
    for rows in (0, 1, 70):
        inputs = torch.randn(rows, 600).to(narrow)
        ids = torch.arange(rows) % 20
        with no_waiting():
            packed = kernels(name).pack(weight)
            kernels(name).linear(inputs, packed, bias)
            kernels(name).gather(packed, ids)


@EACH_TRITON
@pytest.mark.parametrize("size_in", [1, 4, 200])
def test_a_router_s_product_is_as_fine_as_float32(name: str, size_in: int) -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(70, size_in).bfloat16(), torch.randn(30, size_in)
    got = kernels(name).linear(inputs, kernels(name).pack(weight)).double()
    size = inputs.double().abs() @ weight.double().abs().T
    assert bool(((got - inputs.double() @ weight.double().T).abs() <= 2**-22 * size).all())


@pytest.mark.gpu
@WIDTHS
@pytest.mark.parametrize(("size_out", "size_in"), [(5120, 2048), (2048, 4096), (20000, 512)])
def test_the_number_of_rows_does_not_show_on_a_gpu(
    narrow: torch.dtype, dtype: torch.dtype, size_out: int, size_in: int
) -> None:
    torch.manual_seed(0)
    gpu = kernels("triton-exact")
    inputs, weight = cancelling(2000, size_in, size_out, narrow)
    inputs, packed = inputs.to(gpu.device), gpu.pack(weight.to(gpu.device, dtype))
    whole = gpu.linear(inputs, packed)
    assert int(whole.count_nonzero()) > 1000, "no rounding to compare"
    for count in (1, 2, 16, 63, 65, 128, 129, 300, 700):
        rows = torch.randperm(2000)[:count].to(gpu.device)
        assert same_bits(gpu.linear(inputs[rows], packed), whole[rows]), count


@EACH_TRITON
def test_rows_may_be_far_apart(name: str) -> None:
    torch.manual_seed(0)
    memory = torch.empty(2**31 + 2 * 100, dtype=torch.bfloat16)  # of which two rows are touched
    rows = memory.as_strided((2, 100), (2**31 + 100, 1))
    rows.copy_(torch.randn(2, 100))
    weight = torch.randn(5, 100).bfloat16()
    want = kernels(name).linear(rows.clone(), weight)
    assert same_bits(kernels(name).linear(rows, weight), want)


@UNUSUAL
@EACH
@WIDTHS
@pytest.mark.parametrize("size_in", [64, 63])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(
    name: str, narrow: torch.dtype, dtype: torch.dtype, size_in: int, bad: float
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(40, size_in).to(narrow)
    packed = kernels(name).pack(torch.randn(50, size_in).to(dtype))
    want = kernels(name).linear(inputs, packed)
    broken = inputs.clone()
    # at the first and last column too: beside the rows before and after
    places = torch.tensor([0, 11, 20, 39])
    broken[places, torch.tensor([size_in - 1, 5, 0, size_in // 2])] = bad
    got = kernels(name).linear(broken, packed)
    assert not bool(got[places].isfinite().any())
    sound = torch.ones(40, dtype=torch.bool).index_fill(0, places, False)
    assert same_bits(got[sound], want[sound])
    # nor does it stay behind in memory that the next call works in
    assert same_bits(kernels(name).linear(inputs, packed), want)


def test_a_shape_that_no_count_makes_exact_is_added_up() -> None:
    # measured: with 8 outputs and 1,022 inputs a row's bits show its place in the batch
    assert reference.multiplier(torch.empty(8, 1022)) in (
        reference._add_up,
        reference._multiply,  # where the library has one order
    )
    torch.manual_seed(0)
    inputs, weight = torch.randn(50, 33), torch.randn(9, 33)
    out = torch.empty(50, 9)
    reference._add_up(inputs, weight, out)
    torch.testing.assert_close(
        out.double(), inputs.double() @ weight.double().T, rtol=1e-5, atol=1e-5
    )
