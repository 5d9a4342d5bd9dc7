"""A user's script: the same on every rank under torchrun, or alone with ranks of its own."""

from __future__ import annotations

import json
import sys
import time

from moe_serve import LLM, SamplingParams
from moe_serve.errors import RequestError

print("begun", file=sys.stderr)
greedy = SamplingParams(max_tokens=6, temperature=0.0)
texts = []
for _ in range(2):  # the second one is made while the first one is there
    llm = LLM(**json.loads(sys.argv[1]), num_kv_blocks=64, max_model_len=128, dispatcher="static")
    found = llm.generate(["Once upon a time", "def"], greedy)
    texts += [output.outputs[0].text for output in found]
if not llm.is_first_rank:
    time.sleep(float(sys.argv[2]))
with LLM(**json.loads(sys.argv[1]), num_kv_blocks=64, max_model_len=128) as another:
    texts += ["".join(llm.stream_text("The capital of France", greedy))]
    texts += [output.outputs[0].text for output in another.generate(["Once upon a time"], greedy)]
    try:
        llm.generate([[999_999]], greedy)
    except RequestError:
        texts += ["refused"]
    texts += [output.outputs[0].text for output in llm.generate(["def"], greedy)]
if llm.is_first_rank:
    print(json.dumps(texts))
