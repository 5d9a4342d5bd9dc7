"""One line of figures on stderr every so many seconds in which something was served."""

from __future__ import annotations

import logging
import time

from moe_serve.server.messages import StatsReport

logger = logging.getLogger(__name__)


class StatsLine:
    """Logs what happened between two reports that are `interval_s` apart. No texts, no prompts."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last: StatsReport | None = None
        self._last_s = time.monotonic()

    def take(self, report: StatsReport) -> None:
        """Log a line, if it is time for one."""
        now_s = time.monotonic()
        taken_s = now_s - self._last_s
        if self._last is not None and taken_s < self._interval_s:
            return
        if self._last is not None:
            logger.info("%s", line_of(self._last, report, taken_s))
        self._last, self._last_s = report, now_s


def line_of(before: StatsReport, after: StatsReport, taken_s: float) -> str:
    """Return what happened within taken_s; a world formed in between began to count anew."""
    new, old = after.stats, before.stats
    is_anew = new.num_steps < old.num_steps

    def a_second(name: str) -> float:
        start = 0 if is_anew else getattr(old, name)
        return float((getattr(new, name) - start) / taken_s)

    num_blocks = sum(new.num_kv_blocks)
    in_use = num_blocks - sum(new.num_free_kv_blocks) - sum(new.num_cached_kv_blocks)
    parts = [
        f"prompt {a_second('num_prompt_tokens'):.1f} tok/s",
        f"output {a_second('num_generation_tokens'):.1f} tok/s",
        f"running {new.num_running}, waiting {new.num_waiting}",
        f"KV {100 * in_use / max(1, num_blocks):.1f} %",
        f"prefix hits {100 * new.prefix_hit_tokens / max(1, new.prefix_query_tokens):.1f} %",
    ]
    if new.num_preemptions:
        parts.append(f"preemptions {new.num_preemptions}")
    if new.experts:
        total = new.experts["total"]
        events = total["hits"] + total["misses"]
        parts.append(f"expert hits {100 * total['hits'] / max(1, events):.1f} %")
        parts.append(f"waited for experts {total['stall_s']:.1f} s")
    if new.rank_imbalance is not None:
        parts.append(f"imbalance {new.rank_imbalance:.2f}")
    return " | ".join(parts)
