"""Run a batch in child processes, killing them at random moments, until one gets to its end.

    python -m tests.batch_killer IN KILLED WHOLE KILLS ENGINE

ENGINE is "fake", or "real" for the embedded model. Imports happen once, before the children are
forked, so that a child spends its time on the batch. Prints how many answers each kill left in
KILLED; then another child answers IN in WHOLE, undisturbed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from moe_serve.batch import run_batch
from moe_serve.config import EngineConfig
from moe_serve.llm import LLM
from moe_serve.models.hf_config import GenerationDefaults
from moe_serve.text.tokenizer import load_tokenizer
from tests.fake_engine import FakeEngine

EMBEDDED = Path(__file__).resolve().parents[1] / "moe_serve" / "assets" / "demo-moe"


def build(engine: str) -> LLM:
    options: dict[str, Any] = {"max_num_seqs": 4, "num_kv_blocks": 128}
    if engine == "real":
        return LLM(threads=1, **options)
    fake = FakeEngine(EngineConfig.from_options(options), step_s=0.002)
    return LLM.from_parts(fake, load_tokenizer(EMBEDDED), GenerationDefaults(temperature=1.0))


def fork(source: Path, target: Path, engine: str) -> int:
    """Start a child that runs the batch; return its process id."""
    child = os.fork()
    if child == 0:
        try:
            run_batch(build(engine), source, target)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return child


def kill_after(child: int, target: Path, num_answers: int, delay_s: float) -> bool:
    """Kill a child a moment after it has written so many answers; False if it ended before."""
    while count_lines(target) < num_answers:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def wait(child: int) -> None:
    """Wait for a child that must succeed."""
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(1)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(source: Path, killed: Path, whole: Path, num_kills: int, engine: str) -> None:
    noise = random.Random(0)
    stride = count_lines(source) // (2 * num_kills)
    left: list[int] = []
    for _ in range(num_kills):
        num_answers = count_lines(killed) + noise.randint(0, stride)
        if kill_after(fork(source, killed, engine), killed, num_answers, noise.uniform(0, 0.02)):
            left.append(count_lines(killed))
    wait(fork(source, killed, engine))
    wait(fork(source, whole, engine))
    print(*left)


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:4]]
    main(paths[0], paths[1], paths[2], int(sys.argv[4]), sys.argv[5])
