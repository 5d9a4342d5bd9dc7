"""Tokens and logprobs are the same bits whatever a request was batched with and cut into.

A short form of `python -m benchmarks.exactness`, which has the whole matrix.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import exactness

DTYPES = ("float32", "bfloat16")
NUM_RANDOM = 3


def _check(subject: exactness.Subject) -> None:
    base = subject.run(exactness.BASE)
    assert all(outcome[1] == "length" for outcome in base.outputs)
    for case in (*exactness.FACTORS, *exactness.random_cases(NUM_RANDOM, seed=7)):
        outcome = subject.run(case)
        assert exactness.differing(outcome, base) == [], case
        # what the case is named for took place
        if case.name == "prefix cache":
            assert outcome.prefix_hit_tokens > 0
    growing = subject.for_preemption()
    outcome = growing.run(exactness.PREEMPTION)
    assert outcome.num_preemptions > 0
    assert exactness.differing(outcome, growing.run(exactness.BASE)) == []


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
