"""Do the systems compute the same model? What greedy decoding gives, beside this project's.

With random weights two logits are often nearer to each other than bf16 is exact, so a sequence
parts sooner or later, and nothing can be learnt from what comes after. A system with a wrong
weight, norm or rotation parts at the first token, in every sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers.driver import Worker
from benchmarks.peers.jobs import Job

CHECK = Job(num_requests=8, prompt_tokens=16, output_tokens=8)


def num_leading_equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return how many tokens are the same before the first that is not."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(ours))


def leading_agreement(workers: Sequence[Worker], reference: str) -> dict[str, list[int]]:
    """Run `CHECK` on all workers; return, for each but `reference`, the leading equal tokens.

    One count per request. Empty when the reference is not among the workers.
    """
    outputs = {worker.system: worker.run(CHECK, 0).token_ids for worker in workers}
    expected = outputs.pop(reference, None)
    if expected is None:
        return {}
    return {
        system: [num_leading_equal(*pair) for pair in zip(expected, token_ids, strict=True)]
        for system, token_ids in outputs.items()
    }
