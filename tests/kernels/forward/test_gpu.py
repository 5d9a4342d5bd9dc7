"""The pass of a GPU, its graphs taped on a CPU: the bits of the same kernels layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_serve.errors import StoreError
from moe_serve.experts import host_experts
from moe_serve.kernels.forward import gpu as forward_gpu
from moe_serve.kernels.forward.base import Run, Stopped, Stops
from moe_serve.kernels.forward.gpu import Forward
from moe_serve.kernels.gpu import buckets
from moe_serve.kernels.gpu import streams as gpu_streams
from moe_serve.kernels.gpu.buckets import Part, Size
from moe_serve.kernels.gpu.streams import Event, HostEvent, HostStreams
from moe_serve.kernels.suite import Kernels
from moe_serve.models.decoder import Decoder
from moe_serve.types import ForwardBatch, Routing
from tests.kernels.forward.decoders import (
    BLOCK_SIZE,
    Offloaded,
    Steps,
    caches_of,
    check_caches,
    decoder_of,
    forward_of,
    moe_layers,
    spec_of,
)  # fmt: skip
from tests.kernels.forward.plain_kernels import KERNELS
from tests.kernels.gpu.late_streams import LateStreams
from tests.kernels.gpu.taped_graphs import TapedGraphs
from tests.kernels.row_independence import same_bits
from tests.models import tiny

MOST_SEQS = 12
MOE_TYPES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral")
NUM_STEPS = 10


@pytest.fixture(autouse=True)
def _small_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_LEAST_CONTEXT", 32)


class CountedStreams(HostStreams):
    """Streams that count how often the host waits."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.num_waits = 0
        counted = self

        class Waited(HostEvent):
            def wait(self) -> None:
                counted.num_waits += 1

        class Stream(gpu_streams.HostStream):
            def record(self) -> Event:
                return Waited()

        self._current = Stream()


@dataclass
class Seen:
    layer: int
    ids: Tensor
    weights: Tensor
    counts: list[int]
    residual: Tensor


@dataclass
class Watching:
    """Watches a pass over other experts; what it serves, it serves in parts if `is_split`."""

    inner: Any
    stops: Stops
    is_split: bool = False
    is_forced: bool = False
    seen: list[Seen] = field(default_factory=list)

    @property
    def ids(self) -> Any:
        return self.inner.ids

    @property
    def weights(self) -> Any:
        return self.inner.weights

    def serve(self, stopped: Stopped, can_wait: bool = True) -> Iterator[Run]:
        assert not can_wait
        self.seen.append(
            Seen(
                stopped.layer, torch.tensor(stopped.expert_ids), torch.tensor(stopped.weights),
                stopped.counts.tolist(), stopped.residual.clone(),
            )
        )  # fmt: skip
        for run in self.inner.serve(stopped, can_wait):
            if not self.is_split:
                yield run
                continue
            asked = stopped.counts > 0
            if run.only is not None:
                asked &= run.only.numpy() != 0
            experts = np.flatnonzero(asked)
            for index, expert in enumerate(experts):
                only = torch.zeros(len(stopped.counts), dtype=torch.uint8)
                only[expert] = 1
                yield Run(only, run.is_last and index == len(experts) - 1)


class Pair:
    """A decoder run layer by layer, all in memory, and one as a GPU runs it."""

    def __init__(
        self,
        model_type: str,
        slots: int | None = None,
        dtype: torch.dtype = torch.float32,
        changes: dict[str, Any] | None = None,
        graphs: TapedGraphs | None = None,
        streams: CountedStreams | LateStreams | None = None,
        kernels: Kernels = KERNELS,
        has_host: bool = False,
    ) -> None:
        """slots: of a cache, for each layer; None: no cache."""
        spec = spec_of(model_type, changes)
        self.plain = decoder_of(spec, KERNELS, dtype)
        self.offloaded = None if slots is None else Offloaded(spec, KERNELS, dtype, slots, has_host)
        self.decoder: Decoder = (
            decoder_of(spec, KERNELS, dtype) if self.offloaded is None else self.offloaded.decoder
        )
        self.graphs = graphs or TapedGraphs()
        self.streams = streams or CountedStreams()
        self.plain_experts: Any = self.plain.experts
        self.experts: Any = self.decoder.experts
        self.plain_caches, self.caches = caches_of(self.plain), caches_of(self.decoder)
        self.forward, self.run = forward_of(
            self.decoder,
            self.caches,
            lambda part: Forward(kernels, part, self.graphs, self.streams, MOST_SEQS),
        )
        self.steps = Steps(len(self.plain.groups))

    def want(self, batch: ForwardBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Run layer by layer; return the result, and the ids and weights of all layers."""
        experts = self.plain_experts
        with experts.step(batch, is_noted=bool(experts.layers)) as notes:
            hidden = self.plain.forward(batch, self.plain_caches)
            if notes is None:
                return hidden, torch.empty(0), torch.empty(0)
            return hidden, notes.ids, notes.weights

    @torch.inference_mode()
    def check(self, batch: ForwardBatch, **options: Any) -> list[Seen]:
        """Run a step both ways and compare all; options: of `Watching`, behind a cache."""
        want, ids, weights = self.want(batch)
        watching = None
        with self.experts.step(batch) as watcher:
            if watcher is not None:
                watching = Watching(watcher, **{"stops": watcher.stops, **options})
            got = self.run(batch, watching)
            if watcher is not None:
                self.check_notes(watcher, ids, weights)
        assert bool(want.isfinite().all())
        assert same_bits(got, want)
        return [] if watching is None else watching.seen

    def check_notes(self, watcher: Any, ids: Tensor, weights: Tensor) -> None:
        layers = list(self.experts.layers)
        assert torch.equal(watcher.ids[layers], ids[layers])
        assert same_bits(watcher.weights[layers], weights[layers])

    def check_all(self) -> None:
        """Compare the caches, and how often each expert was used."""
        if isinstance(self.streams, LateStreams):
            self.streams.finish()
        check_caches(self.plain_caches, self.caches)
        for layer, table in self.plain_experts.layers.items():
            assert torch.equal(table.uses, self.experts.layers[layer].uses)

    def close(self) -> None:
        self.experts.close()


@pytest.fixture
def pairs() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(*args: Any, **options: Any) -> Pair:
        made.append(Pair(*args, **options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


Make = Callable[..., Pair]


@pytest.mark.parametrize("model_type", tiny.CONFIGS)
def test_random_steps_have_the_bits_of_layer_by_layer(pairs: Make, model_type: str) -> None:
    pair = pairs(model_type)
    for _ in range(NUM_STEPS):
        pair.check(pair.steps.random(MOST_SEQS))
    pair.check_all()
    assert pair.graphs.num_captured
    assert pair.streams.num_waits == 0


def test_so_it_has_in_bfloat16(pairs: Make) -> None:
    pair = pairs("qwen2_moe", 3, torch.bfloat16)
    for _ in range(NUM_STEPS):
        pair.check(pair.steps.random(MOST_SEQS))
    pair.check_all()


@pytest.mark.parametrize("model_type", MOE_TYPES)
@pytest.mark.parametrize("slots", [3, 7])
def test_so_it_has_behind_a_cache(pairs: Make, model_type: str, slots: int) -> None:
    pair = pairs(model_type, slots)
    num_stops = 0
    for _ in range(NUM_STEPS):
        num_stops += len(pair.check(pair.steps.random(MOST_SEQS)))
    pair.check_all()
    assert num_stops


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("stops", [Stops.MISSING, Stops.ALWAYS])
@pytest.mark.parametrize("is_whole_faster", [False, True])
def test_any_way_to_look_gives_the_same(
    pairs: Make, monkeypatch: pytest.MonkeyPatch, stops: Stops, is_split: bool,
    is_whole_faster: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr("moe_serve.kernels.gpu.pace.Pace.is_whole_faster", is_whole_faster)
    pair = pairs("qwen2_moe", 4)
    layers = list(pair.plain_experts.layers)
    for _ in range(NUM_STEPS):
        batch = pair.steps.random(MOST_SEQS)
        seen = pair.check(batch, stops=stops, is_split=is_split)
        if stops is Stops.ALWAYS:
            assert [one.layer for one in seen] == layers
        for one in seen:
            experts = pair.plain_experts.layers[one.layer]
            assert one.ids.shape == (batch.num_tokens, 2)
            assert one.residual.shape == (batch.num_tokens, experts.hidden_size)
            counts = torch.bincount(one.ids.flatten(), minlength=experts.num_experts)
            assert one.counts == counts.tolist()
    pair.check_all()


def test_experts_that_run_on_the_host_leave_their_rows_to_the_pass(
    pairs: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_experts, "reference", KERNELS)  # of the same bits
    pair = pairs("qwen2_moe", 4, has_host=True)
    for _ in range(NUM_STEPS):
        pair.check(pair.steps.random(MOST_SEQS))
    pair.check_all()
    total = pair.experts.report()["total"]
    assert 0 < total["computed_on_cpu"] < total["misses"]


def test_what_a_stop_shows_is_what_layers_see_one_by_one(pairs: Make) -> None:
    pair = pairs("qwen3_moe", 4)
    shown: list[tuple[int, Tensor]] = []
    run = pair.plain_experts.run

    def noting(layer: int, inbox: Any, routing: Any, residual: Tensor) -> Any:
        shown.append((layer, residual.clone()))
        return run(layer, inbox, routing, residual)

    pair.plain_experts.run = noting
    for stops in (Stops.ALWAYS, Stops.MISSING):
        for _ in range(4):
            shown.clear()
            batch = pair.steps.decodes([50, 60, 70])
            for one in pair.check(batch, stops=stops):
                assert same_bits(one.residual, dict(shown)[one.layer])


def _forcing(num_experts: int, layers: list[int]) -> Callable[[ForwardBatch, Any], None]:
    generator = torch.Generator().manual_seed(5)
    drawn: list[Any] = [None, None, None]

    def replay(batch: ForwardBatch, notes: Any) -> None:
        if drawn[0] is not batch:
            shape = (*notes.ids.shape[:2], num_experts)
            ids = torch.rand(shape, generator=generator).argsort(-1)[..., : notes.ids.shape[2]]
            drawn[:] = batch, ids, torch.rand(ids.shape, generator=generator)
        for layer in layers:
            notes.ids[layer], notes.weights[layer] = drawn[1][layer], drawn[2][layer]

    return replay


@pytest.mark.parametrize("slots", [None, 4])
def test_forced_routing_is_taken(pairs: Make, slots: int | None) -> None:
    pair = pairs("qwen2_moe", slots)
    for index, layer in moe_layers(pair.plain):

        def route(hidden: Tensor, layer: int = index) -> Routing:
            notes = pair.plain_experts._notes
            return Routing(notes.ids[layer].clone(), notes.weights[layer].clone())

        layer.router = route  # type: ignore[assignment]
    pair.plain_experts.replay = pair.experts.replay = _forcing(8, list(pair.experts.layers))
    for _ in range(NUM_STEPS):
        batch = pair.steps.random(MOST_SEQS)
        with torch.inference_mode():
            want, ids, weights = pair.want(batch)
            with pair.experts.step(batch) as watcher:
                got = pair.run(batch, watcher)
                pair.check_notes(watcher, ids, weights)
        assert same_bits(got, want)
    pair.check_all()
    if slots is None:
        assert pair.streams.num_waits == 0


def test_notes_cost_one_wait(pairs: Make) -> None:
    pair = pairs("qwen3_moe")
    for batch in (pair.steps.decodes([20, 30]), pair.steps.batch([(0, 30)])):
        with torch.inference_mode():
            want, ids, weights = pair.want(batch)
            before = pair.streams.num_waits
            with pair.experts.step(batch, is_noted=True) as watcher:
                got = pair.run(batch, watcher)
                pair.check_notes(watcher, ids, weights)
        assert same_bits(got, want)
        assert pair.streams.num_waits == before + 1
    pair.check_all()


def test_a_step_without_a_miss_waits_once_and_is_one_graph(pairs: Make) -> None:
    pair = pairs("qwen3_moe", 8)
    assert pair.offloaded is not None
    pair.offloaded.experts.preload((layer, expert) for layer in range(2) for expert in range(8))
    while pair.offloaded.experts.queue.is_busy:
        time.sleep(1e-3)
    waits = pair.streams.num_waits
    assert not pair.check(pair.steps.batch([(0, 30)])), "all have come before the step"
    assert pair.offloaded.cache.is_full
    assert pair.streams.num_waits == waits + 2, "a prompt is looked at in every layer"
    pair.check(pair.steps.decodes([100, 40, 30, 20, 10]))
    waits, replays = pair.streams.num_waits, pair.graphs.num_replayed
    for _ in range(3):
        pair.check(pair.steps.decodes([100, 40, 30, 20, 10]))
    assert pair.streams.num_waits == waits + 3
    assert pair.graphs.num_replayed == replays + 3


def test_what_fills_a_bucket_up_is_of_no_sequence(pairs: Make) -> None:
    pair = pairs("qwen2_moe")
    pair.check(pair.steps.decodes([30] * 8))
    pair.check(pair.steps.decodes([20] * 5))
    (bucket,) = pair.forward._buckets.values()
    assert bucket.views["contexts"].tolist() == [20] * 5 + [0] * 3
    assert bucket.views["num_rows"].tolist() == [5]
    for name in ("slots0", "slots1"):
        assert bucket.views[name][5:].tolist() == [-1] * 3
        assert bool((bucket.views[name][:5] > 0).all())


def test_a_capture_does_not_read_what_another_size_left(pairs: Make) -> None:
    pair = pairs("qwen2_moe", 4)
    for num_seqs in (1, 8, 1, 8, 2, 1):
        pair.check(pair.steps.decodes([10] * num_seqs), stops=Stops.ALWAYS, is_split=True)
    pair.check_all()


def test_captures_are_few_and_kept(pairs: Make) -> None:
    pair = pairs("qwen3_moe")
    for contexts in ([10], [31], [32], [9]):
        pair.check(pair.steps.decodes(contexts))
    assert pair.graphs.num_captured == 1
    for contexts in ([33], [10, 11], [10, 11, 12], [10, 11, 12, 13]):
        pair.check(pair.steps.decodes(contexts))
    assert pair.graphs.num_captured == 4
    pair.check(pair.steps.decodes([10] * 5))
    pair.check(pair.steps.decodes([10] * 8))
    pair.check(pair.steps.decodes([10] * 9))
    assert pair.graphs.num_captured == 6
    pair.check(pair.steps.decodes([10] * (MOST_SEQS + 1)))
    pair.check(pair.steps.batch([(3, 2)]))
    assert pair.graphs.num_captured == 6


def test_what_was_warmed_up_is_captured_and_changes_nothing(pairs: Make) -> None:
    sizes = [(1, 30), (3, 70), (4, 128), (1000, 5), (1, 1000)]
    for slots in (None, 4):
        pair = pairs("qwen2_moe", slots)
        windows = [group.window for group in pair.decoder.groups]
        pair.forward.warm_up(sizes, BLOCK_SIZE, windows, is_watched=slots is not None)
        captured = pair.graphs.num_captured
        assert captured == 2 * (1 if slots is None else 1 + 1 + 3)
        pair.check(pair.steps.decodes([4]))
        pair.check(pair.steps.decodes([100, 20, 30]))
        assert pair.graphs.num_captured == captured
        pair.check_all()


def test_buckets_used_least_recently_are_forgotten(
    pairs: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_gpu, "_MOST_BUCKETS", 2)
    pair = pairs("llama")
    counts = []
    for num_seqs in (1, 2, 1, 4, 1, 2):
        pair.check(pair.steps.decodes([10] * num_seqs))
        counts.append(pair.graphs.num_captured)
    assert counts == [1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("room", [0, 1, 3])
def test_without_memory_for_graphs_it_runs_all_the_same(
    pairs: Make, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    pair = pairs("qwen2_moe", 4, graphs=TapedGraphs(room=room))
    for _ in range(NUM_STEPS):
        pair.check(pair.steps.random(MOST_SEQS))
    pair.check_all()
    assert pair.graphs.num_captured == room
    assert pair.graphs.num_refused <= len(pair.forward._buckets), "each size is tried once"
    assert caplog.text.count("without CUDA graphs") == 1


@pytest.mark.parametrize("stops", [Stops.MISSING, Stops.ALWAYS])
def test_what_cannot_be_brought_in_ends_the_step_and_the_next_is_whole(
    pairs: Make, stops: Stops
) -> None:
    pair = pairs("qwen3_moe", 3)
    pair.check(pair.steps.decodes([10, 20]))
    assert pair.offloaded is not None
    batch = pair.steps.decodes([30, 40, 50, 60, 70])
    pair.offloaded.source.errors = 1
    with pytest.raises(StoreError, match="of the disk"):
        pair.check(batch, stops=stops)
    for _ in range(3):
        pair.check(batch, stops=stops)
    check_caches(pair.plain_caches, pair.caches)


class Late(Watching):
    """Watches a pass whose kernels come late; no record comes to a slot before they came."""

    streams: LateStreams

    def serve(self, stopped: Stopped, can_wait: bool = True) -> Iterator[Run]:
        for run in super().serve(stopped, can_wait):
            yield run
            self.streams.finish()


@pytest.mark.parametrize("stops", [None, Stops.MISSING, Stops.ALWAYS])
@pytest.mark.parametrize("is_split", [False, True])
def test_it_waits_for_all_that_it_reads(pairs: Make, stops: Stops | None, is_split: bool) -> None:
    streams = LateStreams(seed=3)

    def moe(*args: Any) -> Tensor:
        out: Tensor | None = args[5]
        if out is None:  # within a graph
            return KERNELS.moe(*args)
        streams.kernels.launch(lambda: KERNELS.moe(*args))
        return out

    pair = pairs(
        "qwen2_moe", None if stops is None else 4, streams=streams,
        graphs=TapedGraphs(launch=streams.kernels.launch), kernels=replace(KERNELS, moe=moe),
    )  # fmt: skip
    windows = [group.window for group in pair.decoder.groups]
    parts = [Part("rest", number) for number in range(3)] if stops is not None else []
    pair.forward._bucket(Size(4, 64), BLOCK_SIZE, windows).wanted.update(parts)
    pair.forward.warm_up([(4, 64)], BLOCK_SIZE, windows, is_watched=stops is not None)
    for contexts in ([40, 50, 60], [64, 33, 40], [34, 35, 36, 37]):
        for _ in range(3):
            batch = pair.steps.decodes(contexts)
            with torch.inference_mode():
                want, ids, weights = pair.want(batch)
                with pair.experts.step(batch) as watcher:
                    if stops is None:
                        got = pair.run(batch)
                    else:
                        watching = Late(watcher, stops, is_split)
                        watching.streams = streams
                        got = pair.run(batch, watching)
                        pair.check_notes(watcher, ids, weights)
                streams.finish()
                assert same_bits(got, want)
    pair.check_all()
