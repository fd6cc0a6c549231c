"""One router's choice of a pod: puts costs, ledger, loads and learned rates together.

    choose(pods, what was found)  ->  all pods, best first, with the cost of each
    sent(...)                     ->  the first of them got the request; it counts there until the pod has it

Used on one event loop. What the pods report comes in between, through `loaded`, `served` and `routed`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from serve_app.blocks import KEY_BYTES
from serve_app.routing.adapters import Adapters
from serve_app.routing.baselines import SessionRing, Turns, by_load
from serve_app.routing.choice import Choice, Cost, Outcome, Policy
from serve_app.routing.costs import CostWeights, cost, tokens_to_compute
from serve_app.routing.homes import Homes
from serve_app.routing.imbalance import imbalance
from serve_app.routing.in_flight import InFlight
from serve_app.routing.learning import PrefillRates
from serve_app.routing.ledger import Entry, Held, Ledger
from serve_app.routing.suspicion import suspicion
from serve_app.routing.turnover import Turnover
from serve_app.scoring import Strategy, score_all
from serve_app.types import BlockKeys, Found, PodId, PodLoad, PodMatch, Progress, RequestTag, Routed, Served

LEASE_MAX_S = 3600.0
SETTLE_S = 0.005  # the ledger is compared with the index at most this often

_NOTHING = PodMatch()
_NOBODY: Mapping[PodId, float] = MappingProxyType({})


class Sent(NamedTuple):
    """A request that counts at a pod."""

    pod: PodId
    entries: Sequence[Entry]
    tag: RequestTag = b""


class Chooser:
    """Args:
    held: asks the index which pods hold a block; closes the ledger's entries.
    """

    def __init__(
        self,
        held: Held,
        policy: Policy = Policy.KV_AWARE,
        strategy: Strategy = Strategy.EXPECTED_TTFT,
        weights: CostWeights | None = None,
    ) -> None:
        self.policy = policy
        self.strategy = strategy
        self.weights = weights or CostWeights()
        self.in_flight = InFlight()
        self.ledger = Ledger()
        self.rates = PrefillRates()
        self.turnover = Turnover()
        self.adapters = Adapters(self.weights.adapter_load_s)
        self._held = held
        self._homes = Homes()
        self._turns = Turns()
        self._ring = SessionRing()
        self._settle_at_s = 0.0
        self._with_room: set[PodId] = set()  # whose cache is not full

    # -- the choice -----------------------------------------------------------------------------------------------

    def choose(
        self,
        pods: Sequence[PodId],
        found: Found | None,
        now_s: float,
        *,
        why: str = "",
        session: str = "",
        model: str = "",
    ) -> Choice:
        """Rank `pods`.

        Args:
            pods: candidates, in a stable order.
            found: the request's prompts and matches; None if they could not be had.
            why: why they could not, or why they are of a part of the prompt only; the decision's reason.
            session: what the client calls its session; used when there is nothing better.
            model: that the request names: the base, or a LoRA adapter.
        """
        if not self.adapters.knows(model):
            return self._choose(pods, found, now_s, why, session, _NOBODY)
        lacks = self.adapters.cost_s(model, pods, now_s)
        choice = replace(self._choose(pods, found, now_s, why, session, lacks), adapter=model)
        if choice.costs:
            return choice
        # What does not rest on costs: the same order, of those first that have it, or can get it.
        return replace(choice, ranked=sorted(choice.ranked, key=lambda pod: lacks.get(pod, 0.0)))

    def _choose(
        self,
        pods: Sequence[PodId],
        found: Found | None,
        now_s: float,
        why: str,
        session: str,
        lacks: Mapping[PodId, float],
    ) -> Choice:
        turn = self._turns.order(pods)
        if self.policy is Policy.ROUND_ROBIN:
            return Choice(sorted(pods, key=turn.__getitem__), Outcome.BASELINE, self.policy.value)
        loads = self.in_flight.counts(pods, now_s)
        if self.policy is Policy.LEAST_LOADED:
            return Choice(by_load(pods, loads, turn), Outcome.BASELINE, self.policy.value, loads=loads)
        if self.policy is Policy.SESSION:
            return Choice(
                self._by_session(session, pods, loads, turn), Outcome.BASELINE, self.policy.value, loads=loads
            )
        if found is None:
            return Choice(self._by_session(session, pods, loads, turn), Outcome.FALLBACK, why, loads=loads)
        if self.strategy is Strategy.EXPECTED_TTFT:
            return self._by_cost(pods, found, loads, turn, now_s, why, lacks)
        return self._by_score(pods, found, loads, turn, why)

    def expected(self, pods: Sequence[PodId], found: Found, now_s: float) -> dict[PodId, Cost]:
        """What the request would cost at each pod now."""
        loads = self.in_flight.counts(pods, now_s)
        return {pod: terms for pod, (terms, _) in self._costs(pods, found, loads, now_s).items()}

    def _by_session(
        self, session: str, pods: Sequence[PodId], loads: Mapping[PodId, int], turn: Mapping[PodId, int]
    ) -> list[PodId]:
        return self._ring.order(session, pods, loads) if session else by_load(pods, loads, turn)

    def _by_score(
        self, pods: Sequence[PodId], found: Found, loads: Mapping[PodId, int], turn: Mapping[PodId, int], why: str
    ) -> Choice:
        scores = {**dict.fromkeys(pods, 0.0), **score_all(found, self.strategy)}
        ranked = sorted(pods, key=lambda pod: (-scores[pod], loads[pod], turn[pod]))
        if ranked and scores[ranked[0]] > 0:
            return Choice(ranked, Outcome.HIT, why or "prefix", loads=loads)
        return Choice(ranked, Outcome.MISS, why or "no_prefix", loads=loads)

    def _by_cost(
        self,
        pods: Sequence[PodId],
        found: Found,
        loads: Mapping[PodId, int],
        turn: Mapping[PodId, int],
        now_s: float,
        why: str,
        lacks: Mapping[PodId, float],
    ) -> Choice:
        costs = self._costs(pods, found, loads, now_s, lacks)
        totals = {pod: terms.total_s for pod, (terms, _) in costs.items()}
        prompt_tokens = found.prompt_tokens
        held = {pod: prompt_tokens - compute for pod, (_, compute) in costs.items()}
        most = max(held.values(), default=0)
        ranked = sorted(pods, key=lambda pod: (totals[pod], turn[pod]))
        home = self._home(found, most)
        least = min(totals.values(), default=0.0)
        if home in totals and totals[home] <= least + found.block_size * self.rates.s_per_token(home):
            ranked.remove(home)
            ranked.insert(0, home)
        if most < found.block_size:
            outcome, reason = Outcome.MISS, "no_prefix"
        else:
            own = held[ranked[0]]
            outcome = Outcome.HIT if own >= found.block_size else Outcome.MISS
            reason = "prefix" if own > most - found.block_size else "balance"  # another one holds more, but is busy
        return Choice(ranked, outcome, why or reason, {pod: terms for pod, (terms, _) in costs.items()}, held, loads)

    def _home(self, found: Found, held_tokens: int) -> PodId | None:
        """Who got the conversation's last request."""
        if len(found.prompts) != 1:
            return None
        return self._homes.find(found.prompts[0].keys, -(-held_tokens // found.block_size))

    def _costs(
        self,
        pods: Sequence[PodId],
        found: Found,
        loads: Mapping[PodId, int],
        now_s: float,
        lacks: Mapping[PodId, float] = _NOBODY,
    ) -> dict[PodId, tuple[Cost, int]]:
        """Cost at each pod, and the tokens that it would have to compute."""
        if now_s >= self._settle_at_s:
            self._settle_at_s = now_s + SETTLE_S
            self.ledger.settle(self._held, now_s)
        size = found.block_size
        totals: dict[PodId, tuple[Cost, int]] = {}
        turnover = self.turnover.shares(pods, now_s)
        uneven = imbalance(loads)
        reports = self.in_flight.reports(pods, now_s)
        queued = self._queued_tokens(pods, reports)
        suspects = self._suspects(pods, now_s)
        s_per_token, weights = self.rates.s_per_token, self.weights
        for i, (prompt, matches) in enumerate(zip(found.prompts, found.matches, strict=True)):
            # Most pods of a large fleet hold nothing of a prompt: what is the same for them is done once.
            held = {pod: match for pod, match in matches.items() if match.tokens and pod in loads}
            blocks = {pod: match.total_tokens // size for pod, match in held.items()}
            soon = self.ledger.speculative_blocks(prompt.keys, blocks, now_s)
            compute = dict.fromkeys(pods, tokens_to_compute(prompt.token_count, _NOTHING, 0))
            for pod in held.keys() | (soon.keys() & loads.keys()):
                soon_tokens = soon.get(pod, 0) * size
                compute[pod] = tokens_to_compute(prompt.token_count, held.get(pod, _NOTHING), soon_tokens)
            evicted = self._evicted_tokens(min(compute.values(), default=0), size, queued, reports)
            for pod in pods:
                terms = cost(
                    compute[pod],
                    held.get(pod, _NOTHING),
                    0 if i else queued[pod],  # what is there already counts once
                    0 if i else loads[pod],
                    0.0 if i else uneven[pod],
                    s_per_token(pod),
                    turnover[pod],
                    evicted.get(pod, 0),
                    weights,
                )
                if not i and (pod in suspects or pod in lacks):
                    terms = terms._replace(suspect_s=suspects.get(pod, 0.0), adapter_s=lacks.get(pod, 0.0))
                one = terms, compute[pod]
                totals[pod] = one if not i else _sum(totals[pod], one)
        return totals

    def _queued_tokens(self, pods: Sequence[PodId], reports: Mapping[PodId, PodLoad]) -> dict[PodId, float]:
        """Prefill that each has not done yet. Of one that reports nothing it may be done: no more than is usual."""
        queued = self.ledger.queued(pods)
        if reports and len(reports) < len(pods):
            usual = statistics.median([queued[pod] for pod in reports])
            for pod in pods:
                if queued[pod] > usual and pod not in reports:
                    queued[pod] = usual
        return queued

    def _suspects(self, pods: Sequence[PodId], now_s: float) -> dict[PodId, float]:
        of_tokens, of_reports = self.ledger.overdue_s(now_s), self.in_flight.overdue_s(now_s)
        if not of_tokens and not of_reports:
            return {}
        late = {pod: max(of_tokens.get(pod, 0.0), of_reports.get(pod, 0.0)) for pod in pods}
        return suspicion({pod: late_s for pod, late_s in late.items() if late_s}, len(pods))

    def _evicted_tokens(
        self, new_tokens: int, block_size: int, queued: Mapping[PodId, float], reports: Mapping[PodId, PodLoad]
    ) -> Mapping[PodId, float]:
        """Of tokens that no pod holds: for how many each must push out others, beyond the pod with most room."""
        if not self._with_room:
            return {}
        room = dict.fromkeys(queued, 0.0)
        for pod, report in reports.items():
            left = report.unused_blocks * block_size - queued[pod]
            if left > 0:
                room[pod] = left if left < new_tokens else new_tokens
        most = max(room.values(), default=0)
        return {pod: most - left for pod, left in room.items() if left < most}

    # -- what became of it ----------------------------------------------------------------------------------------

    def sent(self, pod: PodId, found: Found | None, choice: Choice, now_s: float, tag: RequestTag = b"") -> Sent:
        """`pod` gets the request.

        Args:
            tag: what the pod will call it when it tells of it; empty: it will not.
        """
        self.in_flight.sent(pod, now_s, tag)
        self._turns.sent(pod)
        self.adapters.sent(choice.adapter, pod, now_s)
        if found is None or not choice.costs:
            return Sent(pod, (), tag)
        expected_s = choice.costs[pod].ttft_s if pod in choice.costs else 0.0
        left = max(found.prompt_tokens - choice.held_tokens.get(pod, 0), 1)
        self.turnover.add(pod, left, now_s)
        entries = []
        for i, (prompt, matches) in enumerate(zip(found.prompts, found.matches, strict=True), 1):
            own = max(prompt.token_count - matches.get(pod, _NOTHING).total_tokens, 0)
            compute = left if i == len(found.prompts) else min(own, left)
            left -= compute
            entries.append(
                self.ledger.sent(
                    pod, prompt.keys, compute, now_s, complete=prompt.complete, tag=tag, expected_s=expected_s
                )
            )
            self._homes.sent(pod, prompt.keys)
        return Sent(pod, entries, tag)

    def had_turn(self, pod: PodId) -> None:
        """`pod` gets what costs it nothing; among equals it comes last now."""
        self._turns.sent(pod)

    def route(self, sent: Sent, found: Found) -> list[Routed]:
        """What other routers must know of it: of every prompt, the blocks that the pod does not hold yet."""
        if not sent.entries:
            return []
        routes = []
        for entry, matches in zip(sent.entries, found.matches, strict=True):
            held = matches.get(sent.pod, _NOTHING).total_tokens // found.block_size
            routes.append(Routed(sent.pod, entry.keys[held * KEY_BYTES :], entry.tokens, tag=sent.tag))
        return [route for route in routes if route.keys or route.tokens]

    def withdraw(self, sent: Sent) -> None:
        """It was not sent there after all."""
        self.in_flight.withdrawn(sent.pod, sent.tag)
        for entry in sent.entries:
            self.ledger.withdraw(entry)
            self.turnover.withdraw(entry.pod, entry.tokens, entry.sent_at_s)

    def routed(
        self, pod: PodId, keys: BlockKeys, tokens: int, now_s: float, tag: RequestTag = b"", lease_s: float = 0.0
    ) -> None:
        """Another router has sent a request there.

        Args:
            lease_s: so long it counts, unless that router tells of its end; 0: the pod tells of it.
        """
        self.in_flight.sent(pod, now_s, tag)
        if lease_s > 0:
            self.in_flight.lease(pod, tag, now_s + min(lease_s, LEASE_MAX_S))
        self._turns.sent(pod)
        expected_s = (self.ledger.queued_tokens(pod) + tokens) * self.rates.s_per_token(pod)
        self.ledger.sent(pod, keys, tokens, now_s, tag=tag, expected_s=expected_s)
        self._homes.sent(pod, keys)
        self.turnover.add(pod, tokens, now_s)

    def progress(self, pod: PodId, progress: Progress) -> None:
        """A pod has said what became of requests."""
        self.in_flight.progress(pod, progress)
        self.ledger.progress(pod, progress)

    def loaded(self, pod: PodId, load: PodLoad) -> None:
        """A pod has said how many requests it has."""
        if self.in_flight.reported(pod, load):
            (self._with_room.add if load.unused_blocks else self._with_room.discard)(pod)
            self.ledger.reported(pod, load)

    def served(self, pod: PodId, requests: Sequence[Served]) -> None:
        """A pod has answered requests."""
        self.rates.observe(pod, requests)

    def keep_only(self, pods: Sequence[PodId]) -> None:
        """These pods are there; others are gone."""
        self.in_flight.keep_only(pods)
        self.ledger.keep_only(pods)
        self.rates.keep_only(pods)
        self.turnover.keep_only(pods)
        self._turns.keep_only(pods)
        self._with_room &= set(pods)


def _sum(one: tuple[Cost, int], other: tuple[Cost, int]) -> tuple[Cost, int]:
    terms = Cost(*(a + b for a, b in zip(one[0], other[0], strict=True)))
    return terms, one[1] + other[1]
