"""A mixture-of-experts layer over ranks: each dispatcher's time, collectives and bytes.

Hypothesis: few tokens are a matter of how many collectives there are, many of how many bytes; auto
takes at most .45 of per_expert's time at one token a rank. 4 gloo processes on this machine:
latency and counts, not bandwidth. Experts run on the real kernels; results are compared in all
bits.

    python -m benchmarks.comm [--ranks 4] [--tokens 1,8,64,512] [--rounds 9] [--save]

Limits: of bytes, what each layout must send for the routing used ("needed", and "/need" the ratio
to it) and on average for uniform routing ("mean"); of time, two exchanges of as many bytes as auto
sends, with nothing between them ("bare"; "/bare" is the ratio to them).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.comm.bounds import expected_bytes
from benchmarks.comm.shape import BARE, COLLECTIVES, NAMES, Shape
from benchmarks.results import Row, recorded_command, write_results

ROOT = Path(__file__).resolve().parent.parent.parent


def run_ranks(ranks: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Run benchmarks.comm.worker on every rank; return what each printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "STORE_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.comm.worker", str(tokens), str(rounds)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed; what it said is above")
    return [json.loads(text) for text in printed]


def slowest_ms(found: list[dict[str, Any]], name: str) -> list[float]:
    """Return each round's time of the slowest rank, as the others wait for it."""
    return [max(parts) for parts in zip(*(one[name]["ms"] for one in found), strict=True)]


def median_ratio(found: list[dict[str, Any]], name: str, other: str) -> float:
    """Return the median over rounds of one's time by another's."""
    pairs = zip(slowest_ms(found, name), slowest_ms(found, other), strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def mean_of(found: list[dict[str, Any]], name: str, what: str) -> float | None:
    """Return a figure's mean over ranks, or None where it has none."""
    figures = [one[name][what] for one in found]
    return None if None in figures else statistics.mean(figures)


def rows_of(case: str, name: str, found: list[dict[str, Any]]) -> list[Row]:
    """Return the rows to keep of one dispatcher."""
    times_ms, bare_ms = slowest_ms(found, name), statistics.median(slowest_ms(found, BARE))
    sent, needed = (mean_of(found, name, what) for what in ("bytes", "needed"))
    assert sent is not None
    return [
        Row.of(
            f"{case}, {name}: a layer",
            times_ms,
            "ms",
            limit=bare_ms,
            ratio=median_ratio(found, name, "per_expert"),
        ),
        Row.of(f"{case}, {name}: sent", [sent], "bytes/token", limit=needed),
        Row.of(
            f"{case}, {name}: collectives",
            [found[0][name]["collectives"]],
            "calls/layer",
            limit=COLLECTIVES.get(name),
        ),
    ]


def line_of(name: str, found: list[dict[str, Any]], shape: Shape) -> str:
    """Return what is printed of one dispatcher."""
    times_ms, first = sorted(slowest_ms(found, name)), found[0][name]
    sent, needed = (mean_of(found, name, what) for what in ("bytes", "needed"))
    assert sent is not None
    mean = expected_bytes(first["chosen"], shape, len(found))
    line = (
        f"{name:>12} {statistics.median(times_ms):>8.2f} {times_ms[len(times_ms) // 4]:>8.2f} "
        f"{median_ratio(found, name, 'per_expert'):>6.2f} {median_ratio(found, name, BARE):>6.2f} "
        f"{first['collectives']:>6g} {sent / 1e3:>9.2f}"
    )
    line += f" {needed / 1e3:>8.2f} {sent / needed:>6.3f}" if needed else f" {'-':>8} {'-':>6}"
    line += f" {'-':>8}" if mean is None else f" {mean / 1e3:>8.2f}"
    return line + (f"  ({first['chosen']})" if name == "auto" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", default="1,8,64,512", help="tokens a rank")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    shape, rows = Shape(), []
    print(f"{shape}, {arguments.ranks} ranks, gloo, one thread a rank")
    print(
        f"{'tokens':>6} {'dispatcher':>12} {'ms':>8} {'p25':>8} {'ratio':>6} {'/bare':>6} "
        f"{'calls':>6} {'kB/token':>9} {'needed':>8} {'/need':>6} {'mean':>8}"
    )
    for tokens in map(int, arguments.tokens.split(",")):
        found = run_ranks(arguments.ranks, tokens, arguments.rounds)
        for name in (*NAMES, BARE):
            rows += rows_of(f"{arguments.ranks} ranks, {tokens} tokens a rank", name, found)
            print(f"{tokens:>6} {line_of(name, found, shape)}")
    print("not measured: several GPUs (NCCL): no GPU kernels run the experts yet")
    if arguments.save:
        command = recorded_command("benchmarks.comm", sys.argv[1:])
        print(write_results("comm", rows, command=command))


if __name__ == "__main__":
    main()
