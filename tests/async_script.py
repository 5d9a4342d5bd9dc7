"""A script that uses two `AsyncLLM`s: no guard of its main, a busy event loop, a fork.

    python -m tests.async_script

Prints what came of it as a line of JSON, and waits to be killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any

from moe_serve import AsyncLLM, SamplingParams
from moe_serve.errors import ConfigError
from moe_serve.server.messages import SILENT_AFTER_S

OPTIONS: dict[str, Any] = {"num_kv_blocks": 128, "max_model_len": 256, "threads": 1}
LONG = SamplingParams(max_tokens=60, ignore_eos=True, seed=1)


async def tokens(llm: AsyncLLM) -> list[int]:
    return list((await llm.generate("Once", LONG)).outputs[0].token_ids)


async def main() -> tuple[AsyncLLM, list[list[int]]]:
    """Return one that is still there, and the tokens of the same request in different ways."""

    async def make() -> AsyncLLM:
        return await AsyncLLM.create(**OPTIONS)

    one, other = await asyncio.gather(make(), make())
    asked: list[asyncio.Task[list[int]]] = []
    async for output in one.stream("Once", LONG):
        last = output
        if not asked:
            # for longer than a process that gives no sign of life would be waited for
            time.sleep(SILENT_AFTER_S + 1)
            asked = [asyncio.create_task(tokens(llm)) for llm in (one, other)]
    found = [list(last.outputs[0].token_ids), *await asyncio.gather(*asked)]
    found.append(await tokens(other))
    await other.close()
    return one, found


def script() -> None:
    """Do what the module says."""
    runner = asyncio.Runner()
    llm, found = runner.run(main())
    child = os.fork()
    if child == 0:
        try:
            asyncio.new_event_loop().run_until_complete(llm.generate("Once", LONG))
        except ConfigError as error:
            os._exit(7 if "forked" in str(error) else 8)
        os._exit(9)
    forked = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({"found": found, "forked": forked}), flush=True)
    time.sleep(600)


if __name__ != "tests.async_script":  # run as a script, and never imported by what it starts
    script()
