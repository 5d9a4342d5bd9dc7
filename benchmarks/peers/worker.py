"""One system in its own process, kept warm: a line of JSON in is a job, a line out is its time.

Started by `benchmarks.peers.driver`. Lines out: {"ready": version, "numerics_id", "load_s"}, then
for each job {"seconds", "token_ids"}; {"missing": why} when the system is not installed;
{"error": why}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from benchmarks.peers.jobs import Job
from moe_serve import plugin

SYSTEMS = "benchmarks.peers.systems"


def serve(system: str, model: Path, vocab_size: int, threads: int | None, replies: IO[str]) -> None:
    """Load `system`, then answer every line of standard input until it closes."""

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    start = time.perf_counter()
    try:
        runner = plugin.load(SYSTEMS, system).build(model, threads)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("benchmarks", "moe_serve"):
            raise  # ours is here, so it is broken
        reply(missing=str(error))
        return
    load_s = time.perf_counter() - start
    reply(ready=runner.version, numerics_id=runner.numerics_id, load_s=load_s)
    for line in sys.stdin:
        message = json.loads(line)
        job = Job.parse(message["job"])
        prompts = job.prompts(vocab_size, message["round"])
        start = time.perf_counter()
        outputs = runner.generate(prompts, job.output_tokens)
        seconds = time.perf_counter() - start
        num_tokens = [len(token_ids) for token_ids in outputs]
        if num_tokens != [job.output_tokens] * job.num_requests:
            reply(error=f"{system} gave {num_tokens} tokens for {job}")
            return
        reply(seconds=seconds, token_ids=outputs)


def main() -> None:
    """Keep standard output for replies: what libraries print there goes to standard error."""
    system, model, vocab_size, threads = sys.argv[1:]
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        serve(system, Path(model), int(vocab_size), int(threads) or None, replies)


if __name__ == "__main__":
    main()
