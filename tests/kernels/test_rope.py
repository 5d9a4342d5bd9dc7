"""From projection to cache: clip, norms, rotation, and the writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_serve.kernels.rope import reference
from moe_serve.kernels.rope.base import Heads
from moe_serve.layers.rope import RopeSpec, rope_table
from tests.kernels.host_sync import no_host_sync
from tests.kernels.implementations import (
    DTYPES,
    EACH_EXACT,
    EACH_ON_A_GPU,
    INTERPRETED,
    each_exact_with,
    kernels,
)
from tests.kernels.row_independence import check_rows, same_bits

NUM_POSITIONS = 300
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8}  # three roundings
KINDS = pytest.mark.parametrize("kind", ["plain", "clip", "head", "full", "full-clip"])
SIZES = [(1, 1, 2), (3, 1, 14), (6, 2, 16), (4, 4, 30), (8, 2, 36), (5, 1, 64), (4, 2, 128)]


def _heads(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, kind: str
) -> Heads:
    torch.manual_seed(0)
    cos, sin = rope_table(RopeSpec(theta=1e4), head_dim, NUM_POSITIONS)
    is_full, has_norm = "full" in kind, kind not in ("plain", "clip")
    norms = [
        (torch.rand(head_dim * (heads if is_full else 1)) + 0.5).to(dtype) if has_norm else None
        for heads in (num_heads, num_kv_heads)
    ]
    return Heads(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        cos=cos,
        sin=sin,
        query_norm=norms[0],
        key_norm=norms[1],
        is_norm_full=is_full,
        norm_eps=1e-5,
        clip=0.7 if "clip" in kind else None,
    )


def _normed(part: Tensor, weight: Tensor | None, heads: Heads) -> Tensor:
    """Return heads [num_tokens, heads, head_dim] after their norm, if there is one, in float64."""
    if weight is None:
        return part
    rows = part.flatten(1) if heads.is_norm_full else part
    scale = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + heads.norm_eps)
    normed = (rows * scale).to(weight.dtype).double() * weight.double()
    return normed.to(weight.dtype).double().view_as(part)


def _rotated(part: Tensor, heads: Heads, positions: Tensor) -> Tensor:
    half = heads.head_dim // 2
    angles = torch.complex(heads.cos[positions].double(), heads.sin[positions].double())
    turned = torch.complex(part[..., :half], part[..., half:]) * angles.unsqueeze(1)
    return torch.cat([turned.real, turned.imag], -1)


def _by_hand(qkv: Tensor, heads: Heads, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, float64 [num_tokens, heads, head_dim]."""
    num_queries, num_keys = heads.num_heads, heads.num_kv_heads
    rows = qkv.double().view(qkv.shape[0], num_queries + 2 * num_keys, heads.head_dim)
    parts = rows[:, :num_queries], rows[:, num_queries:-num_keys], rows[:, -num_keys:]

    def clipped(part: Tensor) -> Tensor:
        if heads.clip is None:
            return part
        return part.clamp(-heads.clip, heads.clip).to(qkv.dtype).double()

    def normed_and_clipped(part: Tensor, weight: Tensor | None) -> Tensor:
        if heads.is_norm_full:  # OLMoE clips what its norm gave
            return clipped(_normed(part, weight, heads))
        return _normed(clipped(part), weight, heads)

    query, key = (
        _rotated(normed_and_clipped(part, weight), heads, positions)
        for part, weight in zip(parts, (heads.query_norm, heads.key_norm), strict=False)
    )
    return query, key, clipped(parts[2])


@EACH_EXACT
@DTYPES
@KINDS
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), SIZES)
@pytest.mark.usefixtures("poisoned_empty")
def test_equals_float64_and_writes_nowhere_else(
    name: str, dtype: torch.dtype, kind: str, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    heads = _heads(num_heads, num_kv_heads, head_dim, dtype, kind)
    num_slots = 40
    for num_tokens in (0, 1, 4 if name in INTERPRETED else 13):
        qkv = torch.randn(num_tokens, heads.qkv_width).to(dtype)
        positions = torch.randint(0, NUM_POSITIONS, (num_tokens,))
        slots = torch.randperm(num_slots)[:num_tokens]
        cache = torch.full((2, num_kv_heads, num_slots, head_dim), 7.0, dtype=dtype)
        keys, values = cache.unbind(0)
        want = _by_hand(qkv, heads, positions)
        got = kernels(name).rope_write_kv(qkv, heads, positions, slots, keys, values)
        assert got.shape == (num_tokens, num_heads, head_dim)
        assert got.dtype == dtype
        _compare(got, want[0])
        _compare(keys[:, slots].transpose(0, 1), want[1])
        assert same_bits(values[:, slots].transpose(0, 1), want[2].to(dtype))
        rest = torch.ones(num_slots, dtype=torch.bool).index_fill(0, slots, False)
        assert bool((cache[:, :, rest] == 7).all())


def _compare(got: Tensor, want: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    if got.dtype == torch.bfloat16:  # rounded in the same places, but for ties
        assert int((got != want.to(got.dtype)).sum()) <= 0.02 * got.numel() + 1


def test_a_score_depends_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    cos, sin = (t.unsqueeze(1) for t in rope_table(RopeSpec(theta=1e4), 32, 300))
    query, key = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def score(at: int, seen: int) -> float:
        turned = (
            reference.rope(r, cos[p : p + 1], sin[p : p + 1]) for r, p in ((query, at), (key, seen))
        )
        first, second = turned
        return float((first * second).sum())

    assert abs(score(10, 3) - score(250, 243)) < 1e-3
    assert abs(score(10, 3) - score(10, 4)) > 1e-3


@DTYPES
@each_exact_with(
    "shape",
    # 64, 256, 1024 and 2048 elements in what is normed, or rotated
    [("head", 2, 64), ("plain", 4, 64), ("head", 2, 256), ("full-clip", 8, 128), ("full", 16, 128)],
    interpreted=[("head", 2, 64), ("full", 16, 128)],
)
def test_tokens_do_not_see_each_other(
    name: str, dtype: torch.dtype, shape: tuple[str, int, int]
) -> None:
    kind, num_heads, head_dim = shape
    heads = _heads(num_heads, 2, head_dim, dtype, kind)
    # wide in range, so that sums in another order round otherwise
    qkv = torch.randn(50, heads.qkv_width) * 10 ** (torch.rand(50, heads.qkv_width) * 4 - 2)
    qkv = qkv.to(dtype)
    positions = torch.randint(0, NUM_POSITIONS, (50,))

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        keys, values = torch.zeros(2, 2, 64, head_dim, dtype=dtype).unbind(0)
        slots = torch.randperm(64)[: len(rows)]
        query = kernels(name).rope_write_kv(qkv[rows], heads, positions[rows], slots, keys, values)
        return query, keys[:, slots].transpose(0, 1), values[:, slots].transpose(0, 1)

    check_rows(name, 50, head_dim, run)


@EACH_EXACT
@DTYPES
@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_with_its_token(
    name: str, dtype: torch.dtype, kind: str, bad: float
) -> None:
    heads = _heads(4, 2, 32, dtype, kind)
    qkv = torch.randn(6, heads.qkv_width).to(dtype)
    positions, slots = torch.arange(6), torch.arange(6)

    def run(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = torch.zeros(2, 2, 16, 32, dtype=dtype).unbind(0)
        query = kernels(name).rope_write_kv(rows.clone(), heads, positions, slots, keys, values)
        return query, keys.transpose(0, 1), values.transpose(0, 1)

    broken = qkv.clone()
    broken[4, [3, 4 * 32 + 3, 6 * 32 + 3]] = bad  # a query, a key and a value
    sound = torch.arange(6) != 4
    parts = zip(("query", "key", "value"), run(broken), run(qkv), strict=True)
    for part, got, want in parts:
        assert same_bits(got[:6][sound], want[:6][sound])
        # a NaN is never lost, and a full norm makes one of infinity; what is clipped is finite
        is_clipped = "clip" in kind and bad == bad and (part == "value" or "full" not in kind)
        assert bool(got[4].isfinite().all()) == is_clipped


@EACH_ON_A_GPU
def test_a_negative_slot_is_not_written(name: str) -> None:
    heads = _heads(4, 2, 32, torch.bfloat16, "head")
    qkv, positions = torch.randn(5, heads.qkv_width).bfloat16(), torch.arange(5)
    slots = torch.tensor([3, -1, 1, -1, -1])
    caches = torch.full((2, 2, 8, 32), 7.0, dtype=torch.bfloat16)
    want = kernels(name).rope_write_kv(
        qkv.clone(), heads, positions, torch.arange(5), *torch.zeros_like(caches).unbind(0)
    )
    query = kernels(name).rope_write_kv(qkv, heads, positions, slots, *caches.unbind(0))
    assert same_bits(query, want)
    is_written = (caches != 7).any(-1)  # [2, num_kv_heads, num_slots]
    assert is_written.any(1).tolist() == [[False, True, False, True] + [False] * 4] * 2


@EACH_ON_A_GPU
@DTYPES
def test_a_cache_may_have_strides(name: str, dtype: torch.dtype) -> None:
    heads = _heads(4, 2, 36, dtype, "head")
    qkv, positions, slots = (
        torch.randn(5, heads.qkv_width).to(dtype),
        torch.arange(5),
        torch.randperm(8),
    )
    want = torch.zeros(2, 2, 8, 36, dtype=dtype)
    got = torch.zeros(8, 2, 2, 36, dtype=dtype).permute(1, 2, 0, 3)
    for caches in (want, got):
        kernels(name).rope_write_kv(qkv.clone(), heads, positions, slots[:5], *caches.unbind(0))
    assert same_bits(got, want)


@EACH_ON_A_GPU
def test_a_cache_may_be_larger_than_32_bits_tell(name: str) -> None:
    heads = _heads(1, 3, 8, torch.bfloat16, "plain")
    qkv, positions, slots = (
        torch.randn(1, heads.qkv_width).bfloat16(),
        torch.arange(1),
        torch.arange(1),
    )
    head_stride = 2**30 + 64
    memory = torch.empty(
        2 * head_stride + 64, dtype=torch.bfloat16
    )  # a few pages of which are used
    key, value = (memory.as_strided((3, 1, 8), (head_stride, 8, 1), start) for start in (0, 16))
    want = torch.zeros(2, 3, 1, 8, dtype=torch.bfloat16)
    kernels(name).rope_write_kv(qkv.clone(), heads, positions, slots, *want.unbind(0))
    kernels(name).rope_write_kv(qkv, heads, positions, slots, key, value)
    assert same_bits(torch.stack([key, value]), want)


@EACH_ON_A_GPU
@KINDS
def test_never_waits_for_the_device(name: str, kind: str) -> None:
    heads = _heads(4, 2, 32, torch.bfloat16, kind)
    qkv, positions = torch.randn(2, heads.qkv_width).bfloat16(), torch.arange(2)
    caches = torch.zeros(2, 2, 8, 32, dtype=torch.bfloat16)
    with no_host_sync():
        kernels(name).rope_write_kv(qkv, heads, positions, positions, *caches.unbind(0))
