"""The fused forward pass: the bits of the same kernels called one by one, whatever came before."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.layers.attention import LayerCache
from moe_serve.layers.moe import MoeLayer
from moe_serve.models.decoder import Decoder
from moe_serve.types import ForwardBatch, RouterRecipe, RouterScore
from tests.kernels.implementations import DTYPES, EACH_NATIVE, kernels
from tests.kernels.row_independence import same_bits
from tests.models import tiny

BLOCK_SIZE = 4
NUM_BLOCKS = 150
LENGTHS = (90, 70, 33, 5, 1)  # of the sequences that run side by side
# how many tokens of each sequence run in each step: prompt chunks alone and beside decodes, then
# decodes, steps that are larger and smaller than those before
STEPS = (
    (0, 0, 0, 0, 1), (2, 0, 0, 0, 0), (64, 30, 0, 0, 0), (1, 1, 0, 0, 0), (1, 1, 32, 0, 0),
    (1, 1, 0, 5, 0), (1, 37, 1, 0, 0), (20, 0, 0, 0, 0),
)  # fmt: skip
SCORES: tuple[RouterScore, ...] = ("softmax", "sigmoid", "softmax_after_top_k", "sqrt_softplus")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family's tiny checkpoint, written once."""
    written: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in written:
            written[model_type] = tmp_path_factory.mktemp(model_type)
            tiny.save_checkpoint(written[model_type], model_type)
        return written[model_type]

    return folder


@pytest.fixture
def poisoned_workspace(monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> None:
    """Fill uninitialised bytes with ones, which are NaN in every floating-point type."""
    allocate = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(255) if tensor.dtype == torch.uint8 else tensor

    monkeypatch.setattr(torch, "empty", empty)


class Both:
    """A decoder with two sets of caches: one is run layer by layer, one fused."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        num_blocks = (NUM_BLOCKS,) * len(decoder.groups)
        self._plain, self._fused = (
            decoder.allocate_caches(num_blocks, BLOCK_SIZE) for _ in range(2)
        )
        for cache in (*self._plain, *self._fused):
            cache.key.zero_()
            cache.value.zero_()
        run = decoder.fused(self._fused)
        assert run is not None
        self._run = run

    def check(self, batch: ForwardBatch) -> Tensor:
        """Run a step both ways, compare all bits, and return the residual stream."""
        with torch.inference_mode():
            fused = self._run(batch)
            want = self._decoder.forward(batch, self._plain)
        assert bool(fused.isfinite().all())
        assert same_bits(fused, want)
        return fused

    def check_caches(self) -> None:
        for plain, fused in zip(self._plain, self._fused, strict=True):
            _same_cache(plain, fused)


def _same_cache(first: LayerCache, second: LayerCache) -> None:
    assert same_bits(first.key, second.key)
    assert same_bits(first.value, second.value)


def _sequences(decoder: Decoder, seed: int) -> tuple[list[list[int]], list[tuple[list[int], ...]]]:
    """Return tokens of each sequence, and its blocks, other ones in every cache group."""
    chance = random.Random(seed)
    tokens = [[chance.randrange(tiny.VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    blocks: list[list[list[int]]] = [[] for _ in LENGTHS]
    for _ in decoder.groups:
        free = list(range(1, NUM_BLOCKS + 1))
        chance.shuffle(free)
        for index, length in enumerate(LENGTHS):
            blocks[index].append([free.pop() for _ in range(-(-length // BLOCK_SIZE))])
    return tokens, [tuple(groups) for groups in blocks]


def _check_steps(decoder: Decoder) -> None:
    tokens, blocks = _sequences(decoder, seed=1)
    both = Both(decoder)
    done = [0] * len(LENGTHS)
    for number, step in enumerate(STEPS):
        runs = [
            tiny.Run(tokens[index], done[index], length, blocks[index])
            for index, length in sorted(enumerate(step), key=lambda item: item[1] > 1)
            if length
        ]
        torch.set_num_threads(1 + number % 3)
        both.check(tiny.batch_of(runs, BLOCK_SIZE))
        done = [at + length for at, length in zip(done, step, strict=True)]
    assert done == list(LENGTHS)
    both.check_caches()


@EACH_NATIVE
@DTYPES
@pytest.mark.parametrize("model_type", tiny.CONFIGS)
@pytest.mark.usefixtures("poisoned_workspace")
def test_is_the_bits_of_layer_by_layer(
    name: str, dtype: torch.dtype, model_type: str, checkpoints: Callable[[str], Path]
) -> None:
    _check_steps(tiny.load_decoder(checkpoints(model_type), dtype, kernels(name)))


def test_some_family_has_two_cache_groups(checkpoints: Callable[[str], Path]) -> None:
    groups = tiny.load_decoder(checkpoints("qwen2")).groups
    assert [group.kind for group in groups] == ["full", "sliding"]


@EACH_NATIVE
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_every_router(
    name: str, score: RouterScore, has_bias: bool, checkpoints: Callable[[str], Path]
) -> None:
    decoder = tiny.load_decoder(checkpoints("qwen2_moe"), torch.bfloat16, kernels(name))
    recipe = RouterRecipe(
        num_experts=8,
        top_k=3,
        score=score,
        has_selection_bias=has_bias,
        num_groups=4 if has_bias else 1,
        top_k_groups=2 if has_bias else 1,
        renormalise=has_bias,
        renormalise_eps=1e-20,
        scale=1.5 if has_bias else 1.0,
    )
    torch.manual_seed(0)
    for layer in decoder.layers:
        assert isinstance(layer.mlp, MoeLayer)
        router = layer.mlp.router
        router.recipe = recipe
        if has_bias:
            router.scorer.bias = torch.randn(8)
            router.selection_bias = torch.randn(8)
    _check_steps(decoder)


@EACH_NATIVE
def test_uses_are_counted_alike(name: str, checkpoints: Callable[[str], Path]) -> None:
    decoder = tiny.load_decoder(checkpoints("qwen3_moe"), kernels=kernels(name))
    tokens, blocks = _sequences(decoder, seed=2)
    both = Both(decoder)
    both.check(tiny.batch_of([tiny.Run(tokens[0], 0, 40, blocks[0])], BLOCK_SIZE))
    assert set(decoder.experts.layers) == {0, 2}
    for table in decoder.experts.layers.values():
        # 2 of 8 experts for each of 40 tokens, run fused and then layer by layer
        assert int(table.uses.sum()) == 2 * 2 * 40
        assert not (table.uses % 2).any()


@EACH_NATIVE
@DTYPES
def test_a_row_does_not_see_what_ran_before_or_beside_it(
    name: str, dtype: torch.dtype, checkpoints: Callable[[str], Path]
) -> None:
    decoder = tiny.load_decoder(checkpoints("qwen2_moe"), dtype, kernels(name))
    tokens, blocks = _sequences(decoder, seed=3)

    def run(index: int, length: int) -> tiny.Run:
        return tiny.Run(tokens[index], 0, length, blocks[index])

    alone = Both(decoder).check(tiny.batch_of([run(2, 33)], BLOCK_SIZE))
    both = Both(decoder)
    for others in ([run(0, 90), run(1, 70)], [run(3, 1)], [], [run(0, 3)]):
        step = tiny.batch_of([*others, run(2, 33)], BLOCK_SIZE)
        got = both.check(step)[-33:]
        assert same_bits(got, alone), [other.length for other in others]


@EACH_NATIVE
def test_a_sequence_that_is_not_finite_harms_no_other(
    name: str, checkpoints: Callable[[str], Path]
) -> None:
    decoder = tiny.load_decoder(checkpoints("qwen3_moe"), kernels=kernels(name))
    tokens, blocks = _sequences(decoder, seed=4)
    caches = decoder.allocate_caches((NUM_BLOCKS,), BLOCK_SIZE)
    run = decoder.fused(caches)
    assert run is not None
    first = tiny.batch_of(
        [tiny.Run(tokens[index], 0, length, blocks[index]) for index, length in ((0, 8), (1, 20))],
        BLOCK_SIZE,
    )
    with torch.inference_mode():
        run(first)
        for cache in caches:
            cache.key[:, blocks[0][0][0] * BLOCK_SIZE] = float("nan")
        second = tiny.batch_of([tiny.Run(tokens[1], 20, 9, blocks[1])], BLOCK_SIZE)
        want = run(second)
        beside = tiny.batch_of(
            [
                tiny.Run(tokens[0], 8, 1, blocks[0]),
                tiny.Run(tokens[1], 20, 9, blocks[1]),
            ],
            BLOCK_SIZE,
        )
        got = run(beside)
    assert not bool(got[0].isfinite().any())
    assert same_bits(got[1:], want)
    with torch.inference_mode():
        assert same_bits(run(second), want)
