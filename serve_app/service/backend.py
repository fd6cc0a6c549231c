"""What a ScoreService asks of each model. In this process it is a Decider; in Ray's graph, calls to its deployments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from serve_app.decider import Asked, Decider, Decision
from serve_app.errors import IndexUnavailable
from serve_app.index.connection import connect
from serve_app.index.description import ages_s, describe
from serve_app.index.holdings import HoldingsReader
from serve_app.index.keyspace import Keyspace
from serve_app.index.router_log import Kept, recent_receipts
from serve_app.indexer import Body
from serve_app.routing.choice import Cost
from serve_app.routing.receipts import Open
from serve_app.scoring import Strategy
from serve_app.service.discovery import Discovery
from serve_app.service.fleet import FleetView
from serve_app.service.views import Fleet
from serve_app.types import BlockKeys, Domain, Found, ModelId, PodId

STALE_MAX_S = 5.0
STRANGERS_MAX = 256
_ANY_NUMBER = 1 << 30  # of requests at a time: nobody says how many such a replica takes


class Backend(Protocol):
    """One model's index."""

    model: ModelId

    def knows(self, name: str) -> bool:
        """Whether requests for this model name go to it."""
        ...

    async def find(self, body: Body, pods: Sequence[PodId] | None, strategy: Strategy) -> Found:
        """See Indexer.find."""
        ...

    async def costs(self, found: Found) -> Mapping[PodId, Cost]:
        """What the request would cost at each pod that was looked up."""
        ...

    async def ages_s(self) -> Mapping[str, float]:
        """Pod -> seconds since it reported last."""
        ...

    async def describe(self) -> dict[str, Any]: ...

    async def receipts(self, count: int, after: str = "") -> Sequence[Kept]:
        """The last ones, or those that came after the one of this id; newest first. None while Redis is away."""
        ...

    def open_receipts(self, count: int) -> list[Open]:
        """Decisions of this process that no engine has told of, newest first."""
        ...

    async def fleet(self) -> Fleet: ...

    async def holders(self, keys: BlockKeys) -> list[list[PodId]]:
        """See Mirror.holders."""
        ...


class LocalBackend:
    """On a Decider of this process. Used on its event loop.

    Args:
        discovery: where replicas are; None: who publishes is there.
    """

    def __init__(self, decider: Decider, redis_url: str, discovery: Discovery | None = None) -> None:
        self.model = ModelId(decider.settings.model)
        self.decider = decider
        self._discovery = discovery
        self._redis = connect(redis_url, name="kvcache-receipts", slot_of=Keyspace(self.model).receipts)
        self._fleet: FleetView | None = None  # of the mirror that the decider has when somebody asks
        self.addresses: Mapping[PodId, str] = {}  # what `candidates` said last: the decider was told of these
        self._strangers: dict[PodId, None] = {}  # others that were named in questions, the latest first

    def knows(self, name: str) -> bool:
        if name == self.model:
            return True
        mirror = self.decider.mirror
        spec = mirror.spec() if mirror is not None else None
        if mirror is None or spec is None:
            return False
        if name in spec.served_names:
            return True
        domains = [domain for domain, _, _ in mirror.domains()]
        return any(
            name in domain.adapters or (domain.adapter_slots and _is_adapter(name, domain)) for domain in domains
        )

    async def find(self, body: Body, pods: Sequence[PodId] | None, strategy: Strategy) -> Found:
        return await self.decider.indexer().find(body, pods, strategy)

    async def costs(self, found: Found) -> Mapping[PodId, Cost]:
        return self.decider.costs(found)

    async def ages_s(self) -> Mapping[str, float]:
        return ages_s(self.decider.followed())

    async def describe(self) -> dict[str, Any]:
        return describe(self.decider.followed())

    async def receipts(self, count: int, after: str = "") -> Sequence[Kept]:
        return await recent_receipts(self._redis, self.model, count, after)

    def open_receipts(self, count: int) -> list[Open]:
        return self.decider.open_receipts(count)

    async def fleet(self) -> Fleet:
        if self._fleet is None:
            decider = self.decider
            self._fleet = FleetView(
                decider.followed(), HoldingsReader(self._redis, self.model), decider.standing, decider.loops
            )
        return await self._fleet.look()

    async def holders(self, keys: BlockKeys) -> list[list[PodId]]:
        return self.decider.followed().holders(keys)

    # -- choices --------------------------------------------------------------------------------------------------

    async def choose(self, asked: Asked, wanted: Sequence[PodId] | None) -> Decision:
        """Who is to get the request, booked.

        Args:
            wanted: replicas to choose from; None: all that are live.

        Raises:
            IndexUnavailable: no replica is live, and none was named.
        """
        candidates = self.candidates()
        names = list(dict.fromkeys(wanted)) if wanted else list(candidates)
        if wanted:
            self._meet(names)
        if not names:
            raise IndexUnavailable("no replica of the model has registered in Redis yet, and none was named")
        return await self.decider.decide(dict.fromkeys(names, _ANY_NUMBER), asked)

    def candidates(self) -> dict[PodId, str]:
        """Replicas that requests can be sent to -> host:port, or empty: its publisher does not say.

        Those that are live and, with a discovery, were found; and those that were found and do not publish.

        Raises:
            IndexUnavailable: it follows no index.
        """
        mirror = self.decider.followed()
        found = None if self._discovery is None else self._discovery.addresses
        live = {
            PodId(domain.replica or domain.pod): domain.address
            for domain, is_live, _ in mirror.domains()
            if domain.pod is not None and is_live and (found is None or domain.address in found)
        }
        for address in (found or frozenset()) - set(live.values()):
            live[PodId(address)] = address
        joined_or_left = live.keys() != self.addresses.keys()
        self.addresses = live
        if joined_or_left:
            self.decider.keep_only([*live, *self._strangers])
        return live

    def _meet(self, names: Sequence[PodId]) -> None:
        """Whoever is named is booked as if it were there; of those that nobody knows, the last `STRANGERS_MAX`."""
        strangers = [name for name in names if name not in self.addresses]
        self._strangers = dict.fromkeys(strangers) | self._strangers
        if len(self._strangers) > STRANGERS_MAX:
            self._strangers = dict.fromkeys(list(self._strangers)[: STRANGERS_MAX // 2])
            self.decider.keep_only([*self.addresses, *self._strangers])

    def ranks(self) -> Mapping[str, int]:
        """Of pods that are a data parallel rank."""
        domains = self.decider.followed().domains()
        return {str(d.pod): d.rank for d, _, _ in domains if d.pod is not None and d.rank is not None}

    def why_not_ready(self) -> str:
        """Empty: scores can be asked for."""
        mirror = self.decider.mirror
        if mirror is None or not mirror.wait_ready(0.0):
            return "the index is being loaded"
        try:
            self.decider.check_alive()
        except IndexUnavailable as error:
            return str(error)
        if mirror.stale_for_s() > STALE_MAX_S:
            return f"Redis has not answered for {mirror.stale_for_s():.0f} s"
        if mirror.spec() is None:
            return "no replica has registered in Redis yet"
        return "" if self.decider.tokenizer_is_there() else "the tokenizer is being loaded"


def _is_adapter(name: str, domain: Domain) -> bool:
    """Ray's way to name an adapter that is loaded at need: `base:adapter`."""
    return name.startswith(f"{domain.spec.model}:")
