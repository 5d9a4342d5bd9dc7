"""Which bucket a batch of decodes is of."""

from __future__ import annotations

import pytest

from moe_serve.kernels.gpu.buckets import Size, size_of


@pytest.mark.parametrize(
    ("num_seqs", "context", "expected"),
    [
        (1, 1, Size(1, 1024)),
        (2, 1024, Size(2, 1024)),
        (3, 1025, Size(4, 2048)),
        (5, 4096, Size(8, 4096)),
        (8, 4097, Size(8, 8192)),
        (9, 10, Size(16, 1024)),
        (249, 4000, Size(256, 4096)),
        (256, 4097, None),  # too many keys for the scratch of one graph
        (257, 10, None),
        (1, 40_000, Size(1, 40_960)),  # as far as the model goes
        (1, 40_961, None),
        (0, 0, None),
    ],
)
def test_sizes_are_rounded_up(num_seqs: int, context: int, expected: Size | None) -> None:
    assert size_of(num_seqs, context, most_seqs=256, most_context=40_960) == expected


def test_no_bucket_is_larger_than_the_most() -> None:
    assert size_of(9, 5, most_seqs=12, most_context=100) == Size(12, 100)
