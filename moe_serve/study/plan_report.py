"""A plan in words, as tables and as JSON: which layout to use, and where expert parallelism ends.

Ranks are advised only where their model is faster than the best without them by `LEAST_GAIN`: what
the model leaves out (see `moe_serve.study.step_model`) is more between ranks than in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_serve.engine.memory import GIB, text_of
from moe_serve.study.machine import QUANTITIES
from moe_serve.study.plan import Plan, Row, Subject
from moe_serve.study.tables import table

SCHEMA = 1
LEAST_GAIN = 1.25
_HEAD = (
    "weights GiB", "slots", "KV GiB", "running", "read MB", "misses", "miss MB", "sent MB",
    "memory ms", "compute ms", "misses ms", "exchange ms", "step ms", "prompts s", "tokens/s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """best: the layout to use, None where there is none. sentence: which, and why."""

    best: Row | None
    sentence: str


def verdict_of(subject: Subject, plan: Plan) -> Verdict:
    """Return what to use, and whether expert parallelism is worth it."""
    can_be = [row for row in (*plan.rows, *plan.by_slots) if row.why_not is None]
    if not can_be:
        return Verdict(None, _nowhere(plan))
    without = _fastest([row for row in can_be if row.kind != "ranks"])
    ranks = _fastest([row for row in can_be if row.kind == "ranks"])
    best = without or ranks
    assert best is not None
    if without and ranks and ranks.tokens_per_s > LEAST_GAIN * without.tokens_per_s:
        best = ranks
    use = f"use {name_of(best)}: {_rate(best)} tokens/s modelled"
    if not plan.by_slots:
        use += "; the model is dense, so there are no experts to place: more machines are replicas"
        return Verdict(best, use)
    if best is ranks:
        return Verdict(best, f"{use}; {_why_ranks(plan, without, best)}")
    return Verdict(best, f"{use}. {_why_no_ranks(plan, best, ranks)}")


def _why_ranks(plan: Plan, without: Row | None, best: Row) -> str:
    if without is None:
        why = next((row.why_not for row in plan.rows if row.kind != "ranks"), None)
        return "no layout without expert parallelism can be" + (f" ({why})" if why else "")
    ratio = best.tokens_per_s / without.tokens_per_s
    return (
        f"expert parallelism pays here: it is {ratio:.3g} times as fast as {name_of(without)} "
        f"({_rate(without)} tokens/s)"
        + ("" if without.slots is None else ", which does not hold all experts")
    )


def _why_no_ranks(plan: Plan, best: Row, ranks: Row | None) -> str:
    fits = " the model fits in one process;" if best.slots is None else ""
    tried = [row for row in plan.rows if row.kind == "ranks"]
    if ranks is not None:
        gain = ranks.tokens_per_s / best.tokens_per_s
        return (
            f"do not use expert parallelism here:{fits} {name_of(ranks)}, its fastest, gives "
            f"{_rate(ranks)} tokens/s, {gain:.2f} of that"
            + (f" (below {LEAST_GAIN:g} the model does not tell)" if gain > 1 else "")
        )
    if tried:
        return f"do not use expert parallelism here:{fits} {tried[0].why_not}"
    return (
        f"do not use expert parallelism here:{fits or ' there is one process;'} no other number of "
        "ranks was asked for, or there are no cores for it"
    )


def _nowhere(plan: Plan) -> str:
    if plan.missing is None:
        return "does not fit anywhere: " + "; ".join(
            dict.fromkeys(row.why_not for row in plan.rows if row.why_not)
        )
    lacking, row = plan.missing
    if lacking <= 0:
        return f"does not run anywhere: {row.why_not}"
    return (
        f"does not fit anywhere: the nearest is {name_of(row)}, where a machine lacks "
        f"{text_of(lacking)} of memory; use more machines or memory, or a smaller model or dtype"
    )


def _fastest(rows: Sequence[Row]) -> Row | None:
    return max(rows, key=lambda row: row.tokens_per_s, default=None)


def _rate(row: Row) -> str:
    return f"{row.tokens_per_s:,.0f}" if row.tokens_per_s >= 100 else f"{row.tokens_per_s:.3g}"


def name_of(row: Row) -> str:
    """Return a layout in words."""
    if row.kind == "one":
        name = "one process"
    elif row.kind == "replicas":
        name = f"{row.num_processes} replicas"
    else:
        name = f"{row.num_processes} ranks, {row.dispatcher}"
    if row.why_not is not None and row.given_slots is not None:
        return f"{name}, {row.given_slots} slots a layer"
    if row.why_not is not None or (row.kind == "ranks" and row.slots is None):
        return name
    return f"{name}, {'all held' if row.slots is None else f'{row.slots} slots a layer'}"


def command_of(subject: Subject, row: Row) -> str:
    """Return how the layout is run."""
    config, machine = subject.config, subject.machine
    flags = (
        f"generate --model {config.weights.model} --max-model-len {subject.workload.length} "
        f"--max-num-seqs {row.num_seqs}"
    )
    if config.weights.dtype != "auto":
        flags += f" --dtype {config.weights.dtype}"
    if row.given_slots is not None and row.slots is not None:
        flags += f" --expert-cache-slots {row.given_slots}"
    if row.kind != "ranks":
        each = "" if row.kind == "one" else f" (in each of {row.num_processes} processes)"
        return f"moe-serve {flags}{each}"
    flags += f" --dispatcher {row.dispatcher}"
    if machine.num_machines == 1:
        return f"moe-serve {flags} --ep {row.num_processes}"
    num_here = -(-row.num_processes // machine.num_machines)
    num_nodes = -(-row.num_processes // num_here)
    where = "--node-rank RANK --master-addr HOST --master-port 29500"
    return f"torchrun --nnodes {num_nodes} --nproc-per-node {num_here} {where} -m moe_serve {flags}"


def as_json(subject: Subject, plan: Plan) -> dict[str, Any]:
    """Return all figures, as `--json` prints them."""
    verdict, workload = verdict_of(subject, plan), subject.workload
    return {
        "schema": SCHEMA,
        "model": subject.config.weights.model,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "is_dense": not plan.by_slots,
        "machine": {**subject.machine.values(), "sources": dict(subject.machine.sources)},
        "workload": {
            "input_len": workload.input_len,
            "output_len": workload.output_len,
            "num_seqs": workload.num_seqs,
        },
        "routing": "uniform" if subject.trace is None else subject.trace.name,
        "rows": [row.as_json() for row in plan.rows],
        "by_slots": [row.as_json() for row in plan.by_slots],
        "verdict": verdict.sentence,
        "best": None if verdict.best is None else verdict.best.as_json(),
        "command": None if verdict.best is None else command_of(subject, verdict.best),
    }


def text_of_plan(subject: Subject, plan: Plan) -> str:
    """Return constants, tables, what cannot be, and the verdict, for a reader."""
    workload, verdict = subject.workload, verdict_of(subject, plan)
    title = (
        f"layouts of {subject.config.weights.model}, {str(subject.dtype).removeprefix('torch.')}: "
        f"{workload.num_seqs} prompts of {workload.input_len} tokens, {workload.output_len} out; "
        "a step of decoding; bytes and times of one process, tokens/s of all"
    )
    parts = ["\n".join(_constants(subject)), _table(title, plan.rows)]
    if plan.by_slots:
        parts.append(_table("slots against KV, one process", plan.by_slots))
    reasons = dict.fromkeys(
        f"{name_of(row)}: {row.why_not}" for row in (*plan.rows, *plan.by_slots) if row.why_not
    )
    if reasons:
        parts.append("\n".join(["cannot be", *reasons]))
    parts.append(verdict.sentence)
    if verdict.best is not None:
        parts.append(command_of(subject, verdict.best))
    return "\n\n".join(parts)


def notes(subject: Subject, plan: Plan) -> list[str]:
    """Return what a reader of the table must know."""
    found = [
        "times are modelled, not measured: a step is the longer of bytes read over memory's rate "
        "and operations over theirs, then misses over the disk's, then the exchange, then "
        "step_us; nothing else is in it, so that a run is slower"
    ]
    if not plan.by_slots:
        return found
    if subject.trace is None:
        found.append(
            "uniform routing is assumed, the worst case for a cache: --trace takes a recorded one"
        )
    else:
        found.append(
            f"misses of one process and of replicas while decoding are of trace "
            f"{subject.trace.name}, replayed with {subject.config.experts.eviction}; those of "
            "prompts and of ranks are of how often it uses each expert"
        )
    return found


def _constants(subject: Subject) -> list[str]:
    machine = subject.machine
    rows = [
        (name, f"{value:.4g}", QUANTITIES[name].unit, machine.sources[name])
        for name, value in machine.values().items()
    ]
    return table("the machine", ("constant", "value", "unit", "source"), rows).splitlines()


def _table(title: str, rows: Sequence[Row]) -> str:
    can_be = [row for row in rows if row.why_not is None]
    if not can_be:
        return f"{title}: none can be"
    return table(title, ("layout", *_HEAD), ((name_of(row), *_cells(row)) for row in can_be))


def _cells(row: Row) -> tuple[str, ...]:
    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1e3 * seconds:.3g}"

    def mb(num_bytes: float | None) -> str:
        return "-" if num_bytes is None else f"{num_bytes / 1e6:.4g}"

    assert row.weights_bytes is not None
    assert row.kv_bytes is not None
    return (
        f"{row.weights_bytes / GIB:.3g}", "-" if row.slots is None else str(row.slots),
        f"{row.kv_bytes / GIB:.3g}", f"{row.num_running}", mb(row.read_bytes),
        f"{row.missed_experts:.4g}", mb(row.miss_bytes), mb(row.network_bytes), ms(row.memory_s),
        ms(row.compute_s), ms(row.miss_s), ms(row.exchange_s), ms(row.step_s),
        f"{row.prefill_s:.3g}", _rate(row),
    )  # fmt: skip
