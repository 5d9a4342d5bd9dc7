"""The dashboard: one page of our own files, and the figures that it asks for once a second.

All counts are cumulative: the page works out rates from answers that follow each other, and begins
anew where a count has fallen. So nothing is kept here for any reader. The page and its parts hold
no secret; /dashboard/data tells of a server's load, and is to be guarded as its API is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from moe_serve.server.messages import EngineState

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "dashboard"
PAGE = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# style and script are files of their own, so that nothing inline need be allowed
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class ServerPart(msgspec.Struct, frozen=True, kw_only=True):
    """The server as a whole.

    model: its name in the API; numerics_id: "" until the engine is there; version: of moe_serve.
    why: in a sentence, why it is not serving; "" where the state says it all.
    uptime_s: of whoever counts, by a clock that does not jump: what rates are taken over.
    generation: how often the world of ranks was formed. num_resubmitted: requests that were begun
    again in a later one.
    """

    model: str
    numerics_id: str
    version: str
    state: EngineState
    why: str = ""
    uptime_s: float
    generation: int
    num_resubmitted: int


class RequestsPart(msgspec.Struct, frozen=True, kw_only=True):
    """Requests now (the first four), and counts since the start.

    num_waiting: those without their first token; queue_tokens: of their prompts, tokens.
    finished: outputs by finish_reason. errors: answers by HTTP status, 400 and above, as text.
    """

    num_running: int
    num_waiting: int
    queue_tokens: int
    open_connections: int
    finished: dict[str, int]
    errors: dict[str, int]


class TokensPart(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the start, of tokens of prompts, prefix hits included, and of outputs."""

    prompt_total: int
    generation_total: int


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of the last minute, in seconds; None: there was nothing to measure."""

    p50_s: float | None
    p99_s: float | None


class LatencyPart(msgspec.Struct, frozen=True, kw_only=True):
    """Time to the first token, between two tokens, and of whole requests."""

    ttft: Quantiles
    itl: Quantiles
    e2e: Quantiles


class KvGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks of one cache group now, on all ranks together. name: told to people only.

    num_free: hold nothing; num_cached: hold a prefix that no request uses, and are given up when
    needed. The others are in use.
    """

    name: str
    num_blocks: int
    num_free: int
    num_cached: int


class PrefixPart(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of prompts since the engine was built: looked up, and found in the prefix cache."""

    query_tokens: int
    hit_tokens: int


class ExpertBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of experts that were brought in, by where they came from.

    disk: files; host: memory of this machine, to slots in it; link: that memory, over the bus to
    a device.
    """

    disk: int
    host: int
    link: int


class ExpertCounters(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the engine was built, over all layers and ranks.

    hits, misses: experts that an event used, and were or were not resident; fetched: experts
    brought in; computed_on_cpu: misses served where they lay. Of guesses: prefetch_useful were
    there in time, prefetch_late were on their way, prefetch_wasted left unused.
    stall_s: seconds that steps waited for experts. num_bytes: see `ExpertBytes`.
    """

    hits: int
    misses: int
    fetched: int
    computed_on_cpu: int
    prefetch_useful: int
    prefetch_late: int
    prefetch_wasted: int
    evictions: int
    stall_s: float
    num_bytes: ExpertBytes


class ExpertsPart(msgspec.Struct, frozen=True, kw_only=True):
    """The experts of all MoE layers.

    layers: their numbers in the model, ascending. uses[i][e]: rows that expert e of layer layers[i]
    was routed since the engine was built, on all ranks together.
    resident[i][e]: 1 where it is in a slot now, 0 where not; [] where all are held, and then the
    counters are all 0.
    """

    layers: list[int]
    num_experts: int
    uses: list[list[int]]
    resident: list[list[int]]
    counters: ExpertCounters


class RankPart(msgspec.Struct, frozen=True, kw_only=True):
    """One rank; counts since its start, sizes in bytes.

    heartbeat_age_s: seconds since its last sign of life. num_tokens: given to its own requests.
    rows_computed: pairs of a token and an expert that its experts computed. epoch: how often a
    layer of experts was placed anew.
    """

    rank: int
    is_up: bool
    heartbeat_age_s: float
    num_tokens: int
    rows_computed: int
    bytes_sent: int
    model_bytes: int
    kv_bytes: int
    peak_rss_bytes: int
    epoch: int


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What /dashboard/data answers with.

    kv: [] until the engine is there. experts: None for a dense model, and until the engine is
    there. ranks: [] of one process.
    """

    server: ServerPart
    requests: RequestsPart
    tokens: TokensPart
    latency: LatencyPart
    kv: list[KvGroup]
    prefix: PrefixPart
    experts: ExpertsPart | None
    ranks: list[RankPart]


def dashboard_routes(snapshot: Callable[[], Snapshot], path: str = "/dashboard") -> list[Route]:
    """Return the routes of the page (`path`), its parts, and `path`/data.

    snapshot: called on the event loop, once a second for each open page.
    """
    encoder = msgspec.json.Encoder()

    async def data(request: Request) -> Response:
        return Response(encoder.encode(snapshot()), media_type="application/json", headers=HEADERS)

    routes = [Route(f"{path}/data", data)]
    for file in sorted(file for file in FOLDER.iterdir() if file.suffix in MEDIA_TYPES):
        address = path if file.name == PAGE else f"{path}/{file.name}"
        routes.append(Route(address, _answering(file)))
    return routes


def _answering(file: Path) -> Callable[[Request], Awaitable[Response]]:
    body, media_type = file.read_bytes(), MEDIA_TYPES[file.suffix]

    async def answer(request: Request) -> Response:
        return Response(body, media_type=media_type, headers=HEADERS)

    return answer
