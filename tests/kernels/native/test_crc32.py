"""The native crc32 is zlib's, at every length and alignment."""

from __future__ import annotations

import random
import zlib

import pytest

from moe_serve.kernels.native import crc32 as module
from moe_serve.kernels.native.crc32 import crc32

DATA = random.Random(0).randbytes(5000)


@pytest.mark.parametrize("start", [0, 1, 7, 13])
def test_equals_zlib(start: int) -> None:
    for size in (*range(200), 255, 256, 1000, 4032, 4900):
        part = memoryview(DATA)[start : start + size]
        assert crc32(part) == zlib.crc32(part), size


def test_a_single_bit_shows() -> None:
    whole = crc32(memoryview(DATA))
    for at in (0, 63, 64, 2500, 4999):
        broken = bytearray(DATA)
        broken[at] ^= 4
        assert crc32(memoryview(broken)) != whole


def test_without_the_library_zlib_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_function", lambda: None)
    assert crc32(memoryview(DATA)) == zlib.crc32(DATA)
