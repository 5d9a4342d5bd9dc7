"""Requests that cannot be served: what is asked, and what the error must say."""

from __future__ import annotations

from typing import Any

# (name, keywords of SamplingParams, what the message must have: field, value, limit)
BAD_SAMPLING: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("n 0", {"n": 0}, ("n is 0", "from 1 to 1024")),
    ("n negative", {"n": -1}, ("n is -1", "from 1")),
    ("n huge", {"n": 10**6}, ("n is 1000000", "1024")),
    ("n text", {"n": "2"}, ("n is '2'", "integer")),
    ("temperature negative", {"temperature": -0.1}, ("temperature is -0.1", "from 0")),
    ("temperature NaN", {"temperature": float("nan")}, ("temperature is nan", "from 0")),
    ("temperature infinite", {"temperature": float("inf")}, ("temperature is inf", "10000")),
    ("top_p above 1", {"top_p": 1.1}, ("top_p is 1.1", "above 0 to 1")),
    ("top_p 0", {"top_p": 0.0}, ("top_p is 0.0", "above 0 to 1")),
    ("top_k -2", {"top_k": -2}, ("top_k is -2", "from -1")),
    ("min_p above 1", {"min_p": 1.5}, ("min_p is 1.5", "from 0 to 1")),
    ("max_tokens 0", {"max_tokens": 0}, ("max_tokens is 0", "from 1")),
    ("max_tokens a fraction", {"max_tokens": 1.5}, ("max_tokens is 1.5", "integer")),
    ("min_tokens negative", {"min_tokens": -1}, ("min_tokens is -1", "from 0")),
    ("min over max", {"min_tokens": 9, "max_tokens": 8}, ("min_tokens is 9", "max_tokens 8")),
    ("stop empty", {"stop": ""}, ("stop holds ''", "not empty")),
    ("stop holds empty", {"stop": ["a", ""]}, ("stop holds ''", "not empty")),
    ("stop holds a number", {"stop": [7]}, ("stop holds 7", "string")),
    ("stop too many", {"stop": ["x"] * 17}, ("stop has 17", "16")),
    ("logprobs 21", {"logprobs": 21}, ("logprobs is 21", "from 0 to 20")),
    ("prompt_logprobs -1", {"prompt_logprobs": -1}, ("prompt_logprobs is -1", "0 to 20")),
    ("repetition 0", {"repetition_penalty": 0.0}, ("repetition_penalty is 0.0", "above 0")),
    ("presence 3", {"presence_penalty": 3.0}, ("presence_penalty is 3.0", "-2 to 2")),
    ("frequency -3", {"frequency_penalty": -3.0}, ("frequency_penalty is -3.0", "-2 to 2")),
    ("seed too large", {"seed": 2**64}, ("seed is", "9223372036854775807")),
    ("bias too large", {"logit_bias": {5: 101.0}}, ("logit_bias[5] is 101.0", "100")),
    ("no token allowed", {"allowed_token_ids": []}, ("allowed_token_ids is empty",)),
    ("stop id negative", {"stop_token_ids": [-1]}, ("stop_token_ids is -1", "from 0")),
    ("bad word empty", {"bad_words": [""]}, ("bad_words holds ''", "not empty")),
    ("unknown", {"temprature": 1.0}, ("temprature", "did you mean 'temperature'")),
)  # fmt: skip

# (name, prompt, keywords, what the message must have), for a vocabulary of 6144, a context of 256
BAD_PROMPTS: tuple[tuple[str, Any, dict[str, Any], tuple[str, ...]], ...] = (
    ("no text", {"prompt": ""}, {}, ("prompt is empty", "at least one")),
    ("no tokens", {"prompt_token_ids": []}, {}, ("prompt is empty", "at least one")),
    ("id beyond", [5, 6144], {}, ("prompt holds the token id 6144", "6144", "0 to 6143")),
    ("id negative", [5, -3], {}, ("prompt holds the token id -3", "0 to 6143")),
    ("id a fraction", [5, 1.5], {}, ("prompt holds 1.5", "integers")),
    ("id a boolean", [5, True], {}, ("prompt holds True", "integers")),
    ("too long", [5] * 256, {}, ("prompt has 256 tokens", "256", "255")),
    ("far too long", "x" * 70_000, {}, ("prompt has 70000 characters", "256 tokens")),
    ("a number", {"prompt": 7}, {}, ("prompt is of type int", "text")),
    ("ids as text", {"prompt_token_ids": "abc"}, {}, ("prompt_token_ids is of type str",)),
    ("two forms", {"prompt": "a", "prompt_token_ids": [1]}, {}, ("exactly one",)),
    ("unknown form", {"text": "a"}, {}, ("'text'", "'prompt' or 'prompt_token_ids'")),
    ("bytes", b"abc", {}, ("a prompt of type bytes",)),
    ("half a surrogate pair", "a\ud800", {}, ("lone surrogate", "character 1")),
    ("stop id beyond", "a", {"stop_token_ids": [9999]}, ("stop_token_ids", "9999", "6144")),
    ("allowed id beyond", "a", {"allowed_token_ids": [6144]}, ("allowed_token_ids", "6144")),
    ("bias id beyond", "a", {"logit_bias": {7000: 1.0}}, ("logit_bias", "7000", "6144")),
)  # fmt: skip

# (name, arguments of `moe-serve generate`, what the one line must have)
BAD_COMMANDS: tuple[tuple[str, list[str], tuple[str, ...]], ...] = (
    ("n", ["x", "--n", "0"], ("n is 0",)),
    ("temperature", ["x", "--temperature", "-1"], ("temperature is -1",)),
    ("nan", ["x", "--temperature", "nan"], ("temperature is nan",)),
    ("top_p", ["x", "--top-p", "1.5"], ("top_p is 1.5",)),
    ("stop", ["x", "--stop", ""], ("stop holds ''",)),
    ("max_tokens", ["x", "--max-tokens", "0"], ("max_tokens is 0",)),
    ("min_tokens", ["x", "--min-tokens", "200"], ("min_tokens is 200", "max_tokens 128")),
    ("logprobs", ["x", "--logprobs", "21"], ("logprobs is 21", "20")),
    ("no number", ["x", "--max-tokens", "many"], ("--max-tokens",)),
    ("no such flag", ["x", "--temprature", "1"], ("--temprature", "--temperature")),
    ("empty prompt", [""], ("prompt is empty",)),
    ("no prompt", [], ("no prompt", "moe-serve generate")),
    ("too long", ["word " * 300], ("prompt has", "256", "255")),
    ("block size", ["x", "--block-size", "65"], ("block_size is 65", "1 to 64")),
    ("max_num_seqs", ["x", "--max-num-seqs", "0"], ("max_num_seqs is 0", "at least 1")),
    ("dtype", ["x", "--dtype", "bf16"], ("dtype is 'bf16'", "bfloat16")),
    ("no file", ["--prompts", "none.jsonl"], ("none.jsonl", "cannot be read")),
    ("file and prompt", ["x", "--prompts", "none.jsonl"], ("one of both",)),
    ("limit alone", ["x", "--limit", "3"], ("--limit", "--prompts")),
    ("no config", ["x", "--config", "none.toml"], ("none.toml", "cannot be read")),
    ("no template", ["x", "--chat-template", "none.jinja"], ("none.jinja", "cannot be read")),
)  # fmt: skip
