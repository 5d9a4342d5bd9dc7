"""The same work on this project and on others, in turn, as ratios.

    python -m benchmarks.peers [--systems moe_serve,vllm] [--jobs 1x128/64,...] [--save]

Hypothesis: on its native kernels this project is faster than vLLM's CPU build, llama.cpp and
transformers, at one request and at many, decoding and reading prompts. Greedy, bf16, end of text
ignored; every round has new prompts. Figures of one run are to be compared with each other, not
with another day's.

Before the figures a line per peer says whether it computes the same model: with random weights
greedy outputs part sooner or later, but not at once. A peer that is not installed is left out;
`benchmarks.peers.install` makes environments for those that need one, in the same --cache. --save
also keeps the figures in benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.agreement import CHECK, leading_agreement
from benchmarks.peers.driver import Measurement, NotInstalled, Worker, measure
from benchmarks.peers.environments import interpreter
from benchmarks.peers.jobs import Job
from benchmarks.peers.limit import MachineSpeed, least_seconds, measure_speed
from benchmarks.peers.shape import SHAPES, Shape, cache_folder, checkpoint
from benchmarks.peers.worker import SYSTEMS
from benchmarks.results import Row, recorded_command, write_results
from moe_serve import plugin

OURS = "moe_serve"


def rows_of(measurements: Sequence[Measurement], shape: Shape, speed: MachineSpeed) -> list[Row]:
    """Return two rows per job and system: output and total tokens per second.

    A peer's ratio is ours over the peer's: the median of the rounds' ratios, above 1 where we lead.
    """
    ours = {m.job: m for m in measurements if m.system == OURS}
    rows = []
    for m in measurements:
        mine = ours.get(m.job)
        ratio = None
        if mine is not None and m.system != OURS:
            pairs = zip(m.seconds, mine.seconds, strict=True)
            ratio = statistics.median(theirs / own for theirs, own in pairs)
        least_s = least_seconds(shape, m.job, speed)
        tokens_out = m.job.num_requests * m.job.output_tokens
        tokens_all = tokens_out + m.job.num_requests * m.job.prompt_tokens
        for kind, rates, tokens in (
            ("output", m.output_rates, tokens_out),
            ("total", m.total_rates, tokens_all),
        ):
            limit = tokens / least_s
            rows.append(
                Row.of(f"{m.job} {m.system}", rates, f"{kind} tok/s", limit=limit, ratio=ratio)
            )
    return rows


def print_table(rows: Sequence[Row]) -> None:
    """Print one line per row; the ratio stands on the peers' lines."""
    header = ("job", "system", "unit", "median", "min", "max", "limit", "ours / peer")
    print("{:<12} {:<14} {:<13} {:>8} {:>8} {:>8} {:>8} {:>12}".format(*header))
    for row in rows:
        job, system = row.name.split()
        figures = (f"{value:8.1f}" for value in (row.median, row.min, row.max, row.limit or 0.0))
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
        print(f"{job:<12} {system:<14} {row.unit:<13} {' '.join(figures)} {ratio:>12}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a job or a system that cannot be ends the program with status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = plugin.names(SYSTEMS)
    parser.add_argument("--systems", default=",".join(known), help=f"some of: {', '.join(known)}")
    parser.add_argument(
        "--jobs", default="1x128/64,16x128/64,64x128/64,16x512/16", help="REQUESTSxIN/OUT,..."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="baseline")
    parser.add_argument("--threads", type=int, help="CPU threads; default: each system's choice")
    parser.add_argument(
        "--cache", type=Path, help="where the checkpoint and the environments of peers are kept"
    )
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args(argv)
    try:
        arguments.jobs = [Job.parse(text) for text in arguments.jobs.split(",")]
    except ValueError as error:
        parser.error(str(error))
    arguments.systems = arguments.systems.split(",")
    for system in arguments.systems:
        if system not in known:
            parser.error(f"no system {system!r}; there are: {', '.join(known)}")
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; it must be at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; the status is 1 when no system could be measured."""
    arguments = parse_arguments(argv)
    shape = SHAPES[arguments.shape]
    cache = arguments.cache or cache_folder()
    model = checkpoint(shape, cache)
    speed = measure_speed()
    print(
        f"machine: reads {speed.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"bf16 product {speed.flop_per_s / 1e9:.0f} GFLOP/s (torch, this run)"
    )
    with contextlib.ExitStack() as stack:
        workers = []
        for system in arguments.systems:
            worker = Worker(
                system, interpreter(system, cache), model, shape.vocab_size, arguments.threads
            )
            try:
                stack.enter_context(worker)
            except NotInstalled as error:
                print(f"{system}: left out, not installed ({error})")
                continue
            print(f"{system}: {worker.version}, loaded in {worker.load_s:.1f} s")
            workers.append(worker)
        if not workers:
            return 1
        numerics_id = next((w.numerics_id for w in workers if w.system == OURS), None)
        for system, counts in leading_agreement(workers, OURS).items():
            print(
                f"{system}: {sum(map(bool, counts))} of {CHECK.num_requests} greedy outputs begin "
                f"as ours; {statistics.mean(counts):.1f} of {CHECK.output_tokens} tokens are equal "
                "before the first that is not (mean)"
            )
        rows = rows_of(measure(workers, arguments.jobs, arguments.rounds), shape, speed)
    print_table(rows)
    if arguments.save:
        words = sys.argv[1:] if argv is None else argv
        command = recorded_command("benchmarks.peers", words)
        path = write_results("peers", rows, command=command, numerics_id=numerics_id)
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
