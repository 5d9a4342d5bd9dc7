"""The sanitizers' harness: its random calls on the library as it is, and what it refuses."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.sanitize import build, random_calls
from moe_serve.kernels import suite
from moe_serve.kernels.native import loader
from moe_serve.kernels.suite import Kernels
from tests.test_wheel import needs_compiler


@pytest.mark.parametrize("isa", loader.ISAS)
@pytest.mark.parametrize("call", random_calls.CALLS, ids=lambda call: call.__name__)
@pytest.mark.usefixtures("poisoned_empty")
def test_random_shapes_give_finite_results(call: random_calls.Call, isa: str) -> None:
    if loader.built_path() is None:
        pytest.skip("the native library is not built")
    if isa not in loader.supported_isas(loader.open_library()):
        pytest.skip(f"no {isa} here")
    kernels = suite.load("cpu", isa)
    torch.manual_seed(0)
    chance = random.Random(0)
    for _ in range(12):
        random_calls.check(call, kernels, chance)


def test_a_nan_is_found() -> None:
    def call(kernels: Kernels, chance: random.Random) -> Iterable[Tensor]:
        yield torch.zeros(2)
        yield torch.tensor([0.0, float("nan")])

    with pytest.raises(ValueError, match="result 1 not finite"):
        random_calls.check(call, suite.load("reference"), random.Random(0))


def test_an_intrinsic_that_no_sanitizer_sees_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "kernel.h"
    source.write_text("_mm512_mask_storeu_ps(to, lanes, value);")
    build.check_intrinsics([source])
    source.write_text("_mm512_mask_storeu_pd(to, lanes, value);")
    with pytest.raises(ValueError, match=r"kernel\.h uses _mm512_mask_storeu_pd"):
        build.check_intrinsics([source])


@pytest.mark.slow
@needs_compiler
def test_the_sanitizers_report_nothing(repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.sanitize", "--seconds", "30"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no report in 30 s" in done.stdout
