// Ask for the figures once a second, and show them.

import { drawLines } from "./charts.js";
import { NONE, bytes, duration, make, number, percent, plain, put, seconds, whole } from "./figures.js";
import { HeatMap } from "./heatmap.js";
import { Growth, History, share } from "./rates.js";

const POLL_MS = 1000;
const HIDDEN_POLL_MS = 5000;
const ANSWER_MS = 5000;
// figures that are not of this moment are means over these seconds
const MEAN_S = 10;
const HISTORY_S = 300;
const SLOW_AFTER_S = 2.5;
const SILENT_AFTER_S = 5;
const KEY_NAME = "moe_serve.key";

// where each count is in what is pushed
const REQUEST = { generated: 0, prompt: 1, ended: 2, errors: 3 };
const CACHE = {
  queried: 0, found: 1, hits: 2, misses: 3, stall: 4, useful: 5, late: 6, wasted: 7, disk: 8, host: 9, link: 10,
};
const RANK = { tokens: 0, rows: 1, sent: 2 };
const RANK_COUNTS = Object.keys(RANK).length;

const SAID = {
  loading: "Loading the model",
  serving: "Serving",
  reforming: "A process was lost: the world of ranks is formed anew, and requests go on after it",
  draining: "Shutting down: what runs is finished, nothing new is taken",
  failed: "The engine has failed",
};

const $ = (id) => document.getElementById(id);
const body = document.body;
const requests = new Growth(MEAN_S);
const cache = new Growth(MEAN_S);
const uses = new Growth(MEAN_S);
const rows = new Growth(MEAN_S);
const histories = Object.fromEntries(
  ["generation", "prompt", "request", "queue", "kv", "hit", "tier", "stall"].map((name) => [name, new History(HISTORY_S)]),
);
const map = new HeatMap($("map"), $("map-readout"), $("map-said"));

let answeredS = null;
let generation = null;
let latest = null;
// of the next poll; null while an answer is awaited
let timer = null;

const nowS = () => performance.now() / 1000;

// -- asking -------------------------------------------------------------------------------------------

async function ask() {
  const headers = {};
  const key = sessionStorage.getItem(KEY_NAME);
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch("dashboard/data", { headers, cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
  if (answer.status === 401) return null;
  if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  return answer.json();
}

async function poll() {
  timer = null;
  let data = null;
  let failure = null;
  try {
    data = await ask();
  } catch (error) {
    failure = error;
  }
  if (failure) showLost(failure);
  else if (data === null) showLocked();
  else take(data);
  timer = setTimeout(poll, document.hidden ? HIDDEN_POLL_MS : POLL_MS);
}

// Ask now, unless an answer is awaited.
function pollNow() {
  if (timer === null) return;
  clearTimeout(timer);
  poll();
}

function take(data) {
  answeredS = nowS();
  try {
    count(data);
    latest = data;
    $("key-form").hidden = true;
    showState(data.server);
    if (!document.hidden) show();
  } catch (error) {
    console.error(error);
    setState("broken", "This page could not show what the server told; reload it", "");
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY_NAME, $("key").value);
  $("key").value = "";
  pollNow();
});

// -- the state ----------------------------------------------------------------------------------------

function setState(state, text, age) {
  body.dataset.state = state;
  body.classList.toggle("is-stale", !["serving", "draining"].includes(state));
  put("banner-text", text);
  put("banner-age", age);
}

function showState(server) {
  const why = plain(server.why);
  const said = SAID[server.state] ?? plain(server.state);
  setState(server.state, why && server.state !== "serving" ? `${said} (${why})` : said, "");
  const mark = server.state === "serving" ? "" : `${plain(server.state)} \u00b7 `;
  const title = `${mark}${plain(server.model)} \u00b7 moe_serve`;
  if (document.title !== title) document.title = title;
}

function showLost(failure) {
  const why = plain(failure.message);
  const since = answeredS === null ? "" : ` for ${duration(nowS() - answeredS)}; the figures are the last it gave`;
  setState("lost", "No answer from the server", `${since} (${why})`.trim());
}

function showLocked() {
  setState("locked", "This server asks for a key", "");
  $("key-form").hidden = false;
}

// -- counting: on every answer, whether the page is seen or not -------------------------------------------

const sum = (counts) => Object.values(counts).reduce((all, count) => all + count, 0);

function usedShare(groups) {
  const blocks = groups.reduce((all, group) => all + group.num_blocks, 0);
  const unused = groups.reduce((all, group) => all + group.num_free + group.num_cached, 0);
  return blocks ? 1 - unused / blocks : null;
}

function count(data) {
  const [timeS, at] = [data.server.uptime_s, nowS()];
  if (generation !== data.server.generation) {
    [cache, uses, rows].forEach((growth) => growth.clear());
    generation = data.server.generation;
  }
  requests.push(timeS, [data.tokens.generation_total, data.tokens.prompt_total, sum(data.requests.finished), sum(data.requests.errors)]);
  histories.generation.push(at, [requests.latestPerS(REQUEST.generated)]);
  histories.prompt.push(at, [requests.latestPerS(REQUEST.prompt)]);
  histories.request.push(at, [requests.latestPerS(REQUEST.ended)]);
  histories.queue.push(at, [data.requests.num_running, data.requests.num_waiting]);
  histories.kv.push(at, [usedShare(data.kv)]);
  const counters = data.experts?.counters;
  const tiers = counters?.num_bytes;
  cache.push(timeS, [
    data.prefix.query_tokens, data.prefix.hit_tokens,
    ...(counters
      ? [counters.hits, counters.misses, counters.stall_s, counters.prefetch_useful, counters.prefetch_late,
         counters.prefetch_wasted, tiers.disk, tiers.host, tiers.link]
      : []),
  ]);
  if (data.experts) {
    uses.push(timeS, Float64Array.from(data.experts.uses.flat()));
    histories.hit.push(at, [share(cache.of(CACHE.hits), cache.of(CACHE.misses))]);
    histories.tier.push(at, [CACHE.disk, CACHE.host, CACHE.link].map((tier) => cache.latestPerS(tier)));
    histories.stall.push(at, [cache.latestPerS(CACHE.stall)]);
  }
  rows.push(timeS, data.ranks.flatMap((rank) => [rank.num_tokens, rank.rows_computed, rank.bytes_sent]));
}

// -- showing ------------------------------------------------------------------------------------------

function show() {
  if (!latest) return;
  showServer(latest);
  showRequests(latest);
  showKv(latest);
  showExperts(latest);
  showRanks(latest);
  showTotals(latest);
  drawCharts();
}

function showServer({ server }) {
  put("model", plain(server.model));
  $("model").title = plain(server.model);
  put("uptime", duration(server.uptime_s));
  put("generation", whole(server.generation));
  put("version", plain(server.version));
  put("numerics", plain(server.numerics_id) || NONE);
}

function showRequests(data) {
  put("generation-rate", number(requests.perS(REQUEST.generated)));
  put("prompt-rate", number(requests.perS(REQUEST.prompt)));
  put("request-rate", number(requests.perS(REQUEST.ended)));
  put("error-rate", number(requests.perS(REQUEST.errors)));
  put("running", whole(data.requests.num_running));
  put("waiting", whole(data.requests.num_waiting));
  put("queue-tokens", number(data.requests.queue_tokens));
  for (const name of ["ttft", "itl", "e2e"]) {
    put(`${name}-p50`, seconds(data.latency[name].p50_s));
    put(`${name}-p99`, seconds(data.latency[name].p99_s));
  }
}

function showKv(data) {
  const [queried, hit] = [cache.of(CACHE.queried), cache.of(CACHE.found)];
  put("prefix-share", percent(queried === null ? null : share(hit, queried - hit)));
  put("kv-share", percent(usedShare(data.kv)));
  if (!data.kv.length && data.server.state !== "serving") return;
  const items = data.kv.map((group) => {
    const used = group.num_blocks - group.num_free - group.num_cached;
    const bar = make("span", "bar", make("span"), make("span"));
    bar.setAttribute("aria-hidden", "true");
    bar.children[0].style.width = `${(100 * used) / Math.max(1, group.num_blocks)}%`;
    bar.children[1].style.width = `${(100 * group.num_cached) / Math.max(1, group.num_blocks)}%`;
    const item = make("li", "", make("span", "", plain(group.name)), bar, make("span", "", `${whole(used)} of ${whole(group.num_blocks)}`));
    item.title = `${whole(used)} used, ${whole(group.num_cached)} cached, ${whole(group.num_free)} free`;
    return item;
  });
  $("kv-groups").replaceChildren(...items);
}

function showExperts(data) {
  const experts = data.experts;
  // a world that is formed anew has none for a while: what was seen stays, dimmed
  if (!experts) {
    if (data.server.state === "serving") $("experts").hidden = $("tiers").hidden = true;
    return;
  }
  const isOffloaded = experts.resident.length > 0;
  $("experts").hidden = false;
  $("tiers").hidden = $("resident-legend").hidden = !isOffloaded;
  const over = uses.elapsedS ? `over the last ${Math.round(uses.elapsedS)} s` : "not yet counted";
  put("experts-note", `${whole(experts.layers.length)} layers of ${whole(experts.num_experts)} experts, ${over}`);
  map.show(experts, uses);
  showLayers();
  if (isOffloaded) showTiers();
}

function showLayers() {
  if (!$("layers").open || !latest?.experts) return;
  const lines = latest.experts.layers.map((_, row) => make("tr", "", ...map.summary(row).map((text) => make("td", "", text))));
  $("layer-rows").replaceChildren(...lines);
}

function showTiers() {
  put("hit-share", percent(share(cache.of(CACHE.hits), cache.of(CACHE.misses))));
  put("hit-rate", number(cache.perS(CACHE.hits)));
  put("miss-rate", number(cache.perS(CACHE.misses)));
  put("stall-share", percent(cache.perS(CACHE.stall)));
  const [useful, late, wasted] = [cache.of(CACHE.useful), cache.of(CACHE.late), cache.of(CACHE.wasted)];
  put("useful-share", percent(share(useful, late, wasted)));
  put("late-share", percent(share(late, useful, wasted)));
  put("wasted-share", percent(share(wasted, useful, late)));
  put("disk-rate", `${bytes(cache.perS(CACHE.disk))}/s`);
  put("host-rate", `${bytes(cache.perS(CACHE.host))}/s`);
  put("link-rate", `${bytes(cache.perS(CACHE.link))}/s`);
}

function showRanks(data) {
  if (!data.ranks.length) {
    if (data.server.state === "serving") $("ranks").hidden = true;
    return;
  }
  $("ranks").hidden = false;
  const computed = data.ranks.map((_, at) => rows.of(RANK_COUNTS * at + RANK.rows));
  const all = computed.reduce((sumSoFar, value) => sumSoFar + (value ?? 0), 0);
  put("imbalance", all ? number((Math.max(...computed) * computed.length) / all) : NONE);
  $("rank-rows").replaceChildren(...data.ranks.map((rank, at) => rankRow(rank, at, all ? computed[at] / all : null)));
}

function rankRow(rank, at, part) {
  const age = rank.heartbeat_age_s;
  const isSilent = !(age <= SILENT_AFTER_S);
  const first = RANK_COUNTS * at;
  const bar = make("span", "bar", make("span"));
  bar.children[0].style.width = `${100 * (part ?? 0)}%`;
  const row = make(
    "tr", "",
    make("td", "", whole(rank.rank)),
    make("td", isSilent || !rank.is_up ? "bad" : "good", !rank.is_up ? "down" : isSilent ? "silent" : "up"),
    make("td", isSilent ? "bad" : age > SLOW_AFTER_S ? "warn" : "", seconds(age)),
    make("td", "", number(rows.perS(first + RANK.tokens))),
    make("td", "", number(rows.perS(first + RANK.rows))),
    make("td", "", bar),
    make("td", "", `${bytes(rows.perS(first + RANK.sent))}/s`),
    make("td", "", bytes(rank.model_bytes)),
    make("td", "", bytes(rank.kv_bytes)),
    make("td", "", bytes(rank.peak_rss_bytes)),
    make("td", "", whole(rank.epoch)),
  );
  bar.title = percent(part);
  return row;
}

function showTotals(data) {
  const counters = data.experts?.resident.length ? data.experts.counters : null;
  const facts = [
    ["tokens generated", whole(data.tokens.generation_total)],
    ["tokens of prompts", whole(data.tokens.prompt_total)],
    ["open connections", whole(data.requests.open_connections)],
    ["begun again", whole(data.server.num_resubmitted)],
    ...Object.entries(data.requests.finished).map(([reason, times]) => [`ended: ${plain(reason)}`, whole(times)]),
    ...Object.entries(data.requests.errors).map(([status, times]) => [`HTTP ${plain(status)}`, whole(times)]),
  ];
  if (counters) {
    facts.push(["experts brought in", whole(counters.fetched)]);
    facts.push(["given up for others", whole(counters.evictions)]);
    facts.push(["computed where they lay", whole(counters.computed_on_cpu)]);
    facts.push(["waited for experts", seconds(counters.stall_s)]);
  }
  $("totals").replaceChildren(...facts.map(([name, text]) => make("div", "", make("dt", "", name), make("dd", "", text))));
}

function drawCharts() {
  const at = nowS();
  drawLines($("generation-chart"), histories.generation, at, ["--first"], number);
  drawLines($("prompt-chart"), histories.prompt, at, ["--first"], number);
  drawLines($("request-chart"), histories.request, at, ["--first"], number);
  drawLines($("queue-chart"), histories.queue, at, ["--first", "--second"], number, { least: 2 });
  drawLines($("kv-chart"), histories.kv, at, ["--first"], percent, { top: 1 });
  if ($("tiers").hidden) return;
  drawLines($("hit-chart"), histories.hit, at, ["--first"], percent, { top: 1 });
  drawLines($("tier-chart"), histories.tier, at, ["--first", "--second", "--third"], (value) => `${bytes(value)}/s`, { least: 1000 });
  drawLines($("stall-chart"), histories.stall, at, ["--first"], percent, { top: 1 });
}

function redraw() {
  if (!document.hidden) show();
}

document.addEventListener("visibilitychange", () => {
  redraw();
  if (!document.hidden) pollNow();
});
window.addEventListener("resize", redraw);
$("layers").addEventListener("toggle", showLayers);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  map.forgetColors();
  redraw();
});

poll();
