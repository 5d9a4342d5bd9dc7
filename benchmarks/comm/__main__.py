"""A mixture-of-experts layer over ranks: each dispatcher's time, collectives and bytes.

Hypothesis: few tokens are a matter of how many collectives there are, many of how many bytes; auto
takes at most .45 of per_expert's time at one token a rank. 4 gloo processes on this machine:
latency and counts, not bandwidth. Experts run on the real kernels; results are compared in all
bits.

    python -m benchmarks.comm [--ranks 4] [--tokens 1,8,64,512] [--rounds 9] [--save]

Limits: bytes that each layout must send a token (uniform routing, exact expectation); for times
there is none but per_expert, which the ratios are to.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.comm.shape import COLLECTIVES, NAMES, Shape
from benchmarks.results import Row, recorded_command, write_results

ROOT = Path(__file__).resolve().parent.parent.parent


def least_bytes(name: str, shape: Shape, ranks: int) -> float | None:
    """Return the bytes that a token must send to other ranks and get back, or None.

    Uniform routing, experts spread evenly: every choice is elsewhere with (ranks - 1) / ranks; a
    rank is visited unless all choices are among the experts of the others (hypergeometric).
    """
    row = shape.hidden_size * 2
    away = (ranks - 1) / ranks
    pairs = shape.top_k * away
    here = shape.num_experts // ranks
    missed = math.comb(shape.num_experts - here, shape.top_k) / math.comb(
        shape.num_experts, shape.top_k
    )
    visited = (ranks - 1) * (1 - missed)
    names = 2 * shape.top_k  # the slots that travel with a row
    return {
        "per_expert": 2 * pairs * row,
        "dedup": visited * (row + names) + pairs * row,
        "all_gather": (ranks - 1) * (row + names) + pairs * row,
    }.get(name)


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
        f"{'tokens':>6} {'dispatcher':>12} {'ms':>8} {'p25':>8} {'ratio':>6} {'calls':>6} "
        f"{'kB/token':>9} {'least':>8}"
    )
    for tokens in map(int, arguments.tokens.split(",")):
        found = run_ranks(arguments.ranks, tokens, arguments.rounds)
        for name in NAMES:
            # of a round the slowest rank, as the others wait for it
            times_ms = [
                max(parts) for parts in zip(*(one[name]["ms"] for one in found), strict=True)
            ]
            base_ms = [
                max(parts)
                for parts in zip(*(one["per_expert"]["ms"] for one in found), strict=True)
            ]
            ratios = [mine / other for mine, other in zip(times_ms, base_ms, strict=True)]
            calls = found[0][name]["collectives"]
            sent = statistics.mean(one[name]["bytes"] for one in found)
            least = least_bytes(name, shape, arguments.ranks)
            case = f"{arguments.ranks} ranks, {tokens} tokens a rank, {name}"
            row = Row.of(f"{case}: a layer", times_ms, "ms", ratio=statistics.median(ratios))
            rows += [
                row,
                Row.of(f"{case}: sent", [sent], "bytes/token", limit=least),
                Row.of(f"{case}: collectives", [calls], "calls/layer", limit=COLLECTIVES.get(name)),
            ]
            shown = "-" if least is None else f"{least / 1e3:.2f}"
            quarter = sorted(times_ms)[len(times_ms) // 4]
            print(
                f"{tokens:>6} {name:>12} {row.median:>8.2f} {quarter:>8.2f} {row.ratio:>6.2f} "
                f"{calls:>6g} {sent / 1e3:>9.2f} {shown:>8}"
                + (f"  ({found[0][name]['chosen']})" if name == "auto" else "")
            )
    if arguments.save:
        command = recorded_command("benchmarks.comm", sys.argv[1:])
        print(write_results("comm", rows, command=command))


if __name__ == "__main__":
    main()
