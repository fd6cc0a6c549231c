"""The endpoint picker's chooser: endpoints are addresses of pods, and a pick is a choice of the score service."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence

from serve_app.decider import Asked
from serve_app.errors import PromptError
from serve_app.limits import parse
from serve_app.service.backend import LocalBackend
from serve_app.service.picking import Picked
from serve_app.service.questions import DoneFields
from serve_app.service.score_service import ScoreService
from serve_app.supervision import ErrorLog
from serve_app.types import PodId

_RANK_HEADER = "x-data-parallel-rank"  # vLLM reads it


class PodChooser:
    """An EndpointChooser. Used on one event loop.

    Args:
        model: whose pods Envoy's pool has.
        lease_s: how long a pick counts at its pod, if its stream is never seen to end.
    """

    def __init__(self, service: ScoreService, model: LocalBackend, lease_s: float, logger: logging.Logger) -> None:
        self._service = service
        self._model = model
        self._lease_s = lease_s
        self._turn = itertools.count()
        self._errors = ErrorLog("kvcache: a request could not be given an endpoint by what is cached", logger)

    async def pick(self, request_id: str, session: str, body: bytes | None, subset: Sequence[str] | None) -> Picked:
        try:
            return await self._pick(request_id, session, body, subset)
        except Exception as error:
            self._errors.failed(error)
            return self._in_turns(subset, "error")

    def first_token(self, request_id: str) -> None:
        self._service.report(DoneFields(request_id=request_id, event="first_token"))

    def ended(self, request_id: str, prompt_tokens: int | None, cached_tokens: int | None) -> None:
        self._service.report(
            DoneFields(request_id=request_id, prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
        )

    async def _pick(self, request_id: str, session: str, body: bytes | None, subset: Sequence[str] | None) -> Picked:
        addresses = self._candidates(subset)
        if not addresses:
            return self._in_turns(subset, "no_index")
        if body is None:
            first = addresses[self._model.decider.least_loaded(addresses)]
            return Picked([first, *(address for address in addresses.values() if address != first)], {}, "no_body")
        decision, pod = await self._service.decide(self._model, self._asked(request_id, session, body), list(addresses))
        rank = self._model.decider.ranks.rank(pod)
        headers = {} if rank is None else {_RANK_HEADER: str(rank)}
        return Picked([addresses[replica] for replica in decision.best], headers, decision.choice.reason)

    def _candidates(self, subset: Sequence[str] | None) -> dict[PodId, str]:
        """Replica -> address, of those that may be chosen and say where they are."""
        known = self._model.candidates()
        allowed = None if subset is None else set(subset)
        found = {
            replica: address
            for replica, address in known.items()
            if address and (allowed is None or address in allowed)
        }
        for address in (allowed or set()) - set(found.values()):  # nobody has published for it
            found[PodId(address)] = address
        return dict(sorted(found.items()))

    def _asked(self, request_id: str, session: str, body: bytes) -> Asked:
        try:
            parsed, why = parse(body, self._service.limits), "no_body"
        except PromptError as error:
            parsed, why = None, error.reason
        return Asked(request_id, request_id, session, parsed, why, self._lease_s)

    def _in_turns(self, subset: Sequence[str] | None, reason: str) -> Picked:
        """By nothing that is known of caches."""
        addresses = sorted(subset) if subset else sorted(_addresses(self._model))
        if not addresses:
            return Picked((), {}, reason)
        start = next(self._turn) % len(addresses)
        return Picked([*addresses[start:], *addresses[:start]], {}, reason)


def _addresses(model: LocalBackend) -> Mapping[str, None]:
    try:
        return dict.fromkeys(filter(None, model.candidates().values()))
    except Exception:
        return {}
