"""The fixtures that other tests trust."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NEEDS_DATA = "def test_it(shared_data):\n    assert shared_data.is_dir()\n"


def test_poisoned_memory_is_nan(poisoned_empty: None) -> None:
    made = (torch.empty(3), torch.empty_like(torch.zeros(2)), torch.zeros(2).new_empty((4,)))
    assert all(bool(tensor.isnan().all()) for tensor in made)
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64


def test_memory_is_poisoned_only_where_asked() -> None:
    assert torch.empty.__module__ != "conftest"
    assert torch.empty.__name__ == "empty"
    assert not hasattr(torch.empty, "__closure__")  # torch's own, not a Python function


@pytest.mark.parametrize(
    ("variables", "outcome"),
    [({}, "1 skipped"), ({"CI": "true"}, "1 error"), ({"TEST_SHARED_DATA": "."}, "1 passed")],
    ids=["absent", "absent-in-ci", "named"],
)
def test_missing_data_skips_but_fails_in_ci(
    variables: dict[str, str], outcome: str, tmp_path: Path
) -> None:
    tests = tmp_path / "checkout" / "tests"
    tests.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("conftest.py"), tests)
    (tests / "test_data.py").write_text(NEEDS_DATA)
    inherited = {k: v for k, v in os.environ.items() if k not in ("CI", "TEST_SHARED_DATA")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=tests,
        env=inherited | variables,
        capture_output=True,
        text=True,
    )
    assert outcome in done.stdout


def test_the_embedded_model_is_there(embedded_model: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in embedded_model.iterdir()
    }
