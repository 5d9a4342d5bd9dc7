"""What can never be served is refused with the numbers, and what just fits is not."""

from __future__ import annotations

import pytest

from moe_serve.engine.admission import checked_end_length
from moe_serve.engine.kv_cache import KVCacheManager
from moe_serve.errors import CapacityError, RequestError
from moe_serve.types import CacheGroup, Request, SamplingParams

FULL = CacheGroup("full", (0,), 4)
SLIDING = CacheGroup("sliding", (0,), 4, window=8)


def end_length(
    num_prompt: int,
    max_tokens: int | None,
    group: CacheGroup = FULL,
    num_blocks: int = 8,
    max_chunk: int = 32,
) -> int:
    kv = KVCacheManager((group,), (num_blocks,), 4, 4, 64, False)
    sampling = SamplingParams(max_tokens=max_tokens)
    request = Request(request_id="a", prompt_ids=tuple(range(num_prompt)), sampling=sampling)
    return checked_end_length(request, kv, 64, max_chunk)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "error", "message"),
    [
        (0, 8, RequestError, "the prompt is empty"),
        (64, 8, RequestError, r"has 64 tokens.* may have 64 \(max_model_len\).* at most 63"),
        (
            5,
            29,
            CapacityError,
            r"5 prompt tokens and up to 29 of output need 9 KV blocks of 4 tokens, and there are 8 "
            r"\(cache group 0, full\); set max_tokens to at most 28",
        ),
        (5, None, CapacityError, "up to 59 of output need 16 KV blocks"),
        (40, 8, CapacityError, "shorten the prompt to at most 32 tokens"),
    ],
    ids=["empty", "context", "output", "no-max-tokens", "prompt"],
)
def test_what_can_never_fit_is_refused(
    num_prompt: int, max_tokens: int | None, error: type[RequestError], message: str
) -> None:
    with pytest.raises(error, match=message):
        end_length(num_prompt, max_tokens)


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(5, 28), (32, 1), (1, 32)])
def test_what_the_messages_advise_fits(num_prompt: int, max_tokens: int) -> None:
    assert end_length(num_prompt, max_tokens) == 33


def test_the_context_ends_what_max_tokens_does_not() -> None:
    assert end_length(5, None, num_blocks=16) == 64
    assert end_length(60, 1000, num_blocks=16) == 64


def test_a_sliding_group_must_hold_its_window_and_a_chunk() -> None:
    with pytest.raises(CapacityError, match=r"need 7 KV .* 5 .*sliding\); lower max_prefill_chunk"):
        end_length(40, 8, SLIDING, num_blocks=5, max_chunk=16)
    assert end_length(40, 8, SLIDING, num_blocks=5, max_chunk=8) == 48
