"""What an index is, whatever holds it. `tests/contract/` runs one behaviour suite over every implementation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from serve_app.types import BlockKeys, Domain, DomainId, Epoch, PodId, PodMatch, Tier, Trust


class IndexReader(Protocol):
    """Answers which pod holds how much of a prompt."""

    def match(
        self,
        keys: BlockKeys,
        pods: Iterable[PodId] | None = None,
        *,
        count_hits: bool = False,
        prompt_tokens: int | None = None,
    ) -> Mapping[PodId, PodMatch]:
        """The match of every live pod (or of the given ones), also of those that hold nothing.

        Args:
            keys: canonical keys of the prompt's full blocks, in order.
            pods: pods to answer for; None means all that are live. An unknown pod matches nothing.
            count_hits: also count blocks that are held beyond the first gap (`PodMatch.hit_blocks`); costs a pass.
            prompt_tokens: length of the whole prompt; None: it goes on behind the keys. An engine with several KV cache
                groups takes the longest prefix that ends before the prompt's last token, which may be no part of a
                longer one. Of others the whole of what they hold is told (accounting.py has what they take).
        """
        ...

    def trust(self, pod: PodId) -> Trust:
        """How far a match of this pod can be relied on. An unknown pod is stale."""
        ...


class IndexWriter(Protocol):
    """Takes the changes of domains. Changes of an epoch that is not the domain's current one are ignored."""

    def join(self, domain: Domain) -> None:
        """Register a domain, empty. A domain that was there with another epoch loses its blocks; with the same, it
        keeps them, and only its record changes.
        """
        ...

    def add(self, domain: DomainId, epoch: Epoch, tier: Tier, keys: BlockKeys) -> None: ...

    def remove(self, domain: DomainId, epoch: Epoch, tier: Tier, keys: BlockKeys) -> None: ...

    def clear(self, domain: DomainId, epoch: Epoch) -> None:
        """The domain holds nothing any more, but lives on."""
        ...

    def leave(self, domain: DomainId, epoch: Epoch) -> None:
        """The domain is gone, with its blocks."""
        ...
