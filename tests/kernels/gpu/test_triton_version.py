"""Which Triton runs: that which the tests were asked to run on."""

from __future__ import annotations

import os

import pytest


def test_it_is_expected_triton() -> None:
    triton = pytest.importorskip("triton")
    expected = os.environ.get("EXPECTED_TRITON")
    if expected is None:
        major, minor = map(int, triton.__version__.split(".")[:2])
        assert (3, 6) <= (major, minor) < (3, 8)
    else:
        assert triton.__version__ == expected
