"""The router of one process: it follows the index, decides who gets a request, and books what it has decided.

    decide(replicas, what was asked)  ->  replicas, best first; where they have data parallel ranks, which rank of each
    taken(...)                        ->  who has taken the request in the end, if somebody tells

It knows nothing of how requests come in. That is up to the shells around it: `deployments/request_router.py` (Serve
asks), `deployments/ingress_router.py` (HAProxy asks), and `service/` (whoever Ray does not manage asks). A decision
never raises and never waits long: whatever is missing, the request goes to the least-loaded replica, and the decision
is counted under the reason.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
from cachetools import LRUCache

from serve_app.accounting import reads_cache
from serve_app.config import MATCHED_HEADER, REASON_HEADER, DecisionSettings
from serve_app.errors import IndexUnavailable, PromptError
from serve_app.index.mirror import Mirror
from serve_app.index.router_log import RouterLog
from serve_app.indexer import Indexer, IndexStage, LocalIndex, PromptStage
from serve_app.limits import check_prompts
from serve_app.loop_watch import LoopWatch
from serve_app.metrics import IndexMetrics, Instruments, RouterMetrics
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.service import PromptService, Tokenize
from serve_app.routing.choice import Choice, Cost, Outcome, Policy
from serve_app.routing.chooser import Chooser, Sent
from serve_app.routing.desk import Desk, Standing
from serve_app.routing.ranks import Ranks
from serve_app.routing.receipts import Open, last_expected, receipt, trail
from serve_app.supervision import Backoff, ErrorLog, LoopGuard
from serve_app.types import BlockKeys, Found, ModelId, PodId, Progress, Served, Tier, request_tag, short_id

_CATCH_UP_S = 0.25  # without a decision; with each it is done anyway
_REMEMBERED_DECISIONS = 1024  # until somebody says who took the request; with direct streaming nobody does


class Asked(NamedTuple):
    """A request, as the way in knows it."""

    request_id: str  # a client may give several requests the same
    key: str = ""  # the same when it is asked again of the same request; empty: it is asked once; with a lease, its id
    session: str = ""
    body: Mapping[str, Any] | None = None  # parsed; None: there is none that can be read
    why_no_body: str = "no_body"  # reason of the decision then
    lease_s: float = 0.0  # so long it counts, unless who asks says that it has ended; 0: the replica will say that
    books: bool = True  # False: it is not sent there by this decision


class Decision(NamedTuple):
    """Who is to get a request."""

    best: Mapping[PodId, PodId]  # replica -> itself, or the best of its ranks; the best replica first
    choice: Choice
    found: Found | None

    def explained(self, replica: PodId) -> dict[str, str]:
        """For people, as headers of the answer, if this replica takes it."""
        matched = self.found.matched_tokens(self.best[replica]) if self.found is not None else {}
        return {MATCHED_HEADER: str(sum(matched.values())), REASON_HEADER: self.choice.reason}


class _Booked(NamedTuple):
    sent: Sent
    found: Found | None
    choice: Choice


class Host(Protocol):
    """What the process has that the decider is in. Asked when the decider starts, not before."""

    @property
    def logger(self) -> logging.Logger: ...

    def redis_url(self) -> str: ...

    def instruments(self) -> Instruments: ...

    def stages(self, mirror: Mirror) -> tuple[PromptStage, IndexStage]:
        """Of the read path; see `local_stages`."""
        ...


def local_stages(
    settings: DecisionSettings, mirror: Mirror, tokenize: Tokenize | None = None
) -> tuple[PromptService, LocalIndex]:
    """Both in this process; args as of PromptService."""
    store = PrefixStore(settings.prefix_store_bytes)
    return PromptService(store, tokenize, settings.tokenize_deadline_s), LocalIndex(mirror)


class Decider:
    """Args:
    settings: of the model's router.
    loop: that it is used on.
    """

    def __init__(self, settings: DecisionSettings, loop: asyncio.AbstractEventLoop, host: Host) -> None:
        self._loop = loop
        self._host = host
        self.settings = settings
        self.id = uuid.uuid4().hex[:12]
        self.chooser = Chooser(self._held, settings.policy, settings.strategy, settings.cost.weights())
        self.ranks = Ranks()
        self._records_as_of = -1  # joins and loads that the mirror had seen
        self._failures = ErrorLog(
            "kvcache: a request could not be scored; it goes to the least-loaded replica", host.logger
        )
        self._booked: LRUCache[str, _Booked] = LRUCache(_REMEMBERED_DECISIONS)  # by `Asked.key`
        self._started = False
        self._indexer: Indexer | None = None
        self.mirror: Mirror | None = None
        self._desk: Desk | None = None
        self._log: RouterLog | None = None
        self._metrics: RouterMetrics | None = None
        self._background: set[asyncio.Task[None]] = set()  # endless; the loop itself only has weak references
        self._loading: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow the index. What fails here is tried again with the next request."""
        if self._metrics is None:  # it has a thread of its own: one is enough, however often this is tried
            self._metrics = RouterMetrics(self._host.instruments())
        if self.settings.policy is not Policy.ROUND_ROBIN:
            self._follow_index()
        self._started = True

    async def close(self) -> None:
        for task in (*self._background, self._loading):
            if task is not None:
                task.cancel()
        for thread in (self.mirror, self._log):
            if thread is not None:
                await asyncio.to_thread(thread.close)

    def check_alive(self) -> None:
        """Raises:
        IndexUnavailable: what follows the index has ended, and will not come back by itself.
        """
        if self.mirror is not None and not self.mirror.is_running:
            raise IndexUnavailable("the thread that follows the index has ended")
        if any(task.done() for task in self._background):
            raise IndexUnavailable("the router's background task has ended")

    async def decide(self, room: Mapping[PodId, int], asked: Asked | None) -> Decision:
        """All replicas, best first; the first has the request booked.

        Args:
            room: replicas that there are -> requests that each may have at once.
            asked: None: nothing is known of the request.
        """
        try:
            choice, found = await self._decide(room, asked)
        except Exception as error:
            self._failures.failed(error)
            choice, found = self._least_loaded(self._pods(room)), None
        return Decision(self.ranks.best(choice.ranked), choice, found)

    def indexer(self) -> Indexer:
        """Raises:
        IndexUnavailable: it follows no index.
        """
        if self._indexer is None:
            raise IndexUnavailable(f"policy {self.settings.policy} asks no index")
        return self._indexer

    def followed(self) -> Mirror:
        """The index that it follows; raises as `indexer`."""
        self.indexer()
        assert self.mirror is not None
        return self.mirror

    def tokenizer_is_there(self) -> bool:
        return self._loading is None or self._loading.done()

    def costs(self, found: Found) -> Mapping[PodId, Cost]:
        """What a request would cost now at each pod that was looked up."""
        pods = list(found.matches[0]) if found.matches else []
        self._catch_up(pods)
        return self.chooser.expected(pods, found, time.monotonic())

    def consider(self, found: Found) -> tuple[Choice, Mapping[PodId, int]]:
        """What would be chosen now of the pods that were looked up, and the requests at each. Nothing is booked."""
        pods = sorted(found.matches[0]) if found.matches else []
        self._catch_up(pods)
        now_s = time.monotonic()
        choice = self.chooser.choose(pods, found, now_s, why=found.incomplete)
        return choice, choice.loads or self.chooser.in_flight.counts(pods, now_s)

    def standing(self, pods: Sequence[PodId]) -> Mapping[PodId, Standing]:
        """What each pod has to do, as a decision would see it now."""
        self._catch_up(pods)
        return self._desk.standing(pods, time.monotonic()) if self._desk is not None else {}

    def open_receipts(self, count: int) -> list[Open]:
        """Of the last decisions whose requests no engine has told of, newest first."""
        return self._desk.receipts.latest(count) if self._desk is not None else []

    def loops(self) -> dict[str, str]:
        """What runs in the background -> why it does not go well; empty: it does."""
        has_ended = any(task.done() for task in self._background)
        loops = {"router": "its background task has ended" if has_ended else ""}
        if self._log is not None:
            loops["receipts and routes"] = self._log.fault
        return loops

    def told(self, request_id: str, pod: PodId, served: Served | None = None, *, ended: bool) -> None:
        """Who asked for a decision with a lease says what has become of it: its first token is there, or it has ended.

        Args:
            served: the engine's own figures, if they are known.
        """
        tag = request_tag(request_id)
        if ended:
            self._booked.pop(request_id, None)
        progress = Progress(prefilled=tag, ended=tag if ended else b"")
        self.chooser.progress(pod, progress)
        if self._log is not None:
            self._log.told(pod, progress)
        if served is not None and self._desk is not None and self._log is not None and self._metrics is not None:
            for complete in self._desk.answered(pod, served):
                self._log.receipt(msgspec.json.encode(complete.receipt), *complete.trail)
                self._metrics.served(complete.receipt)

    def least_loaded(self, replicas: Iterable[PodId]) -> PodId:
        """Who gets what makes no tokens: it is nobody's load."""
        pods = self._pods(replicas)
        choice = self.chooser.choose(pods, None, time.monotonic())
        self.chooser.had_turn(choice.ranked[0])
        if self._metrics is not None:
            self._metrics.decided(Outcome.FALLBACK, "no_generation", 0.0)
        return next(iter(self.ranks.best(choice.ranked)))

    def failed(self, error: Exception) -> None:
        """Something around a decision has gone wrong: count and log it."""
        self._failures.failed(error)

    def taken(self, key: str, request_id: str, replica: PodId) -> PodId:
        """A replica has taken the request, maybe not the one that was the best. Returns it, or its rank."""
        booked = self._booked.pop(key, None)
        if booked is None:
            return replica
        pod = self.ranks.best(booked.choice.ranked).get(replica, replica)
        if booked.sent.pod != pod:
            self.chooser.withdraw(booked.sent)
            self.chooser.sent(pod, booked.found, booked.choice, time.monotonic(), booked.sent.tag)
            if self._desk is not None:
                self._desk.receipts.moved(short_id(request_id), pod)
        return pod

    def keep_only(self, replicas: Sequence[PodId]) -> None:
        """These replicas are there; others are gone."""
        self.ranks.keep_only(replicas)
        self._records_as_of = -1  # those of a new replica may have joined before it was told of
        pods = self._pods(replicas)
        self.chooser.keep_only(pods)
        if self._metrics is not None:
            self._metrics.keep_only(pods)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _follow_index(self) -> None:
        settings = self.settings
        redis_url, model = self._host.redis_url(), ModelId(settings.model)
        tiers = [Tier(tier) for tier in settings.tier_order]
        self.mirror = Mirror(redis_url, model, max_blocks=settings.max_blocks, tier_order=tiers, bury=True)
        self.mirror.start()
        self._index_metrics = IndexMetrics(self.mirror, self._host.instruments())
        self._desk = Desk(self.mirror, self.chooser, self.id)
        self._log = RouterLog(redis_url, model, self.id)
        self._log.start()
        self._background.add(self._loop.create_task(self._catch_up_when_idle()))
        prompts, index = self._host.stages(self.mirror)
        self._indexer = Indexer(prompts, index, settings.strategy)
        if isinstance(prompts, PromptService) and settings.policy is Policy.KV_AWARE:
            self._loading = self._loop.create_task(self._load_tokenizer(self.mirror, prompts))

    async def _decide(self, room: Mapping[PodId, int], asked: Asked | None) -> tuple[Choice, Found | None]:
        if not self._started:
            self.start()
        start_s = time.perf_counter()
        self._learn_records()
        pods = self._pods(room)
        found, why = await self._find(pods, asked)
        self._catch_up(pods)
        now_s = time.monotonic()
        session = short_id(asked.session) if asked is not None else ""
        model = self._adapter(asked)
        choice = self.chooser.choose(pods, found, now_s, why=why, session=session, model=model)
        choice = choice.with_last(self._full(room, choice.loads or self.chooser.in_flight.counts(pods, now_s)))
        if choice.ranked and (asked is None or asked.books):
            self._book(choice, found, asked, now_s, time.perf_counter() - start_s)
        return choice, found

    def _least_loaded(self, pods: Sequence[PodId]) -> Choice:
        """A choice that rests on nothing that is known of the request."""
        now_s = time.monotonic()
        choice = self.chooser.choose(pods, None, now_s, why="error")
        if self._metrics is not None:
            self._metrics.decided(Outcome.FALLBACK, "error", 0.0)
        if choice.ranked:
            self.chooser.sent(choice.ranked[0], None, choice, now_s)
        return choice

    async def _find(self, pods: list[PodId], asked: Asked | None) -> tuple[Found | None, str]:
        """What is known, or None and the reason why nothing is; also why it is of a part of the prompt only."""
        if self._indexer is None or self.settings.policy is not Policy.KV_AWARE:
            return None, ""
        if asked is None or asked.body is None:
            return None, "no_body" if asked is None else asked.why_no_body
        try:
            check_prompts(asked.body, self.settings.limits)
            async with asyncio.timeout(self.settings.decision_deadline_s):
                found = await self._indexer.find(asked.body, pods)
            return found if reads_cache(asked.body) else found.without_matches(), found.incomplete
        except PromptError as error:
            return None, error.reason
        except IndexUnavailable:
            return None, "no_index"
        except TimeoutError:
            return None, "deadline"
        except Exception as error:
            self._failures.failed(error)
            return None, "error"

    def _book(self, choice: Choice, found: Found | None, asked: Asked | None, now_s: float, decision_s: float) -> None:
        """The first of the ranked pods gets the request: note it where it counts."""
        assert self._metrics is not None
        pod = choice.ranked[0]
        before = self._booked.pop(asked.key, None) if asked is not None and asked.key else None
        if before is not None:  # Serve asks again when every replica was full
            self.chooser.withdraw(before.sent)
        tag = request_tag(asked.request_id) if asked is not None else b""
        sent = self.chooser.sent(pod, found, choice, now_s, tag)
        if asked is not None and asked.lease_s:
            self.chooser.in_flight.lease(pod, tag, now_s + asked.lease_s)
        if before is None:
            self._metrics.decided(choice.outcome, choice.reason, decision_s)
            if found is not None:
                self._metrics.found(found.prompt_tokens, found.matched_tokens(pod), found.stage_s)
        if asked is None or self._desk is None or self._log is None:
            return
        if asked.key:
            self._booked[asked.key] = _Booked(sent, found, choice)
        if found is not None and (before is None or before.sent.pod != pod):
            for route in self.chooser.route(sent, found):
                self._log.routed(route._replace(lease_s=asked.lease_s))
        if choice.outcome is not Outcome.BASELINE:
            new = receipt(short_id(asked.request_id), self.id, time.time(), decision_s, pod, choice, found)
            expected = last_expected(found, pod, choice)
            if oldest := self._desk.receipts.open(new, expected, trail(found), again=before is not None):
                self._log.receipt(msgspec.json.encode(oldest.receipt), *oldest.trail)

    def _adapter(self, asked: Asked | None) -> str:
        """The model that the request names, if it is not the base."""
        model = asked.body.get("model") if asked is not None and asked.body is not None else None
        spec = self.mirror.spec() if self.mirror is not None else None
        if not isinstance(model, str) or spec is None or model in (spec.model, *spec.served_names):
            return ""
        return model

    def _full(self, room: Mapping[PodId, int], loads: Mapping[PodId, int]) -> set[PodId]:
        """What is behind replicas that have as many requests as they may have."""
        full: set[PodId] = set()
        for replica, most in room.items():
            pods = self.ranks.pods(replica)
            if sum(loads.get(pod, 0) for pod in pods) >= most:  # a rank may have joined since the choice
                full.update(pods)
        return full

    def _pods(self, replicas: Iterable[PodId]) -> list[PodId]:
        """What can be chosen: replicas, or where they have any, their data parallel ranks."""
        return sorted(pod for replica in replicas for pod in self.ranks.pods(replica))

    def _learn_records(self) -> None:
        """Take in which pods are behind which replica, and what adapters they have, if a record has come since."""
        if self.mirror is None:
            return
        as_of = self.mirror.counters["join"] + self.mirror.counters["loads"]
        if as_of != self._records_as_of:
            domains = [domain for domain, _, _ in self.mirror.domains()]
            self.ranks.learn(domains)
            self.chooser.adapters.learn(domains)
            self._records_as_of = as_of

    def _held(self, pods: Sequence[PodId], keys: BlockKeys) -> list[bool]:
        return self.mirror.held(pods, keys) if self.mirror is not None else [False] * len(pods)

    def _catch_up(self, pods: Sequence[PodId]) -> None:
        if self._desk is None or self._log is None or self._metrics is None:
            return
        for complete in self._desk.catch_up(pods):
            self._log.receipt(msgspec.json.encode(complete.receipt), *complete.trail)
            self._metrics.served(complete.receipt)

    async def _catch_up_when_idle(self) -> None:
        assert self._metrics is not None
        self._metrics.watch(LoopWatch(self._host.logger))
        guard = LoopGuard("kvcache: the router could not take in what is new", Backoff(_CATCH_UP_S), self._host.logger)
        wait_s = _CATCH_UP_S
        while True:
            await asyncio.sleep(wait_s)
            wait_s = _CATCH_UP_S
            try:
                self._catch_up(())
                if self._desk is not None and self._log is not None:
                    self._log.distrust(self._desk.distrusted())
                guard.went_well()
            except Exception as error:  # whatever it is, the next turn may do without
                wait_s = guard.failed(error)

    async def _load_tokenizer(self, mirror: Mirror, prompts: PromptService) -> None:
        """Load the tokenizer as soon as an engine has said which, before the first request needs it."""
        while (spec := mirror.spec()) is None:  # noqa: ASYNC110  # it is a thread that sets it
            await asyncio.sleep(0.1)
        with contextlib.suppress(Exception):  # it has said why itself; a request tries again
            await prompts.encoder(spec)
