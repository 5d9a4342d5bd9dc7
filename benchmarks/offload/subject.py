"""One engine under test: a dummy model that decodes a trace's sequences, and what that cost."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.offload.routing import start
from benchmarks.peers.shape import Shape
from moe_serve.config import EngineConfig
from moe_serve.engine.build import build_engine
from moe_serve.engine.engine import Engine
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.experts.trace import Trace

_BLOCK_SIZE = 16


def shape_of(trace: Trace, hidden_size: int = 1024, intermediate_size: int = 384) -> Shape:
    """Return a model in which the trace could have been recorded, and experts are what is read.

    A twentieth of a token's bytes is attention, and less the head.
    """
    return Shape(
        hidden_size=hidden_size,
        num_layers=trace.num_layers,
        num_heads=max(1, hidden_size // 128),
        num_kv_heads=max(1, hidden_size // 512),
        head_dim=64,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        moe_intermediate_size=intermediate_size,
        vocab_size=4096,
        max_position_embeddings=max(512, int(np.diff(trace.seq_offsets).max()) + 1),
    )


def write_model(shape: Shape, cache: Path) -> Path:
    """Write config.json of a dummy of `shape` below `cache`; return its folder."""
    folder = cache / "offload-dummy"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
    return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """How experts are kept in a run. resident: percent of them that have a slot.

    link_gb_per_s: of the emulated link, or None for the disk.
    """

    resident: float
    batch: int
    link_gb_per_s: float | None = None
    eviction: str = "adaptive"
    predictor: str = "learned_ids"
    prefetch: str = "auto"
    miss: str = "copy"

    @property
    def tier(self) -> str:
        return "disk" if self.link_gb_per_s is None else f"link {self.link_gb_per_s:g} GB/s"

    @property
    def name(self) -> str:
        parts = [self.tier, f"{self.resident:g} %", f"batch {self.batch}", self.eviction]
        guess = "no prefetch" if self.prefetch == "off" else f"{self.predictor} {self.prefetch}"
        return ", ".join([*parts, guess, self.miss])

    def slots(self, num_experts: int) -> int:
        """Return how many slots a layer has."""
        return round(self.resident / 100 * num_experts)

    def options(self, num_experts: int, store: Path) -> dict[str, object]:
        """Return the options of an engine that keeps its experts so."""
        options: dict[str, object] = {
            "expert_cache_slots": self.slots(num_experts),
            "eviction": self.eviction,
            "predictor": self.predictor,
            "prefetch": self.prefetch,
        }
        if self.link_gb_per_s is None:
            return {**options, "expert_store": str(store)}
        return {**options, "emulate_link": float(self.link_gb_per_s), "miss": self.miss}


@dataclass(kw_only=True, slots=True)
class Sample:
    """What some steps of one engine cost.

    seconds: of engine steps. stall_s: of them, waiting for experts. counters: the cache's, by name,
    and of the prefetcher "issued", "given_up" and "paused". disk_bytes: read from disk by this
    process, as the kernel says; None where it does not. predictor_us: of each layer,
    the predictor alone; planning_us: of each step, per layer, with all that is decided from it.
    """

    num_tokens: int
    num_steps: int
    seconds: float
    stall_s: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)
    disk_bytes: int | None = None
    predictor_us: list[float] = field(default_factory=list)
    planning_us: list[float] = field(default_factory=list)

    def per_token(self, name: str) -> float:
        """Return a counter's mean over tokens."""
        return self.counters.get(name, 0) / self.num_tokens

    @property
    def ms_per_token(self) -> float:
        return 1e3 * self.seconds / self.num_tokens

    @property
    def stall_ms_per_token(self) -> float:
        return 1e3 * self.stall_s / self.num_tokens


class Subject:
    """An engine that replays a trace, step by step. case: None where all experts are held."""

    def __init__(
        self,
        trace: Trace,
        folder: Path,
        batch: int,
        case: Case | None = None,
        store: Path | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """folder: the model's; store: where packed experts are kept; more: options of the engine.

        Raises CapacityError.
        """
        self.case = case
        self.name = f"all in memory, batch {batch}" if case is None else case.name
        self._trace = trace
        options: dict[str, Any] = {"prefetch": "off"}
        if case is not None:
            options = case.options(trace.num_experts, store or folder)
        longest = int(np.diff(trace.seq_offsets).max())
        self.engine: Engine = build_engine(
            EngineConfig.from_options(
                {
                    "load_format": "dummy",
                    "block_size": _BLOCK_SIZE,
                    "num_kv_blocks": batch * (math.ceil(longest / _BLOCK_SIZE) + 1),
                    "max_num_seqs": batch,
                    "enable_prefix_caching": False,
                    **options,
                    **(more or {}),
                }
            ),
            folder,
        )
        experts = self.engine.runner.model.experts
        self.offloaded = experts if isinstance(experts, OffloadedExperts) else None
        if self.offloaded is not None and case is not None and case.resident == 100:
            layers, experts_of_layer = range(trace.num_layers), range(trace.num_experts)
            self.offloaded.preload((layer, one) for layer in layers for one in experts_of_layer)
            while self.offloaded.queue.is_busy:  # what is on its way would count as brought in
                time.sleep(1e-3)
        self.restart()

    @property
    def record_bytes(self) -> int:
        """Of one expert, as it is brought in."""
        assert self.offloaded is not None, "all experts are held"
        return int(next(iter(self.offloaded.layers.values())).records.shape[1])

    def restart(self) -> None:
        """Begin the trace anew, with what is resident and learned as it is."""
        for index in range(self._trace.num_seqs):
            self.engine.abort(str(index))
        start(self.engine, self._trace)

    def run(self, num_steps: int) -> Sample:
        """Run steps; guesses that are under way at their end are waited for, off the clock."""
        before, disk_before = self._counts(), disk_read_bytes()
        stall_before = self._stall_s()
        sample = Sample(num_tokens=0, num_steps=num_steps, seconds=0.0)
        for _ in range(num_steps):
            spent = self._predictor_s()
            start_s = time.perf_counter()
            outputs = self.engine.step()
            sample.seconds += time.perf_counter() - start_s
            assert outputs, "the trace has ended"
            assert all(output.error is None for output in outputs), outputs
            sample.num_tokens += len(outputs)
            if (us := self._us_per_layer(spent)) is not None:
                sample.planning_us.append(us)
                sample.predictor_us += self._asking_us()
        sample.stall_s = self._stall_s() - stall_before
        self._settle()
        sample.counters = {name: count - before[name] for name, count in self._counts().items()}
        disk_after = disk_read_bytes()
        if disk_before is not None and disk_after is not None:
            sample.disk_bytes = disk_after - disk_before
        return sample

    def close(self) -> None:
        """Stop what runs beside the engine."""
        if self.offloaded is not None:
            self.offloaded.close()

    def _settle(self) -> None:
        while self.offloaded is not None and self.offloaded.queue.num_guesses:
            time.sleep(1e-3)

    def _counts(self) -> Mapping[str, int]:
        if self.offloaded is None:
            return {}
        counts = self.offloaded.cache.counters.total()
        prefetcher = self.offloaded.prefetcher
        if prefetcher is not None:
            stats = prefetcher.stats
            counts |= {"issued": stats.issued, "given_up": stats.given_up, "paused": stats.paused}
        return counts

    def _stall_s(self) -> float:
        return 0.0 if self.offloaded is None else sum(self.offloaded.stats.stall_s)

    def _predictor_s(self) -> tuple[float, int]:
        """Return seconds and layers so far."""
        if self.offloaded is None or self.offloaded.prefetcher is None:
            return 0.0, 0
        stats = self.offloaded.prefetcher.stats
        return stats.predictor_s, stats.num_layers

    def _asking_us(self) -> list[float]:
        """Return what the predictor alone took in the layers of the last step."""
        assert self.offloaded is not None
        assert self.offloaded.prefetcher is not None
        asking_s = self.offloaded.prefetcher.stats.asking_s
        num_layers = self.offloaded.cache.shape.num_layers
        return [1e6 * seconds for seconds in list(asking_s)[-num_layers:]]

    def _us_per_layer(self, before: tuple[float, int]) -> float | None:
        """Return what guessing took of a step, per layer; None where it was off."""
        seconds, layers = self._predictor_s()
        if layers == before[1]:
            return None
        return 1e6 * (seconds - before[0]) / (layers - before[1])


def disk_read_bytes() -> int | None:
    """Return how many bytes this process has had read from disk, or None if that is not told."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:  # not Linux, or hidden
        return None
    counts = dict(line.split(": ") for line in lines)
    return int(counts["read_bytes"])
