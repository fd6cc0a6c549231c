"""An engine's /metrics, scraped again and again -> what its publishers are told of its load, by data parallel rank.

    num_requests_running 3, num_requests_waiting 2    Feed(in_flight=5)
    20 requests have ended since the scrape before,   Served(prompt 1200, cached 800, prefill 0.031 s): their mean,
    with 24,000 prompt tokens, 8,000 computed,        once, without an id
    0.62 s of prefill

vLLM counts a request in these sums when it ends, in all of them at once. Its gauges are of its last step.
Source: vLLM 0.29, v1/metrics/loggers.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serve_app.events.discovery import CACHE_INFO
from serve_app.events.exposition import Sample, samples
from serve_app.events.publisher import Feed
from serve_app.types import Served

SCRAPE_S = 0.5

_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_USAGE = "vllm:kv_cache_usage_perc"
_CONNECTOR = "vllm:external_prefix_cache_queries_total"
_STARTED = "process_start_time_seconds"
_ENDED = "vllm:request_prefill_time_seconds_count"
_SUMS = (
    "vllm:request_prompt_tokens_sum",
    "vllm:request_prefill_kv_computed_tokens_sum",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
)
_WANTED = frozenset({_RUNNING, _WAITING, _USAGE, _CONNECTOR, _STARTED, CACHE_INFO, _ENDED, *_SUMS})


class Scraper:
    """Of one life of an engine.

    Args:
        ranks: whose load is told.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = ranks
        self._life: dict[str, object] = {}
        self._sums: dict[int, tuple[float, ...]] = {}

    def read(self, text: str) -> dict[int, Feed] | None:
        """Load by rank; a rank of which nothing is said is left out. None: this is another life of the engine.

        Args:
            text: of one scrape.

        Raises:
            ValueError: the text is not in Prometheus' format.
        """
        found = samples(text, _WANTED)
        if self._ranks and _RUNNING not in found:
            raise ValueError(f"no {_RUNNING}")
        if self._is_another_life(found):
            return None
        figures = {name: _by_rank(found.get(name, ())) for name in _WANTED - {_STARTED, CACHE_INFO}}
        return {
            rank: Feed(
                round(figures[_RUNNING][rank] + figures[_WAITING].get(rank, 0.0)),
                self._served(rank, figures),
                # Blocks that wait for what a connector loads into them are in use, and hold nothing yet.
                0.0 if figures[_CONNECTOR].get(rank) else figures[_USAGE].get(rank, 0.0),
                momentary=True,
            )
            for rank in self._ranks
            if rank in figures[_RUNNING]
        }

    def _is_another_life(self, found: Mapping[str, Sequence[Sample]]) -> bool:
        """The process has started at another time (of several API servers none tells), or its cache is another."""
        life: dict[str, object] = {
            name: sorted((sorted(sample.labels.items()), sample.value) for sample in found[name])
            for name in (_STARTED, CACHE_INFO)
            if name in found
        }
        known = self._life
        self._life = {**known, **life}
        return any(known.get(name, value) != value for name, value in life.items())

    def _served(self, rank: int, figures: Mapping[str, Mapping[int, float]]) -> list[Served]:
        """The mean of the requests that have ended since the scrape before."""
        if any(rank not in figures[name] for name in (_ENDED, *_SUMS)):
            return []
        now = figures[_ENDED][rank], *(figures[name][rank] for name in _SUMS)
        before = self._sums.get(rank)
        self._sums[rank] = now
        if before is None or now[0] <= before[0]:
            return []
        count, *sums = (one - other for one, other in zip(now, before, strict=True))
        prompt, computed, queued_s, prefill_s = (max(0.0, total / count) for total in sums)
        return [Served("", round(prompt), max(0, round(prompt - computed)), queued_s, prefill_s)]


def _by_rank(found: Sequence[Sample]) -> dict[int, float]:
    """NaN and infinity are no figures of an engine's."""
    return {
        int(engine): sample.value
        for sample in found
        if (engine := sample.labels.get("engine", "0")).isdecimal() and 0.0 <= sample.value < float("inf")
    }
