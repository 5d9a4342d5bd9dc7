"""Graphs of the device there is against the same kernels without graphs: CUDA's, on a GPU.

On a CPU the plain kernels stand for those of a GPU, so that this has run before it gets there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.kernels.forward.base import ModelPart, Run, Stopped, Stops
from moe_serve.kernels.forward.gpu import Forward
from moe_serve.kernels.gpu import buckets
from moe_serve.kernels.gpu.attention_plan import plan
from moe_serve.kernels.gpu.graphs import HostGraph
from moe_serve.kernels.suite import Kernels
from moe_serve.types import ForwardBatch
from tests.kernels.forward.decoders import BLOCK_SIZE, Steps, caches_of, decoder_of, spec_of
from tests.kernels.forward.plain_kernels import KERNELS
from tests.kernels.implementations import kernels
from tests.kernels.row_independence import same_bits

NAMES = ("triton-exact", "triton-fast") if torch.cuda.is_available() else ("plain",)


@pytest.fixture(autouse=True)
def _small_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_LEAST_CONTEXT", 64)


class NoGraphs:
    """See `graphs.Graphs`: what is captured is only run again."""

    def capture(self, work: Any) -> HostGraph:
        work()
        return HostGraph(work)


def moved(part: Any, device: torch.device) -> Any:
    """Return a copy of data with all its tensors on a device."""
    if isinstance(part, Tensor):
        return part.to(device, copy=True)
    if isinstance(part, list):
        return [moved(one, device) for one in part]
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{f.name: moved(getattr(part, f.name), device) for f in fields(part)})
    return part


class Absent:
    """A watcher of a model of which some experts of each layer are absent until they are needed."""

    is_forced = False

    def __init__(self, model: ModelPart, num_tokens: int, stops: Stops, absent: list[int]) -> None:
        self.stops = stops
        self.num_stops = 0
        self._absent = absent
        self._slots = {
            layer: part.moe.experts.slot_of_expert
            for layer, part in enumerate(model.layers)
            if part.moe is not None
        }
        self._resident = {layer: slots.clone() for layer, slots in self._slots.items()}
        for slots in self._slots.values():
            slots[absent] = -1
        self.ids = torch.zeros(len(model.layers), num_tokens, 2, dtype=torch.int64)
        self.weights = torch.zeros(len(model.layers), num_tokens, 2)

    def serve(self, stopped: Stopped, can_wait: bool = True) -> Iterator[Run]:
        self.num_stops += 1
        slots = self._slots[stopped.layer]
        halves = stopped.counts > 0, stopped.counts > 0
        halves[0][::2], halves[1][1::2] = False, False
        slots.copy_(self._resident[stopped.layer])
        for number, half in enumerate(halves):
            yield Run(torch.from_numpy(half).to(torch.uint8), is_last=number == 1)
        slots[self._absent] = -1

    def restore(self) -> None:
        for layer, slots in self._slots.items():
            slots.copy_(self._resident[layer])


class OnDevice:
    """A model's part on the kernels' device, its slot tables on the host, and its pass."""

    def __init__(
        self, suite: Kernels, part: ModelPart, windows: list[int | None], graphs: Any = None
    ) -> None:
        self._windows = windows
        self.part: ModelPart = moved(part, suite.device)
        for layer, original in zip(self.part.layers, part.layers, strict=True):
            if layer.moe is not None and original.moe is not None:
                slots = original.moe.experts.slot_of_expert.clone()
                object.__setattr__(layer.moe, "experts", replace(
                    layer.moe.experts, slot_of_expert=slots,
                ))  # fmt: skip
        self._pass = Forward(suite, self.part, graphs, most_seqs=16)

    def run(
        self, batch: ForwardBatch, stops: Stops | None, absent: list[int]
    ) -> tuple[Tensor, Absent | None]:
        plans = [
            plan(batch.query_lens, batch.context_lens, table, BLOCK_SIZE, window)
            for table, window in zip(batch.block_tables, self._windows, strict=True)
        ]
        watcher = None
        if stops is not None:
            watcher = Absent(self.part, batch.num_tokens, stops, absent)
        step = batch.token_ids, batch.positions, batch.slot_mapping, plans
        hidden = self._pass(*step, watcher).cpu().clone()
        if watcher is not None:
            watcher.restore()
        return hidden, watcher


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stops", [None, Stops.NEVER, Stops.MISSING, Stops.ALWAYS])
def test_graphs_have_the_bits_of_their_work(name: str, stops: Stops | None) -> None:
    suite = KERNELS if name == "plain" else kernels(name)
    dtype = torch.bfloat16
    decoder = decoder_of(spec_of("qwen2_moe"), KERNELS, dtype)
    parts: list[ModelPart] = []
    decoder.kernels = replace(KERNELS, build_forward=lambda part: parts.append(part) or None)  # type: ignore[func-returns-value,return-value,arg-type]
    decoder.fused(caches_of(decoder))
    windows = [group.window for group in decoder.groups]
    one = OnDevice(suite, parts[0], windows)
    other = OnDevice(suite, parts[0], windows, NoGraphs())
    steps = Steps(len(decoder.groups))
    absent = [] if stops is Stops.NEVER else [0, 5]
    num_stops = 0
    for contexts in ([40, 50, 60], [64, 65], [5] * 9, [40, 50, 61], [30] * 16, [9]) * 2:
        batch = steps.decodes(contexts)
        got, watched = one.run(batch, stops, absent)
        want, watching = other.run(batch, stops, absent)
        assert bool(got.isfinite().all())
        assert same_bits(got, want)
        if watched is not None and watching is not None:
            assert torch.equal(watched.ids, watching.ids)
            assert same_bits(watched.weights, watching.weights)
            num_stops += watched.num_stops
    assert (num_stops > 0) == (stops in (Stops.MISSING, Stops.ALWAYS))
    for first, second in zip(one.part.layers, other.part.layers, strict=True):
        assert same_bits(first.key_cache.cpu(), second.key_cache.cpu())
        assert same_bits(first.value_cache.cpu(), second.value_cache.cpu())
        assert first.moe is not None
        assert second.moe is not None
        assert torch.equal(first.moe.experts.uses.cpu(), second.moe.experts.uses.cpu())
        assert bool((first.moe.experts.uses > 0).any())
