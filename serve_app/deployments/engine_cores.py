"""What vLLM's AsyncLLM tells of its engine cores: there is one, or with internal data parallelism one for each rank.

Out, by the core's place in it: requests in flight, what has become of each, and what its cache is made of.
Source: vLLM 0.29, v1/engine/core_client.py (`DPLBAsyncMPClient`). It has no public way to a single core.
"""

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from cachetools import LRUCache
from vllm.v1.metrics.loggers import StatLoggerBase

from serve_app.events.publisher import SERVED_MAX
from serve_app.types import ID_MAX_CHARS, Progress, RequestTag, Served, request_tag, short_id

logger = logging.getLogger("ray.serve")


class EngineCores:
    """Args:
    client: the AsyncLLM.
    count: engine cores that it sends requests to.
    """

    def __init__(self, client: Any, count: int) -> None:
        self._client = client
        self._count = count
        self._stats = _CoreStats(count)
        self._watches = [RequestWatch() for _ in range(count)]
        self._over: list[deque[RequestTag]] = [deque(maxlen=SERVED_MAX) for _ in range(count)]
        manager = client.logger_manager
        if manager is not None:  # with `disable_log_stats` it is: then nothing is learned of served requests
            manager.stat_loggers.append(self._stats)

    def in_flight(self, place: int) -> int:
        """Requests that the core has accepted and not finished."""
        if self._count == 1:
            unfinished: int = self._client.output_processor.get_num_unfinished_requests()
            return unfinished
        core = self._client.engine_core
        count: int = core.engine_inflight[core.core_engines[place]]
        return count

    def take_ended(self, place: int) -> list[Served]:
        """Requests that the core has ended since the last call."""
        return self._stats.take(place)

    def progress(self, place: int) -> Progress:
        """What has become of the core's requests since the last call."""
        states: Mapping[str, Any] = self._client.output_processor.request_states
        if self._count > 1:
            core = self._client.engine_core
            own = core.core_engines[place]
            states = {name: state for name, state in states.items() if core.reqs_in_flight.get(name) == own}
        return self._watches[place].look(states, self._take_refused(place))

    def over(self, request_id: str) -> None:
        """The HTTP request of this id has ended, whether it has come to a core or not."""
        for over in self._over:
            over.append(request_tag(request_id))

    def _take_refused(self, place: int) -> list[RequestTag]:
        over = self._over[place]
        return [over.popleft() for _ in range(len(over))]

    def usage(self, place: int) -> float:
        """Part of the core's KV cache that requests hold, 0 to 1; 0 where blocks wait for what is loaded into them."""
        if self._client.vllm_config.kv_transfer_config is not None or not self.in_flight(place):
            return 0.0
        return self._stats.usage[place]

    async def cache(self, place: int) -> dict[str, Any]:
        """What the core's KVCacheReport says; nothing, if the engine has an extension of the user's own."""
        try:
            reports: list[dict[str, Any]] = await self._ask_workers(place, "kvcache_groups")
        except Exception:
            logger.warning("kvcache: the engine does not tell its KV cache groups; they are taken from its events")
            return {}
        return reports[0]

    async def _ask_workers(self, place: int, method: str) -> Any:
        if self._count == 1:
            return await self._client.collective_rpc(method)
        core = self._client.engine_core  # what is public asks all cores, and hands on what the first has answered
        return await core._call_utility_async("collective_rpc", method, None, (), {}, engine=core.core_engines[place])


class RequestWatch:
    """The requests of one core, as they were at the last look."""

    def __init__(self) -> None:
        self._tags: dict[str, RequestTag] = {}  # of those that are there, by vLLM's internal id
        self._prefilling: dict[RequestTag, bool] = {}  # of those that are there
        self._seen: LRUCache[RequestTag, None] = LRUCache(SERVED_MAX)

    def look(self, states: Mapping[str, Any], over: Iterable[RequestTag] = ()) -> Progress:
        """What has changed.

        Args:
            states: vLLM's `RequestState`s by internal id. A request of several prompts or answers has several.
            over: requests that have ended and may never have been among these.
        """
        before, now = self._prefilling, dict[RequestTag, bool]()
        tags = {name: self._tags.get(name) or request_tag(client_id(states[name].external_req_id)) for name in states}
        for name, tag in tags.items():
            now[tag] = now.get(tag, False) or bool(states[name].is_prefilling)
        self._tags, self._prefilling = tags, now
        accepted = now.keys() - before.keys()
        refused = {tag for tag in over if tag not in self._seen}
        self._seen.update(dict.fromkeys(accepted))
        return Progress(
            b"".join(accepted),
            b"".join(tag for tag, waits in now.items() if not waits and before.get(tag, True)),
            b"".join((before.keys() | refused) - now.keys()),
        )


def client_id(engine_id: str) -> str:
    """The x-request-id in vLLM's id of a request: `chatcmpl-ID`, `cmpl-ID-0`, `generate-tokens-ID`."""
    kind, _, own = engine_id.partition("-")
    if kind == "cmpl":
        return own.rpartition("-")[0]
    return own.removeprefix("tokens-") if kind == "generate" else own


def _short(engine_id: str) -> str:
    """vLLM's id of a request, around the client's: `chatcmpl-ID`, `cmpl-ID-0`."""
    if len(engine_id) <= ID_MAX_CHARS:
        return engine_id
    kind, _, own = engine_id.partition("-")
    if kind != "cmpl":
        return f"{kind[:ID_MAX_CHARS]}-{short_id(own)}"
    own, _, number = own.rpartition("-")
    return f"{kind}-{short_id(own)}-{number[:ID_MAX_CHARS]}"


class _CoreStats(StatLoggerBase):  # type: ignore[misc]  # vLLM is not followed by mypy
    """vLLM's stat logger interface: takes the figures of requests that have ended, and of the KV cache."""

    def __init__(self, count: int) -> None:  # vLLM makes none of these itself
        # While there is no publisher, nobody takes them.
        self._served: list[deque[Served]] = [deque(maxlen=SERVED_MAX) for _ in range(count)]
        self.usage = [0.0] * count

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        # The only core of a gang's replica has the gang's rank as its index.
        place = engine_idx if len(self._served) > 1 else 0
        served = self._served[place]
        if scheduler_stats is not None:
            self.usage[place] = scheduler_stats.kv_cache_usage
        for ended in iteration_stats.finished_requests if iteration_stats is not None else ():
            served.append(
                Served(
                    _short(ended.request_id or ""),
                    ended.num_prompt_tokens,
                    ended.num_cached_tokens,
                    ended.queued_time,
                    ended.prefill_time,
                )
            )

    def log_engine_initialized(self) -> None:
        pass

    def take(self, place: int) -> list[Served]:
        served = list(self._served[place])
        self._served[place].clear()
        return served
