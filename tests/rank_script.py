"""A user's script: the same on every rank under torchrun, or alone with ranks of its own."""

from __future__ import annotations

import json
import sys

from moe_serve import LLM, SamplingParams

print("begun", file=sys.stderr)
llm = LLM(**json.loads(sys.argv[1]), num_kv_blocks=64, max_model_len=128)
greedy = SamplingParams(max_tokens=6, temperature=0.0)
texts = [output.outputs[0].text for output in llm.generate(["Once upon a time", "def"], greedy)]
texts += ["".join(llm.stream_text("The capital of France", greedy))]
with LLM(**json.loads(sys.argv[1]), num_kv_blocks=64, max_model_len=128) as another:
    texts += [output.outputs[0].text for output in another.generate(["Once upon a time"], greedy)]
if llm.is_first_rank:
    print(json.dumps(texts))
