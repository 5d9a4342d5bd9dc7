"""Where the native library must be there, its tests may not be skipped for want of it."""

from __future__ import annotations

import os

import pytest

from moe_serve.kernels.native import loader
from tests.kernels.implementations import IMPLEMENTATIONS, NATIVE, kernels


def test_the_native_library_is_there_in_ci() -> None:
    if os.environ.get("CI") != "true":
        pytest.skip("asked of CI only; without the library the tests of native code are skipped")
    if os.environ.get("TEST_WITHOUT_NATIVE") == "1":
        assert NATIVE == (), "TEST_WITHOUT_NATIVE=1, but there is a native library"
    else:
        loader.open_library()  # raises what is wrong with it
        assert "cpu-plain" in NATIVE


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_tests_run_what_they_name(name: str) -> None:
    found = kernels(name)
    way = found.isa
    if found.name == "triton":
        way = found.numerics_id.rpartition("-")[2]
    assert name == (found.name if way is None else f"{found.name}-{way}")
