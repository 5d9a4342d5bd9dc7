"""Which cases are run, beside what, and in which turns."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.offload.figures import Figure
from benchmarks.offload.limits import DiskReads, TraceLimits
from benchmarks.offload.subject import Case, Sample, Subject, write_model
from benchmarks.peers.shape import Shape
from moe_serve.engine.memory import available_bytes
from moe_serve.errors import ConfigError

_DISK_SAMPLE_S = 0.5
# of the memory that is free, for engines that take turns
_SHARE_OF_FREE = 0.8
_BF16 = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is run: `warm` steps without a clock, then `rounds` times `steps`."""

    limits: TraceLimits
    shape: Shape
    cache: Path
    warm: int
    steps: int
    rounds: int

    @property
    def last(self) -> int:
        """The number of the step after the last one."""
        return self.warm + self.steps * self.rounds

    def check(self, batches: Sequence[int]) -> None:
        """Raise ConfigError where the trace is too short for what is to be run."""
        for batch in batches:
            found = self.limits.num_steps(batch)
            if found < self.last:
                raise ConfigError(
                    f"trace {self.limits.trace.name} is {found} steps long at batch {batch}; "
                    f"{self.last} are wanted: lower warm, steps or rounds"
                )

    def num_at_once(self, case: Case) -> int:
        """Return how many engines of such a case find room beside the one that holds all."""
        experts = self.shape.num_layers * self.shape.num_experts
        held = case.slots(self.shape.num_experts) * self.shape.num_layers
        if case.link_gb_per_s is not None:
            held += experts
        expert_bytes = _BF16 * self.shape.expert_elements
        case_bytes = held * expert_bytes + 2 * _BF16 * self.shape.dense_elements
        return max(1, int(_SHARE_OF_FREE * available_bytes() / case_bytes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What is asked for. The first of each of the last four lists is the base's."""

    tiers: Sequence[str]
    links: Sequence[float]
    resident: Sequence[float]
    policies: Sequence[str]
    predictors: Sequence[str]
    prefetch: Sequence[str]
    miss: Sequence[str]

    def bases(self, batch: int) -> Iterator[Case]:
        """Yield the first choices at every tier and number of residents."""
        links: list[float | None] = [None] if "disk" in self.tiers else []
        if "link" in self.tiers:
            links += self.links
        for link in links:
            for resident in self.resident:
                if link is None and resident == 100:
                    continue  # nothing is left on the disk: such an engine has no cache
                yield Case(
                    resident=resident,
                    batch=batch,
                    link_gb_per_s=link,
                    eviction=self.policies[0],
                    predictor=self.predictors[0],
                    prefetch=self.prefetch[0],
                    miss=self.miss[0],
                )

    def variants(self, base: Case) -> list[Case]:
        """Return the base, and what differs from it in one thing."""
        found = [base]
        found += [replace(base, eviction=name) for name in self.policies[1:]]
        found += [replace(base, prefetch=kind) for kind in self.prefetch[1:]]
        found += [replace(base, predictor=name) for name in self.predictors[1:]]
        if base.link_gb_per_s is not None:
            found += [replace(base, miss=kind) for kind in self.miss[1:]]
        return found


def measure(plan: Plan, cases: Sequence[Case], resident: Subject) -> Iterator[Figure]:
    """Measure cases of one tier, size and batch, as many in turn as memory holds.

    The first is the base: it runs again with every group.
    """
    base, others = cases[0], list(cases[1:])
    is_first = True
    while is_first or others:
        count = max(1, plan.num_at_once(base) - 1)
        group, others = [base, *others[:count]], others[count:]
        found = measure_group(plan, group, resident)
        yield from found if is_first else found[1:]
        is_first = False


def measure_group(plan: Plan, cases: Sequence[Case], resident: Subject) -> list[Figure]:
    """Build an engine for each case and let them take turns with the one that holds all."""
    trace, batch = plan.limits.trace, cases[0].batch
    folder = write_model(plan.shape, plan.cache)
    with ExitStack() as stack:
        subjects = []
        for case in cases:
            subject = Subject(trace, folder, batch, case, plan.cache)
            stack.callback(subject.close)
            subjects.append(subject)
        resident.restart()
        disk = _disk(plan, subjects[0])
        for subject in (resident, *subjects):
            subject.run(plan.warm)
        samples: list[list[Sample]] = [[] for _ in cases]
        of_resident: list[Sample] = []
        rates: list[float] = []
        for number in range(plan.rounds):
            of_resident.append(resident.run(plan.steps))
            rates.append(_rate(disk, cases[0], number))
            # no engine is always the first after the disk was read
            for index in range(len(cases)):
                turn = (index + number) % len(cases)
                samples[turn].append(subjects[turn].run(plan.steps))
        record_bytes = subjects[0].record_bytes
        del subjects, subject
    gc.collect()
    slots = cases[0].slots(trace.num_experts)
    least = 0  # where all have a slot they were brought in before
    if slots < trace.num_experts:
        least = plan.limits.least_misses(batch, slots, plan.warm, plan.last)
    return [
        Figure(
            case=case,
            routing=trace.name,
            samples=taken,
            resident=of_resident,
            gb_per_s=rates,
            least_bytes=least * record_bytes,
        )
        for case, taken in zip(cases, samples, strict=True)
    ]


def _disk(plan: Plan, subject: Subject) -> DiskReads | None:
    if subject.case is None or subject.case.link_gb_per_s is not None:
        return None
    (path,) = plan.cache.glob(f"*-{subject.engine.numerics_id}.experts")
    return DiskReads(path, subject.record_bytes)


def _rate(disk: DiskReads | None, case: Case, number: int) -> float:
    if disk is not None:
        return disk.gb_per_s(_DISK_SAMPLE_S, number)
    assert case.link_gb_per_s is not None
    return case.link_gb_per_s
