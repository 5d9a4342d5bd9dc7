"""Small random decoders, all in memory or behind a cache of few slots, and steps of sequences."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.host_experts import HostExperts
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.experts.policies import lru
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.slots import FixedSlots
from moe_serve.experts.split import MissCosts, MissPlanner
from moe_serve.experts.transfer import TransferQueue
from moe_serve.kernels.forward.gpu import Forward
from moe_serve.kernels.gpu.streams import HostStreams
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.kernels.suite import Kernels
from moe_serve.layers.attention import LayerCache
from moe_serve.layers.moe import MoeLayer
from moe_serve.models.decoder import Decoder, build_decoder
from moe_serve.models.dummy import dummy_weights
from moe_serve.models.expert_weights import ExpertWeights
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.models.spec import ModelSpec
from moe_serve.types import ForwardBatch
from tests.kernels.row_independence import same_bits
from tests.models import tiny

BLOCK_SIZE = 8
NUM_SEQS = 20
BLOCKS_OF_SEQ = tiny.CONTEXT // BLOCK_SIZE


def spec_of(model_type: str, changes: dict[str, Any] | None = None) -> ModelSpec:
    config = AutoConfig.for_model(model_type, **{**tiny.CONFIGS[model_type], **(changes or {})})
    return read_spec(HFConfig(config.to_dict(), Path("config.json")))


def decoder_of(spec: ModelSpec, kernels: Kernels, dtype: torch.dtype = torch.float32) -> Decoder:
    return build_decoder(
        spec, dtype, kernels, tiny.CONTEXT, lambda into: dummy_weights(spec, dtype, into=into)
    )


class RecordsInMemory:
    """A `Source` of all experts' records. errors: how many reads fail from now on."""

    def __init__(self, records: Tensor, num_experts: int) -> None:
        self._records = records
        self._num_experts = num_experts
        self.errors = 0

    def record_bytes(self, layer: int) -> int:
        return int(self._records.shape[1])

    def read_chunk(self, layer: int, expert: int, into: Tensor, begin: int, end: int) -> None:
        if self.errors:
            self.errors -= 1
            raise OSError("of the disk")
        into[begin:end] = self._records[layer * self._num_experts + expert, begin:end]

    def verify(self, layer: int, expert: int, record: Tensor) -> None:
        assert torch.equal(record, self._records[layer * self._num_experts + expert])

    def close(self) -> None:
        """Nothing is open."""


class Offloaded:
    """A decoder whose experts come to `slots` slots of each layer; close it."""

    def __init__(
        self,
        spec: ModelSpec,
        kernels: Kernels,
        dtype: torch.dtype,
        slots: int,
        has_host: bool = False,
    ) -> None:
        """has_host: whether what is missing runs on the host, but not all of it."""
        layers = [index for index, layer in enumerate(spec.layers) if layer.moe is not None]
        moe = spec.layers[layers[0]].moe
        assert moe is not None
        num_experts, total = moe.router.num_experts, slots * len(layers)
        weights = ExpertWeights(spec, dtype, kernels, total)
        plain = weights.plain()
        loaded = dummy_weights(spec, dtype, into=plain)
        for name in plain:
            del loaded[name]
        weights.pack()
        arena = weights.only_arena()
        shape = CacheShape(
            num_layers=len(layers), num_experts=num_experts, slots_per_layer=slots,
            total_slots=total,
        )  # fmt: skip
        self.cache = ExpertCache(shape, lru.build(shape, None), moe.router.top_k)
        self.source = RecordsInMemory(arena.records, num_experts)
        tables = {
            layer: ExpertTable(
                arena.slots, torch.from_numpy(self.cache.slot_of_expert[index]),
                torch.zeros(num_experts, dtype=torch.int64), spec.hidden_size,
                moe.intermediate_size, dtype,
            )
            for index, layer in enumerate(layers)
        }  # fmt: skip
        host = None
        if has_host:
            costs = MissCosts(
                copy_s=1.0, host_s=0.7, host_row_s=0.0, device_s=1e-6, device_row_s=0.0,
                is_one_processor=False,
            )  # fmt: skip
            all_there = {index: arena.table(layer) for index, layer in enumerate(layers)}
            host = HostExperts(
                all_there, MissPlanner("split", costs), HostStreams(torch.device("cpu"))
            )
        self.experts = OffloadedExperts(
            kernels.moe, tables, self.cache, TransferQueue(self.source, arena.slots, 1),
            FixedSlots(arena.slots, total), host,
        )  # fmt: skip
        self.decoder = Decoder(spec, loaded, self.experts, kernels, tiny.CONTEXT)


def caches_of(decoder: Decoder) -> list[LayerCache]:
    """Return caches in which any position of any sequence is there: random, but the same."""
    sizes = (NUM_SEQS * BLOCKS_OF_SEQ,) * len(decoder.groups)
    caches = decoder.allocate_caches(sizes, BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    for cache in caches:
        for part in (cache.key, cache.value):
            part.copy_(torch.randn(part.shape, generator=generator))
            part[:, :BLOCK_SIZE] = 0
    return caches


def check_caches(first: list[LayerCache], second: list[LayerCache]) -> None:
    for one, other in zip(first, second, strict=True):
        assert same_bits(one.key, other.key)
        assert same_bits(one.value, other.value)


class Steps:
    """Makes steps of chosen sequences, at any place; what is in the caches is taken as it is."""

    def __init__(self, num_groups: int, seed: int = 0) -> None:
        self._chance = random.Random(seed)
        self._tokens = [
            [self._chance.randrange(tiny.VOCAB_SIZE) for _ in range(tiny.CONTEXT)]
            for _ in range(NUM_SEQS)
        ]
        self._blocks: list[list[list[int]]] = [[] for _ in range(NUM_SEQS)]
        for _ in range(num_groups):
            free = list(range(1, NUM_SEQS * BLOCKS_OF_SEQ + 1))
            self._chance.shuffle(free)
            for blocks in self._blocks:
                blocks.append([free.pop() for _ in range(BLOCKS_OF_SEQ)])

    def decodes(self, contexts: list[int]) -> ForwardBatch:
        """Return one token of each of so many sequences, which then have these lengths."""
        return self.batch([(context - 1, 1) for context in contexts])

    def batch(self, runs: list[tuple[int, int]]) -> ForwardBatch:
        """runs: where each sequence is, and how many tokens of it run."""
        chosen = self._chance.sample(range(NUM_SEQS), len(runs))
        return tiny.batch_of(
            [
                self._run(index, start, length)
                for index, (start, length) in zip(chosen, runs, strict=True)
            ],
            BLOCK_SIZE,
        )

    def _run(self, index: int, start: int, length: int) -> tiny.Run:
        blocks = tuple(group[: -(-(start + length) // BLOCK_SIZE)] for group in self._blocks[index])
        return tiny.Run(self._tokens[index], start, length, blocks)

    def random(self, most_seqs: int) -> ForwardBatch:
        """Return decodes, mostly, or prompt chunks, beside decodes or alone."""
        chance = self._chance
        count = chance.choice([1, 2, 3, 4, 5, 8, 9, most_seqs, most_seqs + 1])
        if chance.random() < 0.75:
            longest = chance.choice([1, 31, 32, 33, 64, 65, 200, tiny.CONTEXT])
            return self.decodes([chance.randint(1, longest) for _ in range(count)])
        lengths = sorted(chance.choice([1, 1, 2, 7, 40]) for _ in range(min(count, 4)))
        return self.batch([(chance.randrange(200), length) for length in lengths])


def forward_of(
    decoder: Decoder, caches: list[LayerCache], build: Callable[..., Forward]
) -> tuple[Forward, Callable[..., Tensor]]:
    """Return the fused pass that `build` makes of a model's part, and `Decoder.fused` of it."""
    made: list[Forward] = []

    def keep(part: Any) -> Forward:
        made.append(build(part))
        return made[0]

    decoder.kernels = replace(decoder.kernels, build_forward=keep)
    fused = decoder.fused(caches)
    assert fused is not None
    return made[0], fused


def moe_layers(decoder: Decoder) -> Iterator[tuple[int, MoeLayer]]:
    for index, layer in enumerate(decoder.layers):
        if isinstance(layer.mlp, MoeLayer):
            yield index, layer.mlp
