"""Every kernel beside what this machine could give it, and the decode step that they make.

    python -m benchmarks.kernels [--only linear,moe] [--kernels cpu] [--seconds 1] [--save]

Hypothesis: from 1 to 8 rows, linear and moe read their weights at 85 % of the memory's speed or
more; from 256 rows on they multiply at 85 % of oneDNN's bf16 rate or more; a decode step of one
request takes at most 1 / 0.85 of the time to read what it needs, and spends under 10 % of it
outside kernels.

Baseline model (benchmarks/peers/shape.py), bfloat16. A kernel, its limit, torch doing the same and
a call with no rows take turns, 7 rounds; figures are medians, ratios medians of the rounds'
ratios. What a model reads from memory rotates through 200 MB or more. GB/s: of weights, of keys and
values, or of all rows in and out (a copied byte counts twice, as in the limit). "no call" is the
ratio with an empty call's time taken off: in a fused pass the kernels follow one another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

from benchmarks.kernels import attention, products, report, rows, sampling
from benchmarks.kernels.limits import Limits, square_product
from benchmarks.kernels.step import StepBench, StepFigure
from benchmarks.kernels.timing import Figure, Unit, Work, interleaved, measure
from benchmarks.kernels.workload import WORKLOADS, Workload
from benchmarks.results import Row, recorded_command, write_results
from moe_serve.config import RuntimeConfig
from moe_serve.errors import ConfigError
from moe_serve.kernels import suite
from moe_serve.kernels.native import loader
from moe_serve.kernels.suite import Kernels

TABLES: dict[str, rows.Cases] = {
    "linear": products.linear,
    "moe": products.moe,
    "combine": rows.combine,
    "rms_norm": rows.rms_norm,
    "rope": rows.rope,
    "router": rows.router,
    "silu": rows.silu,
    "attention": attention.attention,
    "sampling": sampling.sampling,
}
STEP = "step"


def machine_rows(limits: Limits, matrix_size: int, seconds: float) -> list[Row]:
    """Measure what the machine can do before anything else runs."""
    size = f"{matrix_size} cubed"
    works: list[tuple[str, Work, Unit]] = [
        (f"read ({limits.measured_by})", limits.read, "GB/s"),
        (f"copy ({limits.measured_by}), bytes in and out", limits.copy, "GB/s"),
        (f"torch.mm bfloat16, {size}", square_product(matrix_size, torch.bfloat16), "GFLOP/s"),
        (f"torch.mm float32, {size}", square_product(matrix_size, torch.float32), "GFLOP/s"),
    ]
    samples = interleaved([work.run for _, work, _ in works], seconds)
    return [
        Row.of(f"machine: {name}", [work.amount(unit) / s for s in taken], unit)
        for (name, work, unit), taken in zip(works, samples, strict=True)
    ]


def kernel_figures(
    tables: Sequence[str], kernels: Kernels, workload: Workload, limits: Limits, seconds: float
) -> Iterator[Figure]:
    """Measure the cases of tables and print each as it comes."""
    for table in tables:
        print(report.table_header(table), flush=True)
        for case in TABLES[table](kernels, workload, limits):
            figure = measure(case, seconds)
            print(report.table_line(figure), flush=True)
            yield figure


def step_figures(
    workload: Workload, limits: Limits, options: dict[str, object], seconds: float
) -> Iterator[StepFigure]:
    """Measure decode steps of every number of requests and print each as it comes."""
    print("\nstep", flush=True)
    bench = StepBench(workload, options)
    for num_requests in workload.step_requests:
        figure = bench.measure(num_requests, limits, seconds)
        print(report.step_line(figure), flush=True)
        yield figure


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what cannot be ends the program with status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = (*TABLES, STEP)
    default = RuntimeConfig()
    parser.add_argument("--only", default=",".join(known), help=f"some of: {', '.join(known)}")
    parser.add_argument("--kernels", choices=suite.KERNELS, default=default.kernels)
    parser.add_argument("--isa", choices=("auto", *loader.ISAS), default=default.isa)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of measuring, for each line (%(default)s)"
    )
    parser.add_argument("--workload", choices=tuple(WORKLOADS), default="baseline")
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args(argv)
    arguments.only = arguments.only.split(",")
    for table in arguments.only:
        if table not in known:
            parser.error(f"no table {table!r}; there are: {', '.join(known)}")
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads is {arguments.threads}; it must be at least 1")
    if not arguments.seconds > 0:
        parser.error(f"--seconds is {arguments.seconds}; it must be above 0")
    return arguments


def run(arguments: argparse.Namespace) -> tuple[list[Row], str]:
    """Measure and print; return the rows and the kernels' numerics_id. Raises ConfigError."""
    workload, seconds = WORKLOADS[arguments.workload], arguments.seconds
    kernels = suite.load(arguments.kernels, arguments.isa)
    try:
        native = loader.load()
    except loader.NotBuilt:
        native = None  # torch measures the limits
    limits = Limits(native, workload.cold_bytes)
    print(f"{kernels.numerics_id} ({kernels.reason}), {torch.get_num_threads()} threads")
    figures, steps = [], []
    found = machine_rows(limits, workload.matrix_size, 2 * seconds)
    for row in found:
        print(f"{row.name:<45} {row.value:8.1f} {row.unit}")
    with torch.inference_mode():
        tables = [table for table in arguments.only if table != STEP]
        for figure in kernel_figures(tables, kernels, workload, limits, seconds):
            figures.append(figure)
            found += report.kernel_rows(figure)
    if STEP in arguments.only:
        options = {"kernels": arguments.kernels, "isa": arguments.isa}
        for step in step_figures(workload, limits, options, 3 * seconds):
            steps.append(step)
            found += report.step_rows(step)
    print()
    for line in report.goal_lines(figures, steps):
        print(line)
    return found, f"{kernels.numerics_id}-bfloat16"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the status is 2 for kernels that are not to be had here."""
    arguments = parse_arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    try:
        found, numerics_id = run(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if arguments.save:
        words = sys.argv[1:] if argv is None else argv
        command = recorded_command("benchmarks.kernels", words)
        print(
            f"written: {write_results('kernels', found, command=command, numerics_id=numerics_id)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
