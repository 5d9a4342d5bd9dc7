"""numpy's products get one thread within a block, and what they had afterwards."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from moe_serve import blas

SHOW = """
import numpy
from moe_serve import blas
found = blas._blas()
for one in found: one.set(2)
print(*[one.get() for one in found])
with blas.one_blas_thread(): print(*[one.get() for one in found])
print(*[one.get() for one in found])
"""


def test_a_block_has_one_thread_whoever_loaded_numpy() -> None:
    if "openblas" not in str(np.show_config(mode="dicts")).lower():
        pytest.skip("numpy has another library here")
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "1", "2"]


def test_what_it_had_comes_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    count = [3]
    one = blas._Blas(lambda: count[0], lambda new: count.__setitem__(0, new))
    monkeypatch.setattr(blas, "_blas", lambda: [one])

    def fails() -> None:
        with blas.one_blas_thread():
            assert count == [1]
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert count == [3]
