"""Tokens and logprobs are the same bits whatever a request was batched with and cut into.

A short form of `python -m benchmarks.exactness`, which has the whole matrix.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import exactness
from benchmarks.results import Row

DTYPES = ("float32", "bfloat16")
NUM_RANDOM = 3
SEED = 8  # combinations that preempt and that find prefixes


def _check(subject: exactness.Subject) -> None:
    base = subject.run(exactness.BASE)
    assert all(outcome[1] == "length" for outcome in base.outputs)
    growing = subject.for_preemption(max_tokens=40)
    growing_base = growing.run(exactness.BASE)

    def run(case: exactness.Case) -> exactness.Outcome:
        grows = case.num_resident is not None
        outcome = (growing if grows else subject).run(case)
        assert exactness.differing(outcome, growing_base if grows else base) == [], case
        return outcome

    # what a case is named for took place
    outcomes = {case.name: run(case) for case in exactness.FACTORS}
    assert outcomes["prefix cache"].prefix_hit_tokens > 0
    assert run(exactness.PREEMPTION).num_preemptions > 0
    combined = [run(case) for case in exactness.random_cases(NUM_RANDOM, SEED)]
    assert sum(outcome.num_preemptions for outcome in combined) > 0
    assert sum(outcome.prefix_hit_tokens for outcome in combined) > 0


def test_too_few_forced_preemptions_are_seen() -> None:
    names = [f"{model}, {exactness.PREEMPTION.name}: preemptions" for model in "ab"]
    rows = [Row.of(name, [count], "count") for name, count in zip(names, (70, 3), strict=True)]
    other = Row.of("a, random 1: preemptions", [1], "count")
    assert exactness.fewest_forced([*rows, other]) == 3
    assert exactness.fewest_forced([other]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedded_model_with_real_prompts(shared_data: Path, dtype: str) -> None:
    texts = exactness.read_prompts(shared_data / "prompts", 10)
    _check(exactness.embedded_subject(dtype, texts, max_tokens=6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_dummy(tmp_path: Path, dtype: str) -> None:
    _check(exactness.wide_subject(dtype, tmp_path, num_prompts=6, max_tokens=5))


def test_a_wrong_bit_would_be_seen(tmp_path: Path) -> None:
    subject = exactness.wide_subject("float32", tmp_path, num_prompts=2, max_tokens=4)
    base = subject.run(exactness.BASE)
    other = exactness.wide_subject("bfloat16", tmp_path, num_prompts=2, max_tokens=4)
    assert exactness.differing(other.run(exactness.BASE), base) == [0, 1, 2, 3]
