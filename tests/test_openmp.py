"""How waiting threads wait is settled before torch is there, and only where nobody else did."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("first", "environment", "expected"),
    [
        ("import moe_serve; moe_serve.SamplingParams", {}, "2000"),
        ("import moe_serve", {}, "None"),
        ("import torch, moe_serve; moe_serve.SamplingParams", {}, "None"),
        ("import moe_serve; moe_serve.SamplingParams", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("import moe_serve; moe_serve.SamplingParams", {"GOMP_SPINCOUNT": "7"}, "7"),
    ],
    ids=["first", "unused", "torch is loaded", "a policy is set", "a count is set"],
)
def test_the_environment_is_asked_first(
    first: str, environment: dict[str, str], expected: str
) -> None:
    known = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    kept = {name: value for name, value in os.environ.items() if name not in known}
    done = subprocess.run(
        [sys.executable, "-c", f"{first}; {SHOW}"],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [expected]
