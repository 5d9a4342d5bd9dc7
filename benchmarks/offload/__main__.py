"""Decoding with experts that do not all fit, beside what no cache and no disk could better.

    python -m benchmarks.offload --replay-routing FILE.npz [--tier disk,link] [--emulate-link 4,12]
        [--resident 12,25,50,75,100] [--batch 1,8] [--policies ...] [--predictors ...] [--save]

Hypothesis: at batch 1 and 8 a token takes at most 1.3 of max(compute, Belady's bytes / the tier's
bandwidth); with all experts resident the cache costs under 2 %; behind 4 GB/s at 25 % resident,
prefetching takes a fifth of the stall away, in under 20 us a layer.

The model is a dummy of the trace's layers, experts and top-k, hidden 1024, intermediate 384, bf16,
whose routers are overruled: each token goes where the trace's went (that is the replay, named in
every result). The trace's sequences are decoded first come first served. A case, and what differs
from the first of each list in one thing, take turns with the same model all in memory, a few steps
each on the same tokens, after a warm start; compute is what that one takes. Disk: direct reads of
random records, measured in every round. Link: host memory behind a throttled copy, in place of
PCIe; its "host" computes as fast as its "device", so that --miss split gains more than it would.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.offload import figures
from benchmarks.offload.figures import Figure
from benchmarks.offload.limits import TraceLimits
from benchmarks.offload.plan import Choices, Plan, measure
from benchmarks.offload.subject import Subject, shape_of, write_model
from benchmarks.results import Row, recorded_command, write_results
from moe_serve import plugin
from moe_serve.config import EngineConfig
from moe_serve.errors import MoeServeError
from moe_serve.experts.trace import read_trace

THREADS = 2

_Number = TypeVar("_Number", int, float)


def run(plan: Plan, choices: Choices, batches: Sequence[int]) -> tuple[list[Row], str]:
    """Measure and print; return the rows, and the engine's numerics_id."""
    found: list[Row] = []
    numerics_id = ""
    trace = plan.limits.trace
    for batch in batches:
        resident = Subject(trace, write_model(plan.shape, plan.cache), batch)
        numerics_id = resident.engine.numerics_id
        print(
            f"\nbatch {batch}, {resident.engine.stats().model_bytes / 1e9:.2f} GB, {numerics_id}, "
            f"{torch.get_num_threads()} threads, routing {trace.name}, "
            f"{plan.rounds} rounds of {plan.steps} steps after {plan.warm}"
        )
        print(figures.HEADER, flush=True)
        for base in choices.bases(batch):
            first: Figure | None = None
            for figure in measure(plan, choices.variants(base), resident):
                print(figures.line(figure), flush=True)
                found += figures.rows_of(figure)
                if first is not None:
                    found += figures.comparison(figure, first)
                first = first or figure
        del resident
        gc.collect()
    return found, numerics_id


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what cannot be ends the program with status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    policies = plugin.names("moe_serve.experts.policies")
    predictors = plugin.names("moe_serve.predictors")

    parser.add_argument(
        "--replay-routing", type=Path, required=True, metavar="TRACE", help="an .npz file"
    )
    default = EngineConfig().experts
    parser.add_argument("--batch", type=_numbers(int, 1, 4096), default=[1, 8])
    parser.add_argument("--resident", type=_numbers(float, 0.1, 100), default=[12, 25, 50, 75, 100])
    parser.add_argument("--tier", type=_names(("disk", "link")), default=["disk", "link"])
    parser.add_argument(
        "--emulate-link",
        type=_numbers(float, 0.01, 1000),
        default=[4.0],
        help="GB/s, comma-separated",
    )
    parser.add_argument("--policies", type=_names(policies), default=[default.eviction])
    parser.add_argument("--predictors", type=_names(predictors), default=[default.predictor])
    parser.add_argument(
        "--prefetch", type=_names(("auto", "on", "off")), default=["auto", "on", "off"]
    )
    parser.add_argument("--miss", type=_names(("copy", "split", "auto")), default=["copy"])
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=384, help="of an expert")
    parser.add_argument(
        "--warm", type=int, default=128, help="steps before the clock (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=16, help="of a turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (%(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for packed experts; default: temporary")
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args(argv)
    for name, least in (("warm", 0), ("steps", 1), ("rounds", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least {least}")
    return arguments


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return what reads a list of names, all of them known."""

    def split(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"there is no {name!r}; there are: {', '.join(known)}"
                )
        return text.split(",")

    return split


def _numbers(kind: type[_Number], least: float, most: float) -> Callable[[str], list[_Number]]:
    """Return what reads a list of numbers, all of them between two."""

    def split(text: str) -> list[_Number]:
        try:
            found = [kind(part) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from error
        if not all(least <= number <= most for number in found):
            raise argparse.ArgumentTypeError(f"{text!r}: each must be from {least:g} to {most:g}")
        return found

    return split


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the status is that of the error where it cannot be run."""
    arguments = parse_arguments(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            trace = read_trace(arguments.replay_routing)
            plan = Plan(
                limits=TraceLimits(trace),
                shape=shape_of(trace, arguments.hidden_size, arguments.intermediate_size),
                cache=arguments.cache or Path(scratch),
                warm=arguments.warm,
                steps=arguments.steps,
                rounds=arguments.rounds,
            )
            plan.check(arguments.batch)
            choices = Choices(
                tiers=arguments.tier,
                links=arguments.emulate_link,
                resident=arguments.resident,
                policies=arguments.policies,
                predictors=arguments.predictors,
                prefetch=arguments.prefetch,
                miss=arguments.miss,
            )
            found, numerics_id = run(plan, choices, arguments.batch)
    except MoeServeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        torch.set_num_threads(threads)
    if arguments.save:
        command = recorded_command("benchmarks.offload", sys.argv[1:] if argv is None else argv)
        path = write_results(
            f"offload-{'-'.join(arguments.tier)}-{trace.name}",
            found,
            command=command,
            numerics_id=numerics_id,
        )
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
