"""What a gateway's picker asks, and is told: which endpoint gets a request, and what has become of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol


class Picked(NamedTuple):
    """Who gets a request.

    endpoints: `host:port`, best first; the rest is whom to try when the best cannot be reached. Empty: none is known.
    headers: what to set on the request to the endpoint; names in lower case.
    reason: why the best is the best; the answer to the client names it.
    """

    endpoints: Sequence[str]
    headers: Mapping[str, str] = MappingProxyType({})
    reason: str = ""


class EndpointChooser(Protocol):
    """Used on one event loop. Every `pick` that has begun is followed by one `ended`, whatever happens."""

    async def pick(self, request_id: str, session: str, body: bytes | None, subset: Sequence[str] | None) -> Picked:
        """Never raises.

        Args:
            request_id: as the engine will have it (`x-request-id`).
            session: who is asking, if the client says so; empty: unknown.
            body: None: there is none that could be scored.
            subset: `host:port` of those that may be chosen; None: all.
        """
        ...

    def first_token(self, request_id: str) -> None:
        """The first bytes of a good answer have come."""
        ...

    def ended(self, request_id: str, prompt_tokens: int | None, cached_tokens: int | None) -> None:
        """The answer is complete, or will never be.

        Args:
            prompt_tokens: by the engine's `usage`; None: it has not said.
            cached_tokens: of these, how many it has not computed; None: it has not said.
        """
        ...
