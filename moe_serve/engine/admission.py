"""What can never be served is refused when it comes, with the numbers; what can, waits its turn."""

from __future__ import annotations

from moe_serve.engine.kv_cache import KVCacheManager
from moe_serve.engine.policies.base import Policy
from moe_serve.errors import CapacityError, RequestError
from moe_serve.types import Request


def check_priority(request: Request, policy: Policy) -> None:
    """Raise RequestError for a priority that would have no effect."""
    if request.priority and not policy.reads_priority:
        raise RequestError(
            f"priority is {request.priority}, which this engine does not read: leave it out, or "
            "start it with --scheduling-policy priority"
        )


def checked_end_length(
    request: Request, kv: KVCacheManager, max_model_len: int, max_chunk: int
) -> int:
    """Return the length, in tokens, at which each of a request's outputs must end.

    max_chunk: the most tokens of one sequence in one step. Raises RequestError for an empty or too
    long prompt, CapacityError when the whole cache could not hold one output.
    """
    num_prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
    if not num_prompt:
        raise RequestError(f"request {request.request_id!r}: the prompt is empty; give a token")
    if num_prompt >= max_model_len:
        raise RequestError(
            f"request {request.request_id!r}: the prompt has {num_prompt} tokens, and prompt and "
            f"output together may have {max_model_len} (max_model_len); shorten the prompt to at "
            f"most {max_model_len - 1}"
        )
    end_length = max_model_len
    if max_tokens is not None:
        end_length = min(end_length, num_prompt + max_tokens)
    for group, pool in enumerate(kv.pools):
        # the last token's key and value are never needed
        needed = kv.most_blocks(group, end_length - 1, max_chunk)
        if needed > pool.num_blocks:
            raise CapacityError(_shortage(request, end_length, kv, group, needed))
    return end_length


def _shortage(
    request: Request, end_length: int, kv: KVCacheManager, group: int, needed: int
) -> str:
    num_prompt, size = len(request.prompt_ids), kv.block_size
    kind, there = kv.groups[group].kind, kv.pools[group].num_blocks
    text = (
        f"request {request.request_id!r}: {num_prompt} prompt tokens and up to "
        f"{end_length - num_prompt} of output need {needed} KV blocks of {size} tokens, and there "
        f"are {there} (cache group {group}, {kind}); "
    )
    if kind == "sliding":
        return text + "lower max_prefill_chunk, or give more with num_kv_blocks or kv_cache_gb"
    most = there * size + 1 - num_prompt
    if most > 0:
        return text + (
            f"set max_tokens to at most {most}, or give more with num_kv_blocks or kv_cache_gb"
        )
    return text + (
        f"shorten the prompt to at most {there * size} tokens, or give more with num_kv_blocks or "
        "kv_cache_gb"
    )
