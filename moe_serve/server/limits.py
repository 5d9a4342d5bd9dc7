"""How much anybody may ask of a server: the one place of these numbers.

Validation, guard, docs and tests read them here. The engine's own (context length, vocabulary) are
the model's, and are checked where a request is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_serve.structured_outputs import MAX_GRAMMAR_BYTES, MAX_GRAMMAR_S, MAX_JSON_DEPTH


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Sizes in bytes, times in seconds; counts where no unit is named.

    Of a connection: header_bytes, header_count and body_bytes of one request; header_s until its
    head is complete, body_s until its body is, idle_s between two requests, write_s for a client
    that takes nothing of what is sent; small_chunks of fewer than 64 bytes that a chunked body may
    have (each costs more to take apart than to send); send_buffer_bytes that the kernel may hold;
    linger_s that a refused client has to read why. connections at once, and spare_connections
    beyond them that only hear that there are too many.
    Of the server: requests for tokens at once; queue_requests that wait for their first token, and
    queue_tokens of their prompts; request_s for a whole request.
    Of one request: the others; prompt_ids of one prompt, parts of one message's content, variables
    of a chat template, json_parts (names, objects, lists) of a whole body, and prompt_logprobs told
    in its answer, with every choice anew. error_bytes: of any
    answer that is an error.
    """

    body_bytes: int = 8 * 2**20
    header_bytes: int = 64 * 2**10
    header_count: int = 100
    header_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 5.0
    write_s: float = 60.0
    small_chunks: int = 1024
    send_buffer_bytes: int = 256 * 2**10
    linger_s: float = 2.0
    connections: int = 1024
    spare_connections: int = 64
    requests: int = 1024
    queue_requests: int = 256
    queue_tokens: int = 2**20
    request_s: float = 600.0
    error_bytes: int = 4096
    n: int = 16
    prompts: int = 64
    prompt_ids: int = 2**20
    messages: int = 4096
    parts: int = 1024
    stop: int = 16
    stop_chars: int = 256
    logprobs: int = 20
    prompt_logprobs: int = 2**19
    logit_bias: int = 1024
    bad_words: int = 128
    stop_token_ids: int = 128
    allowed_token_ids: int = 2**20
    name_chars: int = 256
    variables: int = 32
    json_depth: int = MAX_JSON_DEPTH
    json_parts: int = 2**15
    grammar_bytes: int = MAX_GRAMMAR_BYTES
    grammar_s: float = MAX_GRAMMAR_S
    template_s: float = 5.0
    seed: int = 2**63 - 1
    tokens: int = 2**31 - 1
    priority: int = 2**31 - 1


DEFAULT_LIMITS = Limits()
