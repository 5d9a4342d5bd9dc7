"""Tokens and logprobs are the same bits whatever a request was batched with and cut into.

A short form of `python -m benchmarks.exactness`, which has the whole matrix.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import exactness
from benchmarks.results import Row
from tests.kernels.implementations import FOR_MODELS, NATIVE, kernels

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
NUM_RANDOM = 3
SEED = 808  # combinations that preempt, that find prefixes, fused and not
# what the other implementations are asked: the rest of the matrix is no matter of kernels
SHORT = ("batch of 1", "chunk of 7", "3 threads", "layer by layer")


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
    cases = list(exactness.random_cases(NUM_RANDOM, SEED))
    assert {case.options["fused"] for case in cases} == {False, True}
    combined = [run(case) for case in cases]
    assert sum(outcome.num_preemptions for outcome in combined) > 0
    assert sum(outcome.prefix_hit_tokens for outcome in combined) > 0


def test_too_few_forced_preemptions_are_seen() -> None:
    names = [f"{model}, {exactness.PREEMPTION.name}: preemptions" for model in "ab"]
    rows = [Row.of(name, [count], "count") for name, count in zip(names, (70, 3), strict=True)]
    other = Row.of("a, random 1: preemptions", [1], "count")
    assert exactness.fewest_forced([*rows, other]) == 3
    assert exactness.fewest_forced([other]) == 0


@DTYPES
def test_embedded_model_with_real_prompts(shared_data: Path, dtype: str) -> None:
    texts = exactness.read_prompts(shared_data / "prompts", 10)
    _check(exactness.embedded_subject(exactness.Numerics(dtype), texts, max_tokens=6))


@DTYPES
def test_wide_dummy(tmp_path: Path, dtype: str) -> None:
    numerics = exactness.Numerics(dtype)
    _check(exactness.wide_subject(numerics, tmp_path, num_prompts=6, max_tokens=5))


# one case of each kind; all of them are in `python -m benchmarks.exactness --experts`
HELD = ("0 % held", "batch of 1, 25 % held", "eviction learned", "split", "live resize")


@DTYPES
def test_experts_that_do_not_fit_a_wide_dummy(tmp_path: Path, dtype: str) -> None:
    subject = exactness.wide_subject(exactness.Numerics(dtype), tmp_path, 3, 5)
    base = subject.run(exactness.BASE)
    cases = [case for case in exactness.expert_cases(can_fuse=True) if case.name in HELD]
    assert len(cases) == len(HELD)
    for case in (*cases, *exactness.random_expert_cases(1, SEED)):
        outcome = subject.run(replace(case, num_resident=None))
        assert exactness.differing(outcome, base) == [], case
        assert outcome.experts["total"]["misses"] > 0


# the best one, which the tests above run, is the first native one
@pytest.mark.parametrize("name", [n for n in FOR_MODELS if n not in NATIVE[:1]])
@DTYPES
def test_other_kernels(tmp_path: Path, name: str, dtype: str) -> None:
    chosen = kernels(name)
    numerics = exactness.Numerics(dtype, chosen.name, chosen.isa or "auto")
    subject = exactness.wide_subject(numerics, tmp_path, 2, 3).for_preemption(max_tokens=3)
    base = subject.run(replace(exactness.BASE, threads=1))
    assert subject.numerics_id.startswith(chosen.numerics_id)
    cases = [case for case in numerics.factors if case.name in SHORT]
    assert len(cases) == len(SHORT) - (not numerics.can_fuse)
    for case in cases:
        threads = 3 if case.threads == 3 else 1
        assert exactness.differing(subject.run(replace(case, threads=threads)), base) == [], case


def test_a_wrong_bit_would_be_seen(tmp_path: Path) -> None:
    one, other = (
        exactness.wide_subject(exactness.Numerics(dtype), tmp_path, num_prompts=2, max_tokens=4)
        for dtype in ("float32", "bfloat16")
    )
    base = one.run(exactness.BASE)
    assert exactness.differing(other.run(exactness.BASE), base) == [0, 1, 2, 3]
