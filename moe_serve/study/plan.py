"""What `moe-serve plan` computes: what fits where, and how long a step of the workload then takes.

What fits is the engine's own answer: `plan_residency` and `num_kv_blocks`, given the memory that a
process of the layout gets. Times are modelled, see `moe_serve.study.step_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch

from moe_serve.config import EngineConfig, RanksConfig
from moe_serve.engine.memory import num_kv_blocks
from moe_serve.engine.ranks import Share, share_of
from moe_serve.engine.residency import Residency, plan_residency
from moe_serve.errors import CapacityError, ConfigError
from moe_serve.experts.placement.base import Array, Mesh
from moe_serve.experts.trace import Trace
from moe_serve.kernels.suite import Kernels
from moe_serve.models.expert_weights import moe_layers
from moe_serve.models.spec import ModelSpec
from moe_serve.study.expert_demand import ExpertDemand, demand_of
from moe_serve.study.machine import Machine
from moe_serve.study.simulate import default_slots
from moe_serve.study.step_model import Process, StepTime, Work, step_time, work_of
from moe_serve.study.wire import DISPATCHERS

DEFAULT_RANKS = (1, 2, 4, 8)
_MOST_LENGTH = 2**31 - 1
_MOST_RANKS = 1024

Kind = Literal["one", "replicas", "ranks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """num_seqs prompts of input_len tokens, all at once, and output_len tokens for each."""

    input_len: int
    output_len: int
    num_seqs: int

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_seqs"):
            value = getattr(self, name)
            if not 1 <= value <= _MOST_LENGTH:
                raise ConfigError(f"{name} is {value}; it must be from 1 to {_MOST_LENGTH}")

    @property
    def length(self) -> int:
        return self.input_len + self.output_len


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is planned for: a model, how an engine would run it, a machine, and the work."""

    config: EngineConfig
    spec: ModelSpec
    dtype: torch.dtype
    kernels: Kernels
    machine: Machine
    workload: Workload
    trace: Trace | None = None

    def __post_init__(self) -> None:
        length, limit = self.workload.length, self.spec.max_position_embeddings
        if length > limit:
            raise ConfigError(
                f"input_len {self.workload.input_len} and output_len {self.workload.output_len} "
                f"are {length} tokens; the model's context holds {limit}: give less"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A layout, by what one of its processes has and does; None where it cannot be.

    why_not: why it cannot be. weights_bytes: held, experts among them; slots: of each layer, None:
    all are held; given_slots: where that is not left to the engine. num_seqs: sequences that a
    process is given; num_running: of them, those that run at once. Figures of a step are of
    decoding, halfway through the outputs.
    """

    kind: Kind
    num_processes: int
    dispatcher: str | None = None
    why_not: str | None = None
    weights_bytes: int | None = None
    slots: int | None = None
    given_slots: int | None = None
    kv_bytes: int | None = None
    num_kv_blocks: int | None = None
    num_seqs: int | None = None
    num_running: int | None = None
    read_bytes: float | None = None
    missed_experts: float | None = None
    miss_bytes: float | None = None
    network_bytes: float | None = None
    num_collectives: int | None = None
    memory_s: float | None = None
    compute_s: float | None = None
    miss_s: float | None = None
    exchange_s: float | None = None
    other_s: float | None = None
    step_s: float | None = None
    prefill_s: float | None = None
    tokens_per_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All layouts, and one process by slots against KV (none of a dense model).

    missing: where no layout can be, bytes that a machine lacks for the nearest, and which it is.
    """

    rows: tuple[Row, ...]
    by_slots: tuple[Row, ...]
    missing: tuple[int, Row] | None


@dataclass(frozen=True, slots=True)
class _Fit:
    residency: Residency
    num_kv_blocks: int
    kv_bytes: int
    num_running: int


def make_plan(
    subject: Subject,
    ranks: Sequence[int] = (),
    dispatchers: Sequence[str] = DISPATCHERS,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Plan each number of processes, as replicas and as ranks with each dispatcher.

    ranks: () for DEFAULT_RANKS, as far as there are cores and experts. progress: is told of each
    part before it starts. Raises ConfigError for a number or a name that cannot be, or a trace that
    is not of the model.
    """
    for number in ranks:
        if not 1 <= number <= _MOST_RANKS:
            raise ConfigError(f"ranks is {number}; it must be from 1 to {_MOST_RANKS}")
    for name in dispatchers:
        if name not in DISPATCHERS:
            raise ConfigError(
                f"dispatcher is {name!r}; a plan models {', '.join(DISPATCHERS)} (auto takes the "
                "fastest of these)"
            )
    planner = _Planner(subject, progress or (lambda _: None))
    numbers = dict.fromkeys(ranks or planner.default_ranks())
    rows = tuple(row for number in numbers for row in planner.rows(number, dispatchers))
    is_none = all(row.why_not for row in rows)
    return Plan(
        rows=rows,
        by_slots=tuple(planner.by_slots()),
        missing=planner.least_missing(rows) if is_none else None,
    )


class _Planner:
    """Makes the rows of one subject."""

    def __init__(self, subject: Subject, progress: Callable[[str], None]) -> None:
        self._subject = subject
        self._progress = progress
        self._demand: ExpertDemand = demand_of(
            subject.spec, subject.trace, subject.config.experts.eviction
        )
        self._layers = moe_layers(subject.spec)

    def default_ranks(self) -> list[int]:
        machine = self._subject.machine
        most = machine.cores * machine.num_machines
        if self._layers:
            most = min(most, self._demand.chances.shape[1])
        return [number for number in DEFAULT_RANKS if number <= most]

    def rows(self, number: int, dispatchers: Sequence[str]) -> Iterator[Row]:
        """Yield replicas, and ranks with each dispatcher; of one process there is one row."""
        self._progress(f"--ranks {number} ...")
        yield self._row(Row(kind="one" if number == 1 else "replicas", num_processes=number))
        if number > 1 and self._layers:
            for name in dispatchers:
                yield self._row(Row(kind="ranks", num_processes=number, dispatcher=name))

    def by_slots(self) -> Iterator[Row]:
        """Yield one process with few slots of each layer to all, until they do not fit."""
        if not self._layers:
            return
        num_experts = self._demand.chances.shape[1]
        top_k = self._work(0).top_k
        for slots in dict.fromkeys((*default_slots(num_experts, top_k), num_experts)):
            if slots <= num_experts:
                self._progress(f"one process, {slots} slots a layer ...")
                row = self._row(Row(kind="one", num_processes=1, given_slots=slots))
                yield row
                if row.why_not is not None:
                    return

    def least_missing(self, rows: Sequence[Row]) -> tuple[int, Row] | None:
        """Return the fewest bytes that a machine lacks for a layout to be, and the layout."""
        found = []
        for row in {(row.kind, row.num_processes): row for row in reversed(rows)}.values():
            least = self._least_bytes(row)
            if least is not None:
                needed = least * self._num_here(row)
                found.append((needed - self._subject.machine.memory_bytes, row))
        return min(found, key=lambda one: one[0], default=None)

    # -- one row -----------------------------------------------------------------------------------

    def _row(self, row: Row) -> Row:
        machine, workload = self._subject.machine, self._subject.workload
        num_here = self._num_here(row)
        if num_here > machine.cores:
            return replace(
                row,
                why_not=f"{num_here} processes on a machine of {machine.cores} cores; give at most "
                f"--ranks {machine.cores * machine.num_machines}",
            )
        try:
            share = self._share(row)
            fit = self._fit(row, machine.memory_bytes // num_here, share)
        except (CapacityError, ConfigError) as error:
            return replace(row, why_not=str(error))
        shape = fit.residency.shape
        held = None if shape is None else shape.slots_per_layer or (
            shape.total_slots // shape.num_layers
        )  # fmt: skip
        process = Process(
            machine=machine,
            num_here=num_here,
            holds=self._holds(share),
            slots=held,
            dispatcher=row.dispatcher,
        )
        num_seqs = self._num_seqs(row)
        work = self._work(fit.residency.slot_bytes)
        step = self._decode(work, process, fit.num_running)
        first_s, total_s = 0.0, 0.0
        for size in _sizes(num_seqs, fit.num_running):
            prefill_s = self._prefill_s(work, process, size)
            first_s = first_s or prefill_s
            step_s = step if size == fit.num_running else self._decode(work, process, size)
            total_s += prefill_s + (workload.output_len - 1) * step_s.seconds
        return replace(
            row,
            weights_bytes=fit.residency.model_bytes,
            slots=held,
            kv_bytes=fit.kv_bytes,
            num_kv_blocks=fit.num_kv_blocks,
            num_seqs=num_seqs,
            num_running=fit.num_running,
            **{name: getattr(step, name) for name in StepTime.__slots__},
            step_s=step.seconds,
            prefill_s=first_s,
            tokens_per_s=workload.num_seqs * workload.output_len / total_s,
        )

    def _fit(self, row: Row, available: int, share: Share | None) -> _Fit:
        """Ask the engine what it would hold. Raises CapacityError, ConfigError."""
        subject, length = self._subject, self._subject.workload.length
        config = replace(
            subject.config,
            scheduler=replace(subject.config.scheduler, max_num_seqs=self._num_seqs(row)),
        )
        if row.given_slots is not None:
            experts = replace(
                config.experts, expert_cache_slots=row.given_slots, expert_cache_gb=None
            )
            config = replace(config, experts=experts)
        given = subject.spec, subject.dtype
        residency = plan_residency(config, *given, subject.kernels, length, available, share=share)
        counts = num_kv_blocks(
            config, *given, length, available, residency.model_bytes, residency.kv_bytes
        )
        block_size, count = config.kv.block_size, min(counts)
        num_running = min(self._num_seqs(row), count // -(-length // block_size))
        groups = subject.spec.cache_groups(subject.dtype.itemsize)
        if num_running < 1:
            raise CapacityError(
                f"{count} KV blocks of {block_size} tokens are left, and one sequence of {length} "
                f"tokens needs {-(-length // block_size)}; set kv_cache_gb (in --config)"
            )
        kv_bytes = sum(
            (each + 1) * block_size * group.bytes_per_token
            for each, group in zip(counts, groups, strict=True)
        )
        return _Fit(residency, count, kv_bytes, num_running)

    def _least_bytes(self, row: Row) -> int | None:
        """Return the least memory of a process with which the engine would run, to a MiB."""
        low, high = 0, 2**30  # MiB
        try:
            share = self._share(row)
            self._fit(row, high << 20, share)
        except (CapacityError, ConfigError):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self._fit(row, middle << 20, share)
            except CapacityError:
                low = middle
            else:
                high = middle
        return high << 20

    def _decode(self, work: Work, process: Process, num_running: int) -> StepTime:
        workload = self._subject.workload
        return step_time(
            work,
            self._demand,
            process,
            num_tokens=num_running,
            num_in_world=min(workload.num_seqs, num_running * process.num_ranks),
            num_sampled=num_running,
            num_seqs=num_running,
            context=workload.input_len + workload.output_len / 2,
        )

    def _prefill_s(self, work: Work, process: Process, num_running: int) -> float:
        """Return the time of all prompts of a process, in steps of max_num_batched_tokens."""
        workload = self._subject.workload
        left = num_running * workload.input_len
        total_s = 0.0
        steps = _sizes(left, self._subject.config.scheduler.max_num_batched_tokens)
        for index, num_tokens in enumerate(steps):
            total_s += step_time(
                work,
                self._demand,
                process,
                num_tokens=num_tokens,
                num_in_world=num_tokens * min(process.num_ranks, workload.num_seqs),
                num_sampled=num_running if index == len(steps) - 1 else 0,
                num_seqs=-(-num_tokens // workload.input_len),
                context=(workload.input_len + 1) / 2,
            ).seconds
        return total_s

    def _num_here(self, row: Row) -> int:
        return -(-row.num_processes // self._subject.machine.num_machines)

    def _num_seqs(self, row: Row) -> int:
        return -(-self._subject.workload.num_seqs // row.num_processes)

    def _work(self, slot_bytes: int) -> Work:
        return work_of(self._subject.spec, self._subject.dtype, slot_bytes)

    def _share(self, row: Row) -> Share | None:
        """Return the experts of the rank that has most, in blocks; None: all."""
        if row.kind != "ranks":
            return None
        mesh = Mesh(num_ranks=row.num_processes, ranks_per_node=row.num_processes)
        options = RanksConfig(placement="contiguous")
        share = share_of(options, self._subject.spec, mesh, 0, "")
        assert share is not None, "a dense model has no ranks"
        most = int(share.placement.holds().sum(axis=(0, 1)).argmax())
        return replace(share, rank=most)

    def _holds(self, share: Share | None) -> Array:
        if share is None:
            return np.ones((*self._demand.chances.shape, 1), bool)
        return share.placement.holds()


def _sizes(number: int, most: int) -> list[int]:
    """Return `number` in parts of `most`, the last with what is left."""
    rest = [number % most] if number % most else []
    return [most] * (number // most) + rest
