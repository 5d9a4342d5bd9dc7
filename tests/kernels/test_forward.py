"""The fused forward pass: the bits of the same kernels called one by one, whatever came before."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_serve.comm.base import Inbox
from moe_serve.experts.executor import ResidentExperts
from moe_serve.kernels.forward.base import Run, Stopped, Stops
from moe_serve.layers.attention import LayerCache
from moe_serve.layers.moe import MoeLayer
from moe_serve.models.decoder import Decoder
from moe_serve.types import ForwardBatch, RouterRecipe, RouterScore, Routing
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


@dataclass
class Seen:
    """What a stop showed, or a layer's experts were given."""

    layer: int
    expert_ids: Tensor
    weights: Tensor
    counts: Tensor
    residual: Tensor

    @classmethod
    def at(cls, stopped: Stopped) -> Seen:
        ids, weights = torch.tensor(stopped.expert_ids), torch.tensor(stopped.weights)
        counts = torch.tensor(stopped.counts)
        return cls(stopped.layer, ids, weights, counts, stopped.residual.clone())

    def check(self, other: Seen) -> None:
        assert self.layer == other.layer
        assert torch.equal(self.expert_ids, other.expert_ids)
        assert same_bits(self.weights, other.weights)
        assert torch.equal(self.counts, other.counts)
        assert same_bits(self.residual, other.residual)


Parts = Callable[[list[int]], list[list[int]]]


class Watching:
    """A watcher that notes what it was shown, and serves experts in the parts it was given."""

    def __init__(
        self,
        stops: Stops,
        decoder: Decoder,
        num_tokens: int,
        parts: Parts | None = None,
        absent: dict[int, list[int]] | None = None,
        forced: tuple[Tensor, Tensor] | None = None,
        raises: type[BaseException] | None = None,
    ) -> None:
        """parts: cuts the experts that have pairs; None: all at once, without naming them.

        absent: experts of each layer that have a slot only while they are to run. forced: ids and
        weights to take. raises: what it does when it is asked.
        """
        self.stops = stops
        self.seen: list[Seen] = []
        self.is_forced = forced is not None
        self._experts = decoder.experts.layers
        self._parts = parts
        self._absent = absent or {}
        self._raises = raises
        if forced is None:
            moes = [layer.mlp for layer in decoder.layers if isinstance(layer.mlp, MoeLayer)]
            shape = (len(decoder.layers), num_tokens, moes[0].router.recipe.top_k)
            forced = torch.full(shape, -7, dtype=torch.int64), torch.full(shape, float("nan"))
        self.ids, self.weights = forced
        for layer, experts in self._absent.items():
            self._slots(layer)[experts] = -1

    def _slots(self, layer: int) -> Tensor:
        return self._experts[layer].slot_of_expert

    def serve(self, stopped: Stopped, can_wait: bool = True) -> Iterator[Run]:
        self.seen.append(Seen.at(stopped))
        if self._raises is not None:
            raise self._raises("of the watcher")
        slots, layer = self._slots(stopped.layer), stopped.layer
        of_layer = self._first_slot(layer)
        absent = self._absent.get(layer, [])
        if self._parts is None:
            slots[absent] = torch.tensor(absent, dtype=torch.int32) + of_layer
            yield Run(None, is_last=True)
        else:
            parts = self._parts(np.flatnonzero(stopped.counts).tolist())
            for number, part in enumerate(parts):
                here = [expert for expert in part if expert in absent]
                slots[here] = torch.tensor(here, dtype=torch.int32) + of_layer
                only = torch.zeros(len(slots), dtype=torch.uint8)
                only[part] = 1
                yield Run(only, number == len(parts) - 1)
                slots[here] = -1
        slots[absent] = -1

    def _first_slot(self, layer: int) -> int:
        index = sorted(self._experts).index(layer)
        return index * len(self._slots(layer))


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
        return self.check_watched(batch, None)

    def check_watched(self, batch: ForwardBatch, watcher: Watching | None) -> Tensor:
        """Do as `check`, the fused pass with somebody to ask."""
        with torch.inference_mode():
            want = self._decoder.forward(batch, self._plain)
            fused = self._run(batch, watcher)
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


def _layer_by_layer(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Have what each layer's experts are given noted, where layers run one by one."""
    seen: list[Seen] = []
    experts = decoder.experts
    assert isinstance(experts, ResidentExperts)
    run = experts.run

    def noting(layer: int, inbox: Inbox, routing: Routing, residual: Tensor) -> Tensor:
        ids, weights = routing.expert_ids, routing.weights
        seen.append(Seen(layer, ids.clone(), weights.clone(), inbox.counts, residual.clone()))
        return run(layer, inbox, routing, residual)

    monkeypatch.setattr(experts, "run", noting)
    return seen


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


MOE_TYPES = [kind for kind in tiny.CONFIGS if "experts" in " ".join(tiny.CONFIGS[kind])]
PARTS: dict[str, Parts | None] = {
    "at-once": None,
    "by-name": lambda active: [active],
    "one-by-one": lambda active: [[expert] for expert in active],
    "last-first": lambda active: [active[1::2], active[::2]] if len(active) > 1 else [active],
}


def _decoded(decoder: Decoder) -> Iterator[ForwardBatch]:
    """Give some steps: a prompt, another beside a decode, decodes alone."""
    tokens, blocks = _sequences(decoder, seed=6)
    yield tiny.batch_of([tiny.Run(tokens[0], 0, 40, blocks[0])], BLOCK_SIZE)
    yield tiny.batch_of(
        [tiny.Run(tokens[0], 40, 1, blocks[0]), tiny.Run(tokens[1], 0, 23, blocks[1])], BLOCK_SIZE
    )
    yield tiny.batch_of(
        [tiny.Run(tokens[0], 41, 1, blocks[0]), tiny.Run(tokens[1], 23, 1, blocks[1])], BLOCK_SIZE
    )
    yield tiny.batch_of([tiny.Run(tokens[1], 24, 1, blocks[1])], BLOCK_SIZE)


def _counted(decoder: Decoder) -> list[list[int]]:
    return [table.uses.tolist() for table in decoder.experts.layers.values()]


@EACH_NATIVE
@DTYPES
@pytest.mark.parametrize("model_type", MOE_TYPES)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.usefixtures("poisoned_workspace")
def test_to_stop_at_every_layer_changes_no_bit(
    name: str,
    dtype: torch.dtype,
    model_type: str,
    parts: str,
    checkpoints: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = tiny.load_decoder(checkpoints(model_type), dtype, kernels(name))
    both = Both(decoder)
    want = _layer_by_layer(decoder, monkeypatch)
    layers = sorted(decoder.experts.layers)
    for number, batch in enumerate(_decoded(decoder)):
        torch.set_num_threads(1 + number % 3)
        want.clear()
        watcher = Watching(Stops.ALWAYS, decoder, batch.num_tokens, PARTS[parts])
        both.check_watched(batch, watcher)
        assert [seen.layer for seen in watcher.seen] == layers
        for seen, wanted in zip(watcher.seen, want, strict=True):
            seen.check(wanted)
            assert torch.equal(watcher.ids[seen.layer], wanted.expert_ids), "what it noted"
            assert same_bits(watcher.weights[seen.layer], wanted.weights)
        dense = [layer for layer in range(len(decoder.layers)) if layer not in layers]
        assert bool((watcher.ids[dense] == -7).all())
    both.check_caches()
    assert not any(uses % 2 for row in _counted(decoder) for uses in row), "each counted twice"


@EACH_NATIVE
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.usefixtures("poisoned_workspace")
def test_it_stops_where_a_needed_expert_is_missing_and_nowhere_else(
    name: str, parts: str, checkpoints: Callable[[str], Path]
) -> None:
    plain = tiny.load_decoder(checkpoints("mixtral"), torch.bfloat16, kernels(name))
    decoder = tiny.load_decoder(checkpoints("mixtral"), torch.bfloat16, kernels(name))
    caches = [
        d.allocate_caches((NUM_BLOCKS,) * len(d.groups), BLOCK_SIZE) for d in (plain, decoder)
    ]
    whole, run = plain.fused(caches[0]), decoder.fused(caches[1])
    assert whole is not None
    assert run is not None
    absent = {0: [0, 1, 2], 1: [], 2: [7]}
    stops = 0
    for batch in _decoded(decoder):
        noting = Watching(Stops.NEVER, plain, batch.num_tokens)
        watcher = Watching(Stops.MISSING, decoder, batch.num_tokens, PARTS[parts], absent)
        with torch.inference_mode():
            want = whole(batch, noting)
            assert same_bits(run(batch, watcher), want)
        assert noting.seen == []
        expected = [
            layer
            for layer, experts in absent.items()
            if set(experts) & set(noting.ids[layer].flatten().tolist())
        ]
        assert [seen.layer for seen in watcher.seen] == expected
        assert torch.equal(watcher.ids, noting.ids)
        assert same_bits(watcher.weights, noting.weights)
        stops += len(expected)
    assert 0 < stops < 4 * 3
    for one, other in zip(*caches, strict=True):
        _same_cache(one, other)


@EACH_NATIVE
@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
def test_what_a_watcher_raises_ends_the_pass_and_the_next_one_is_whole(
    name: str, kind: type[BaseException], checkpoints: Callable[[str], Path]
) -> None:
    decoder = tiny.load_decoder(checkpoints("qwen3_moe"), kernels=kernels(name))
    both = Both(decoder)
    batch = next(_decoded(decoder))
    run = both._run
    with torch.inference_mode(), pytest.raises(kind, match="of the watcher"):
        run(batch, Watching(Stops.ALWAYS, decoder, batch.num_tokens, raises=kind))
    both.check(batch)
    both.check_caches()


@EACH_NATIVE
@DTYPES
@pytest.mark.parametrize("stops", [Stops.NEVER, Stops.ALWAYS])
def test_forced_routing_is_taken_and_left_as_it_is(
    name: str, dtype: torch.dtype, stops: Stops, checkpoints: Callable[[str], Path]
) -> None:
    decoder = tiny.load_decoder(checkpoints("qwen2_moe"), dtype, kernels(name))
    both = Both(decoder)
    generator = torch.Generator().manual_seed(3)
    routings: dict[int, Routing] = {}
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer.mlp, MoeLayer)

        def route(hidden: Tensor, layer: int = index) -> Routing:
            return routings[layer]

        layer.mlp.router = route  # type: ignore[assignment] # after the fused pass was built
    for batch in _decoded(decoder):
        shape = (len(decoder.layers), batch.num_tokens, 8)
        ids = torch.rand(shape, generator=generator).argsort(-1)[..., :2].contiguous()
        weights = torch.rand(ids.shape, generator=generator)
        routings.update({i: Routing(ids[i], weights[i]) for i in range(len(decoder.layers))})
        forced = ids.clone(), weights.clone()
        watcher = Watching(stops, decoder, batch.num_tokens, forced=forced)
        both.check_watched(batch, watcher)
        assert torch.equal(watcher.ids, ids)
        assert same_bits(watcher.weights, weights)
        for seen in watcher.seen:
            assert torch.equal(seen.expert_ids, ids[seen.layer])
            assert same_bits(seen.weights, weights[seen.layer])
        assert len(watcher.seen) == (len(decoder.layers) if stops is Stops.ALWAYS else 0)
    both.check_caches()
