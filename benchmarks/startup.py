"""Time from process start to the end of a short generation, and peak memory, as a user has them.

Hypothesis: with a warm page cache a model is ready about as fast as its bytes can be copied plus
torch's import; memory is the weights once, the KV that was used, and what torch itself takes.

    python -m benchmarks.startup [--model FOLDER] [--save]

Limit of the time: importing torch alone, plus the weights' bytes over the bandwidth of a copy, both
measured in the same run. Limit of the memory: an interpreter that has imported torch, plus weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.results import Row, recorded_command, write_results

ROUNDS = 5
GENERATE = ("-m", "moe_serve", "generate", "--max-tokens", "1", "--json")
PROMPT = {"prompt_token_ids": [1, 2, 3, 4]}  # ids: a model without a tokenizer will do
ONLY_TORCH = (
    "-c",
    "import resource, torch; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)",
)


def timed(arguments: tuple[str, ...]) -> tuple[float, str]:
    """Run Python with these arguments; return seconds and what it printed."""
    start = time.perf_counter()
    done = subprocess.run((sys.executable, *arguments), check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def copy_bandwidth() -> float:
    """Return bytes per second of copying 256 MiB in memory, the best of five."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return source.numel() * source.element_size() / best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo-moe", help="a folder; default: the embedded model")
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text(json.dumps(PROMPT) + "\n")
        measure(arguments, (*GENERATE, "--model", arguments.model, "--prompts", str(prompts)))


def measure(arguments: argparse.Namespace, command: tuple[str, ...]) -> None:
    """Run the command and its limit in turn; print the figures, and keep them where asked to."""
    timed(command)  # the page cache
    seconds, ours, torchs, torch_bytes = [], [], [], []
    metrics: dict[str, float] = {}
    for _ in range(ROUNDS):
        spent, printed = timed(command)
        document = json.loads(printed)
        metrics = document["metrics"]
        seconds.append(spent)
        ours.append(float(metrics["peak_rss_bytes"]))
        spent, printed = timed(ONLY_TORCH)
        torchs.append(spent)
        torch_bytes.append(float(printed))
    floor_s = sorted(torchs)[ROUNDS // 2] + metrics["model_bytes"] / copy_bandwidth()
    floor_bytes = sorted(torch_bytes)[ROUNDS // 2] + metrics["model_bytes"]
    name = Path(arguments.model).resolve().name
    rows = [
        Row.of(f"{name}: process start to first token and exit", seconds, "s", limit=floor_s),
        Row.of(f"{name}: peak memory", ours, "bytes", limit=floor_bytes),
        Row.of(f"{name}: weights", [metrics["model_bytes"]], "bytes"),
    ]
    for row in rows:
        limit = "" if row.limit is None else f"  limit {row.limit:,.2f}"
        print(f"{row.name}: {row.median:,.2f} {row.unit} ({row.min:,.2f} to {row.max:,.2f}){limit}")
    if arguments.save:
        call = recorded_command("benchmarks.startup", sys.argv[1:])
        print(
            write_results(
                f"startup-{name}", rows, command=call, numerics_id=document["numerics_id"]
            )
        )


if __name__ == "__main__":
    main()
