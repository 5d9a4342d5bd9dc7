"""A server to be measured, in a process of its own: the front end, or FastAPI with nothing in it.

    python -m benchmarks.serving.subject front|bare PORT STEP_S SOCKET

The front end's engine is `tests.server.fake_host` at SOCKET; the bare server's streams have a chunk
in STEP_S as that engine's have. Both run on uvicorn with h11.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from moe_serve.server.engine_client import EngineClient
from moe_serve.server.options import ServerConfig
from moe_serve.server.routes import build_app
from moe_serve.server.state import FrontState
from moe_serve.text.model_texts import ModelTexts

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "moe_serve" / "assets" / "demo-moe"
VOCAB_SIZE = 6144
# a chunk of a stream as the front end sends it, for the bare server to send as large ones
CHUNK = (
    b'data: {"id":"cmpl-00000000000000000000000000000000","object":"text_completion",'
    b'"created":1700000000,"model":"demo","system_fingerprint":"moe-serve-0.1.0-fake",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)


class Asked(BaseModel):
    prompt: str
    max_tokens: int = 16
    temperature: float = 1.0
    stream: bool = False
    model: str | None = None


class Answer(BaseModel):
    id: str
    text: str
    num_tokens: int


def bare_app(step_s: float) -> FastAPI:
    """Return an application that validates a body and answers, in FastAPI's own way."""
    app = FastAPI()

    async def chunks(count: int) -> AsyncIterator[bytes]:
        now_s = asyncio.get_running_loop().time
        for _ in range(count):
            yield CHUNK
            await asyncio.sleep(step_s - now_s() % step_s if step_s else 0)
        yield b"data: [DONE]\n\n"

    @app.post("/v1/completions", response_model=None)
    async def complete(asked: Asked) -> Answer | StreamingResponse:
        if asked.stream:
            return StreamingResponse(chunks(asked.max_tokens), media_type="text/event-stream")
        return Answer(id="cmpl-0", text=asked.prompt, num_tokens=asked.max_tokens)

    return app


async def front_app(path: Path) -> FastAPI:
    """Return the front end of the engine at `path`."""
    texts = ModelTexts.read(DEMO, VOCAB_SIZE)
    client = EngineClient(texts.tokenizer)
    await asyncio.get_running_loop().create_unix_connection(lambda: client, str(path))
    await client.wait_until_welcome()

    return build_app(
        FrontState(
            client=client,
            texts=texts,
            server=ServerConfig(),
            model="demo",
            created=0,
            version="0.1.0",
        )
    )


async def serve(kind: str, port: int, step_s: float, path: Path) -> None:
    app = bare_app(step_s) if kind == "bare" else await front_app(path)
    config = uvicorn.Config(
        app, port=port, http="h11", loop="asyncio", lifespan="off", log_level="warning"
    )
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])))
