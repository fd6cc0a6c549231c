"""`kvcache publish --server`: a vLLM server's publishers, from what the server says of itself, as long as this runs.

    wait for the server -> ask it (discovery.py) -> settings (plan.py) -> a publisher for each rank (child.py)
                 ^                                                          |  fed with its load (scraping.py)
                 '---- the server is gone, or has another life or model ----'  then they end: its pods leave

An engine that is away is never an error. What is wrong with the settings is one at the start; later, when a new life of
the engine contradicts them, it is logged, nothing is published, and the engine is asked again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

import msgspec

from serve_app.errors import ConfigError, EngineAway
from serve_app.events.child import KeptPublisher
from serve_app.events.discovery import EngineFacts, Models, discover, read_models
from serve_app.events.health import HealthServer, Pod, Snapshot
from serve_app.events.plan import Given, with_server
from serve_app.events.publisher import Feed, PublisherConfig
from serve_app.events.scraping import SCRAPE_S, Scraper
from serve_app.events.server import EngineServer

logger = logging.getLogger(__name__)

GONE_S = 1.5  # nobody has listened on its port for so long: its process is gone
SILENT_S = 30.0  # it has not answered for so long, for whatever reason
_SCRAPE_TIMEOUT_S = 5.0
_MODELS_S = 5.0  # LoRA adapters come and go while the engine runs
_PAUSE_S = 1.0
_SAY_AGAIN_S = 30.0


def run_sidecar(given: Given, url: str, api_key: str, listen: str, stop: threading.Event) -> None:
    """Until `stop` is set.

    Args:
        given: options of the operator.
        url: of the engine's server.
        api_key: for it; empty: none.
        listen: host:port of our own health server; empty: there is none.

    Raises:
        ConfigError: see Sidecar.run, EngineServer and HealthServer.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every scrape
    given.check(discovers=True)
    server = EngineServer(url, api_key)
    sidecar = Sidecar(given, server)
    health = HealthServer(listen, lambda: sidecar.snapshot) if listen else None
    if health is not None:
        logger.info("health and metrics on port %d: /healthz /readyz /metrics", health.port)
    try:
        sidecar.run(stop)
    finally:
        server.close()
        if health is not None:
            health.close()


class Sidecar:
    """Used by one thread; `snapshot` may be read by others.

    Args:
        given: options of the operator.
        server: of the engine.
    """

    def __init__(self, given: Given, server: EngineServer) -> None:
        self._given = given
        self._server = server
        self._publishers: list[KeptPublisher] = []
        self._lives = 0  # of the engine
        self._up = False
        self._waiting_for = f"the engine at {server.url}"
        self._scrapes: Counter[str] = Counter()  # by result
        self._say_at_s: dict[str, float] = {}
        self._waiting_since_s: float | None = None
        self.snapshot = self._look()

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set.

        Raises:
            ConfigError: the server that is there at first is no vLLM server, or contradicts what was given.
        """
        while not stop.is_set():
            try:
                facts = discover(self._server, self._given.model)
                configs = with_server(self._given, self._server, facts)
            except EngineAway as error:
                self._wait(f"the engine at {self._server.url}: {error}", stop)
            except ConfigError as error:
                if not self._lives:
                    raise
                self._wait(f"an engine that can be published: {error}", stop)
            else:
                self._say_at_s, self._waiting_since_s = {}, None
                self._publish(facts, configs, stop)

    def _wait(self, what: str, stop: threading.Event) -> None:
        """Say what is waited for, now and then, and wait a moment."""
        self._waiting_for = what
        self.snapshot = self._look()
        now_s = time.monotonic()
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s
        if now_s >= self._say_at_s.get(what, 0.0):
            self._say_at_s = {what: now_s + _SAY_AGAIN_S}
            logger.info("waiting for %s (for %.0f s)", what, now_s - self._waiting_since_s)
        stop.wait(_PAUSE_S)

    def _publish(self, facts: EngineFacts, configs: Sequence[PublisherConfig], stop: threading.Event) -> None:
        """One life of the engine."""
        self._lives += 1
        self._up = True
        cache = facts.cache
        for config in configs:
            logger.info(
                "publishing %s as %s: vLLM %s, events of %s, replay %s, block size %s, %s blocks, tokenizer %s",
                *(config.model, config.pod, facts.version or "?", config.endpoint),
                *(config.replay_endpoint or "none", config.block_size or "?", config.capacity or "?", config.tokenizer),
            )
        self._publishers = [KeptPublisher(config, reports=True) for config in configs]
        ranks = [facts.ranks[0] if config.rank is None else config.rank for config in configs]
        life = _Life(self._server, facts.models, Scraper(ranks if cache is not None else ()), self._scrapes)
        try:
            while not stop.is_set() and not (why := life.over()):
                self._turn(ranks, life)
                stop.wait(SCRAPE_S)
            if not stop.is_set():
                logger.warning("%s: %s; its pods leave", self._server.url, why)
                self._waiting_for = f"the engine at {self._server.url}: {why}"
        finally:
            self._up = False
            for publisher in self._publishers:
                if publisher.child is not None:
                    publisher.child.close()
            for publisher in self._publishers:
                publisher.end()
            self._publishers = []
            self.snapshot = self._look()

    def _turn(self, ranks: Sequence[int], life: _Life) -> None:
        feeds = life.scrape()
        for rank, publisher in zip(ranks, self._publishers, strict=True):
            if publisher.keep():
                life.told.pop(rank, None)
            child, feed = publisher.child, feeds.get(rank)
            if child is None:
                continue
            child.read_reports()
            if feed is not None:
                news = life.adapters if life.told.get(rank) != life.adapters else None
                if child.feed(msgspec.structs.replace(feed, adapters=news)):
                    life.told[rank] = life.adapters
        self.snapshot = self._look()

    def _look(self) -> Snapshot:
        return Snapshot(
            turned_at_s=time.monotonic(),
            up=self._up,
            waiting_for="" if self._up else self._waiting_for,
            lives=self._lives,
            scrapes=dict(self._scrapes),
            pods=tuple(
                Pod(each.config.pod, each.child.report if each.child else None, each.heard_at_s)
                for each in self._publishers
            ),
        )


class _Life:
    """One life of an engine, as its server shows it.

    Args:
        server: is asked.
        models: that it has listed.
        scraper: of its metrics.
        scrapes: where they are counted, by result.
    """

    def __init__(self, server: EngineServer, models: Models, scraper: Scraper, scrapes: Counter[str]) -> None:
        self._server, self._models, self._scraper, self._scrapes = server, models, scraper, scrapes
        self.told: dict[int, tuple[str, ...]] = {}  # rank -> adapters that its publisher knows of
        self._ended = ""
        self._answered_at_s = self._models_at_s = time.monotonic()
        self._refused_since_s: float | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._models.adapters

    def over(self) -> str:
        """Why it has come to its end; empty: it has not."""
        now_s = time.monotonic()
        if not self._ended and now_s >= self._models_at_s + _MODELS_S:
            self._models_at_s = now_s
            self._look_at_models()
        if not self._ended and self._refused_since_s is not None and now_s >= self._refused_since_s + GONE_S:
            self._ended = "it is gone"
        if not self._ended and now_s >= self._answered_at_s + SILENT_S:
            self._ended = f"it has not answered for {SILENT_S:.0f} s"
        return self._ended

    def scrape(self) -> dict[int, Feed]:
        """Load by rank. What fails is counted, and is nothing else yet."""
        try:
            answer = self._server.get("/metrics", _SCRAPE_TIMEOUT_S)
            feeds = self._scraper.read(answer.body.decode("utf-8", "replace")) if answer.ok else {}
        except EngineAway as error:
            self._failed("refused" if error.refused else "no_answer")
            if not error.refused:
                self._refused_since_s = None
            elif self._refused_since_s is None:
                self._refused_since_s = time.monotonic()
            return {}
        except ValueError:
            self._failed("not_understood")
            feeds = {}
        else:
            if answer.ok:
                self._scrapes["ok"] += 1
            else:
                self._failed("status")
        self._answered_at_s, self._refused_since_s = time.monotonic(), None
        if feeds is None:
            self._ended = "it has begun another life"
        return feeds or {}

    def _failed(self, reason: str) -> None:
        self._scrapes[reason] += 1
        if self._scrapes[reason] == 1:
            logger.warning(
                "%s/metrics cannot be scraped (%s); the load is not known meanwhile", self._server.url, reason
            )

    def _look_at_models(self) -> None:
        try:
            models = read_models(self._server)
        except EngineAway:
            return  # the scrapes will tell
        except ConfigError as error:
            self._ended = str(error)
            return
        before, self._models = self._models, models
        if (models.names, models.root) != (before.names, before.root):
            self._ended = f"it serves {', '.join(models.names)} of {models.root} now"
