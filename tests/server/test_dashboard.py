"""The dashboard: its contract, its headers, and the page itself, run by a browser if there is one.

A browser's time is virtual here: it passes as fast as the page can be run.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args, get_origin
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from moe_serve.server.dashboard import (
    FOLDER,
    HEADERS,
    ExpertBytes,
    ExpertCounters,
    ExpertsPart,
    KvGroup,
    LatencyPart,
    PrefixPart,
    Quantiles,
    RankPart,
    RequestsPart,
    ServerPart,
    Snapshot,
    TokensPart,
    dashboard_routes,
)
from moe_serve.server.messages import SILENT_AFTER_S, EngineState

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to run the page in")
HOSTILE = "<script>alert(1)</script>\x00\x1b[31m\u202e\r\n&amp;"
HOSTILE_SHOWN = "<script>alert(1)</script>\ufffd\ufffd[31m\ufffd\ufffd\ufffd&amp;"
LAYERS, EXPERTS = [1, 2, 5], 8
# Every answer is a Proxy: it says which fields were read, and complains of one that is not there.
WATCH = """
const read = new Set();
const isPlain = (value) => value === null || typeof value !== "object";
const watched = (value, path) => isPlain(value) ? value : new Proxy(value, {
  get(target, name) {
    if (typeof name === "symbol" || name === "then") return target[name];
    if (!(name in target)) console.error(`there is no ${path}.${name}`);
    const inner = Array.isArray(target) ? path : `${path}.${name}`;
    if (Object.hasOwn(target, name) && !Array.isArray(target)) {
      read.add(inner.slice(1));
      document.documentElement.dataset.read = [...read].join(" ");
    }
    return watched(target[name], inner);
  },
});
const json = Response.prototype.json;
Response.prototype.json = async function () { return watched(await json.call(this), ""); };
addEventListener("unhandledrejection", (event) => console.error("rejected", event.reason));
addEventListener("securitypolicyviolation", (event) => console.error("refused", event.blockedURI));
"""


def snapshot(
    second: int,
    *,
    state: EngineState = "serving",
    why: str = "",
    generation: int = 1,
    is_dense: bool = False,
    all_held: bool = False,
    num_ranks: int = 2,
    since: int = 0,
    model: str = "some/model",
) -> Snapshot:
    """What a server of steady load tells at `second`; its engine was formed at second `since`."""
    age = second - since
    uses = [[age * 10 * (expert + 1) for expert in range(EXPERTS)] for _ in LAYERS]
    uses[2] = [age * 80, *[0] * (EXPERTS - 1)]
    experts = ExpertsPart(
        layers=LAYERS,
        num_experts=EXPERTS,
        uses=uses,
        resident=[] if all_held else [[1, 0] * (EXPERTS // 2)] * len(LAYERS),
        counters=ExpertCounters(
            hits=90 * age,
            misses=30 * age,
            fetched=25 * age,
            computed_on_cpu=5 * age,
            prefetch_useful=6 * age,
            prefetch_late=3 * age,
            prefetch_wasted=age,
            evictions=25 * age,
            stall_s=0.125 * age,
            num_bytes=ExpertBytes(disk=2_000_000 * age, host=3_500 * age, link=0),
        ),
    )
    ranks = [
        RankPart(
            rank=rank,
            is_up=rank != 3,
            heartbeat_age_s=0.25 if rank != 1 else 7.5,
            num_tokens=50 * age,
            rows_computed=(300 if rank == 0 else 100) * age,
            bytes_sent=4_000 * age,
            model_bytes=8_000_000_000,
            kv_bytes=2_500_000_000,
            peak_rss_bytes=11_000_000_000,
            epoch=2,
        )
        for rank in range(num_ranks)
    ]
    return Snapshot(
        server=ServerPart(
            model=model,
            numerics_id="plain",
            version="1.2.3",
            state=state,
            why=why,
            uptime_s=100.0 + second,
            generation=generation,
            num_resubmitted=4,
        ),
        requests=RequestsPart(
            num_running=7,
            num_waiting=2,
            queue_tokens=1234,
            open_connections=9,
            finished={"stop": 3 * second, "length": second},
            errors={"503": 2 * second},
        ),
        tokens=TokensPart(prompt_total=1500 * second, generation_total=250 * second),
        latency=LatencyPart(
            ttft=Quantiles(p50_s=0.25, p99_s=1.5),
            itl=Quantiles(p50_s=0.0125, p99_s=None),
            e2e=Quantiles(p50_s=3.0, p99_s=150.0),
        ),
        kv=[KvGroup(name="full", num_blocks=200, num_free=50, num_cached=100)],
        prefix=PrefixPart(query_tokens=1500 * age, hit_tokens=600 * age),
        experts=None if is_dense else experts,
        ranks=ranks,
    )


def leaves(kind: Any, path: str = "") -> Iterator[str]:
    """The paths of all fields of a Struct, of those in lists as of one."""
    for told in msgspec.structs.fields(kind):
        name = f"{path}.{told.name}".lstrip(".")
        yield name
        inner = [told.type, *get_args(told.type)] if get_origin(told.type) else [told.type]
        for option in [*inner, *getattr(told.type, "__args__", ())]:
            if isinstance(option, type) and issubclass(option, msgspec.Struct):
                yield from leaves(option, name)


@pytest.mark.parametrize("is_dense", [False, True], ids=["experts", "dense"])
def test_a_snapshot_survives_the_wire(is_dense: bool) -> None:
    told = snapshot(3, is_dense=is_dense)
    assert msgspec.json.decode(msgspec.json.encode(told), type=Snapshot) == told


def test_what_is_not_a_number_is_null_on_the_wire() -> None:
    told = msgspec.json.decode(msgspec.json.encode(Quantiles(p50_s=float("nan"), p99_s=None)))
    assert told == {"p50_s": None, "p99_s": None}


def ask(path: str, method: str = "GET") -> httpx.Response:
    app = Starlette(routes=dashboard_routes(lambda: snapshot(1)))

    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path)

    return asyncio.run(answer())


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/dashboard", "text/html; charset=utf-8"),
        ("/dashboard/page.js", "text/javascript; charset=utf-8"),
        ("/dashboard/page.css", "text/css; charset=utf-8"),
        ("/dashboard/icon.svg", "image/svg+xml"),
        ("/dashboard/data", "application/json"),
    ],
)
def test_every_part_has_its_type_and_the_headers(path: str, media_type: str) -> None:
    answer = ask(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    for name, value in HEADERS.items():
        assert answer.headers[name] == value


@pytest.mark.parametrize(
    "path", ["/dashboard/../server/limits.py", "/dashboard/index.html", "/dashboard/x"]
)
def test_nothing_else_is_served(path: str) -> None:
    assert ask(path).status_code == 404


def test_nothing_can_be_sent() -> None:
    assert ask("/dashboard/data", "POST").status_code == 405


def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere() -> None:
    policy = dict(part.split(maxsplit=1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) == {"'self'", "'none'"}
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script[^>]*>\s*\S+[^<]*</script>|<style|\sstyle=|\son\w+=", page)
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="ascii")
        assert not re.search(r"(?<!xmlns=\")https?://|innerHTML|\beval\b|insertAdjacentHTML", text)


def test_page_and_messages_agree_when_a_rank_is_silent() -> None:
    (told,) = re.findall(r"SILENT_AFTER_S = ([\d.]+);", (FOLDER / "page.js").read_text())
    assert float(told) == SILENT_AFTER_S


class Dom(HTMLParser):
    """The page as the browser left it: texts and attributes by id, and cells of tables' rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: dict[str, dict[str, str | None]] = {}
        self.texts: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.title = ""
        self._open: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        name = told.get("id") or ("body" if tag == "body" else tag if tag == "html" else "")
        if name:
            self.attributes[name] = told
            self.texts.setdefault(name, "")
        if tag not in ("meta", "link", "input", "br"):
            self._open.append((tag, name))
        if tag == "tr":
            self.rows.setdefault(self._section(), []).append([])
        if tag in ("td", "th") and self.rows.get(self._section()):
            self.rows[self._section()][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, name in self._open:
            if name:
                self.texts[name] += data
        tags = [tag for tag, _ in self._open]
        if "title" in tags:
            self.title += data
        if "td" in tags or "th" in tags:
            self.rows[self._section()][-1][-1] += data

    def _section(self) -> str:
        return next((name for tag, name in reversed(self._open) if tag == "tbody"), "")

    def is_hidden(self, name: str) -> bool:
        return "hidden" in self.attributes[name]


@dataclass
class Script:
    """Answers of a server, in turn; the last again and again. An int is a status.

    probe: a script that runs in the page. key: what must be brought for anything but a 401.
    """

    answers: list[Snapshot | int]
    probe: str = ""
    key: str | None = None
    asked: list[str] = field(default_factory=list)

    def routes(self) -> list[Route]:
        known = {route.path: route.endpoint for route in dashboard_routes(lambda: self.answers[0])}  # type: ignore[arg-type,return-value]

        async def page(request: Request) -> Response:
            answer: Response = await known["/dashboard"](request)
            probe = b'<script src="dashboard/probe.js"></script><link rel="icon"'
            body = bytes(answer.body).replace(b'<link rel="icon"', probe)
            assert len(body) > len(answer.body)
            return Response(body, media_type="text/html", headers=HEADERS)

        async def probe(request: Request) -> Response:
            return Response(WATCH + self.probe, media_type="text/javascript", headers=HEADERS)

        async def data(request: Request) -> Response:
            if (
                self.key is not None
                and request.headers.get("authorization") != f"Bearer {self.key}"
            ):
                return Response(status_code=401)
            self.asked.append(request.url.path)
            answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
            if isinstance(answer, int):
                return Response(status_code=answer)
            (route,) = [
                route
                for route in dashboard_routes(lambda: answer)
                if route.path == request.url.path
            ]
            told: Response = await route.endpoint(request)
            return told

        changed: dict[str, Callable[..., Any]] = {"/dashboard": page, "/dashboard/data": data}
        routes = [Route(path, changed.get(path, endpoint)) for path, endpoint in known.items()]
        return [*routes, Route("/dashboard/probe.js", probe)]


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """Serve it on a free port, in a thread; yield the address of the page."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(Starlette(routes=script.routes()), log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/dashboard"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@dataclass(frozen=True)
class Seen:
    """What a browser made of the page, and what it complained of.

    stayed: the page asked its own server, and nobody else.
    """

    dom: Dom
    complaints: list[str]
    stayed: bool


def look(script: Script, folder: Path, seconds: float, *more: str) -> Seen:
    """Let the page run for so many of its seconds."""
    assert CHROMIUM is not None
    with serving(script) as address:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--disable-dev-shm-usage", "--hide-scrollbars",
            "--window-size=1280,900", f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={folder / 'net.json'}", "--enable-logging=stderr",
            f"--virtual-time-budget={round(seconds * 1000)}", "--dump-dom", *more, address,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    logged = done.stderr.decode(errors="replace")
    assert done.returncode == 0, logged[-2000:]
    complaints = [line for line in logged.splitlines() if ":CONSOLE" in line]
    events = json.loads((folder / "net.json").read_text(encoding="utf-8"))["events"]
    asked = [event["params"] for event in events if "url" in (event.get("params") or {})]
    # the browser's own requests have no page that made them
    origin = address.removesuffix("/dashboard")
    hosts = {urlsplit(told["url"]).netloc for told in asked if told.get("initiator") == origin}
    return Seen(Dom(done.stdout.decode()), complaints, hosts == {urlsplit(address).netloc})


def texts(dom: Dom, *names: str) -> list[str]:
    return [dom.texts[name] for name in names]


@needs_browser
def test_the_page_shows_what_is_told_and_reads_nothing_else(tmp_path: Path) -> None:
    key = 'new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true})'
    script = Script(
        [snapshot(second, model=HOSTILE, num_ranks=4) for second in range(5)],
        probe=f"""
          setTimeout(() => {{
            document.getElementById("layers").open = true;
            for (let i = 0; i < 3; i++) document.getElementById("map").dispatchEvent({key});
          }}, 6500);
        """,
    )
    seen = look(script, tmp_path, 9.0, "--blink-settings=preferredColorScheme=0")
    dom = seen.dom
    assert seen.complaints == []
    assert seen.stayed
    assert len(script.asked) >= 5
    read = set((dom.attributes["html"]["data-read"] or "").split())
    of_dicts = {"requests.finished.stop", "requests.finished.length", "requests.errors.503"}
    assert read == {*leaves(Snapshot), *of_dicts}
    assert dom.texts["model"] == HOSTILE_SHOWN
    assert dom.title == f"{HOSTILE_SHOWN} \u00b7 moe_serve"
    assert texts(dom, "banner-text", "banner-age") == ["Serving", ""]
    # the counts' own clock tells, not the browser's
    assert texts(dom, "generation-rate", "prompt-rate", "request-rate", "error-rate") == [
        "250", "1,500", "4", "2",
    ]  # fmt: skip
    assert texts(dom, "running", "waiting", "queue-tokens") == ["7", "2", "1,234"]
    assert texts(dom, "ttft-p50", "ttft-p99", "itl-p50", "itl-p99", "e2e-p50", "e2e-p99") == [
        "250 ms", "1.50 s", "12.5 ms", "\u2013", "3 s", "2 min 30 s",
    ]  # fmt: skip
    assert texts(dom, "kv-share", "prefix-share") == ["25.0 %", "40.0 %"]
    assert "50 of 200" in dom.texts["kv-groups"]
    assert texts(dom, "hit-share", "hit-rate", "miss-rate") == ["75.0 %", "90", "30"]
    assert texts(dom, "disk-rate", "host-rate", "link-rate") == ["2 MB/s", "3.50 kB/s", "0 B/s"]
    assert texts(dom, "stall-share", "useful-share", "late-share", "wasted-share") == [
        "12.5 %", "60.0 %", "30.0 %", "10.0 %",
    ]  # fmt: skip
    assert dom.attributes["map"]["data-layers"] == str(len(LAYERS))
    assert dom.attributes["map"]["data-experts"] == str(EXPERTS)
    assert dom.texts["map-readout"] == (
        "Layer 1 \u00b7 expert 2 \u00b7 30 uses/s \u00b7 8.33 % of the layer's "
        "\u00b7 0.67\u00d7 its mean \u00b7 held"
    )
    assert dom.texts["map-said"] == dom.texts["map-readout"]
    assert dom.rows["layer-rows"] == [
        ["1", "360", "7", "22.2 %", "1.78", "0", "4"],
        ["2", "360", "7", "22.2 %", "1.78", "0", "4"],
        ["5", "80", "0", "100 %", "8", "7", "4"],
    ]
    assert [row[:5] for row in dom.rows["rank-rows"]] == [
        ["0", "up", "250 ms", "50", "300"],
        ["1", "silent", "7.50 s", "50", "100"],
        ["2", "up", "250 ms", "50", "100"],
        ["3", "down", "250 ms", "50", "100"],
    ]
    assert dom.texts["imbalance"] == "2"
    assert not [name for name, text in dom.texts.items() if re.search("NaN|undefined|null", text)]


@needs_browser
@pytest.mark.parametrize(
    ("generation", "since"), [(2, -40), (1, 5)], ids=["another generation", "counts fell"]
)
def test_a_world_formed_anew_starts_its_counts_anew(
    tmp_path: Path, generation: int, since: int
) -> None:
    lost = [snapshot(second, state="reforming", why="rank 1 was lost") for second in (3, 4)]
    later = [snapshot(second, generation=generation, since=since) for second in range(6, 9)]
    note_states = """
      document.documentElement.dataset.told = "";
      setInterval(() => {
        const told = [document.title, document.getElementById("banner-text").textContent].join("|");
        if (!document.documentElement.dataset.told.includes(told)) {
          document.documentElement.dataset.told += `${told};`;
        }
      }, 100);
    """
    script = Script([*[snapshot(second) for second in range(3)], *lost, *later], probe=note_states)
    seen = look(script, tmp_path, 11.0)
    assert seen.complaints == []
    assert (seen.dom.attributes["html"]["data-told"] or "").split(";")[-3:] == [
        "some/model \u00b7 moe_serve|Serving",
        "reforming \u00b7 some/model \u00b7 moe_serve|A process was lost: the world of ranks is "
        "formed anew, and requests go on after it (rank 1 was lost)",
        "",
    ]
    assert texts(seen.dom, "banner-text", "generation") == ["Serving", str(generation)]
    assert texts(seen.dom, "generation-rate", "hit-rate", "stall-share") == ["250", "90", "12.5 %"]
    assert seen.dom.texts["experts-note"].endswith("over the last 2 s")


@needs_browser
def test_a_dense_model_has_no_experts_and_one_process_no_ranks(tmp_path: Path) -> None:
    script = Script([snapshot(second, is_dense=True, num_ranks=0) for second in range(3)])
    seen = look(script, tmp_path, 4.0)
    assert seen.complaints == []
    assert all(seen.dom.is_hidden(name) for name in ("experts", "tiers", "ranks"))
    assert seen.dom.texts["generation-rate"] == "250"


@needs_browser
def test_without_an_answer_the_last_figures_stay_and_the_page_says_so(tmp_path: Path) -> None:
    script = Script([*[snapshot(second, all_held=True) for second in range(3)], 503])
    dom = look(script, tmp_path, 10.0).dom
    assert dom.attributes["body"]["data-state"] == "lost"
    assert dom.texts["banner-text"] == "No answer from the server"
    (seconds,) = re.findall(r"^for (\d+) s; .* \(HTTP 503\)$", dom.texts["banner-age"])
    assert 5 <= int(seconds) <= 8
    assert dom.texts["generation-rate"] == "250"
    assert (dom.is_hidden("experts"), dom.is_hidden("tiers")) == (False, True)


@needs_browser
def test_a_key_is_asked_for_and_brought(tmp_path: Path) -> None:
    type_key = """
      setTimeout(() => {
        document.documentElement.dataset.asked = !document.getElementById("key-form").hidden;
        document.getElementById("key").value = "secret";
        document.getElementById("key-form").requestSubmit();
      }, 2500);
    """
    script = Script([snapshot(second) for second in range(3)], key="secret", probe=type_key)
    dom = look(script, tmp_path, 6.0).dom
    assert dom.attributes["html"]["data-asked"] == "true"
    assert dom.is_hidden("key-form")
    assert texts(dom, "banner-text", "generation-rate") == ["Serving", "250"]
