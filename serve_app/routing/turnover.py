"""How fast each pod's cache is turned over, beside the others': tokens computed there, the older the less.

A full cache evicts its least recently used blocks. Where little was computed lately these are old, and nobody misses
them; where much was, they may be wanted again. So new blocks belong where the turnover is low, and an idle fleet is
filled evenly, though one replica may hold a few tokens more of every prompt (a short system prompt):

    computed lately   a 8192, b 2048, c 0   ->   share   a 1.0, b 0.4, c 0.2

Every pod has `PRIOR_TOKENS` put in, so that the first prompt of an idle fleet says little.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serve_app.types import PodId

HALF_LIFE_S = 30.0
PRIOR_TOKENS = 2048
_REBASE_S = 20 * HALF_LIFE_S


class Turnover:
    """Forward decay (Cormode et al. 2009): what comes later weighs more, so that nothing has to be made less."""

    def __init__(self) -> None:
        self._weighed: dict[PodId, float] = {}
        self._since_s = 0.0  # weights are 1 here

    def add(self, pod: PodId, tokens: int, now_s: float) -> None:
        """`pod` gets `tokens` to compute."""
        self._rebase(now_s)
        self._weighed[pod] = self._weighed.get(pod, 0.0) + tokens * 2.0 ** ((now_s - self._since_s) / HALF_LIFE_S)

    def shares(self, pods: Sequence[PodId], now_s: float) -> dict[PodId, float]:
        """Turnover of each pod, of the highest among them; near 1 for all while little is computed anywhere."""
        self._rebase(now_s)
        prior = PRIOR_TOKENS * 2.0 ** ((now_s - self._since_s) / HALF_LIFE_S)
        lately = {pod: self._weighed.get(pod, 0.0) + prior for pod in pods}
        most = max(lately.values(), default=1.0)
        return {pod: tokens / most for pod, tokens in lately.items()}

    def _rebase(self, now_s: float) -> None:
        """Keep the weights small enough for a float."""
        if now_s - self._since_s > _REBASE_S:
            factor = 2.0 ** max((self._since_s - now_s) / HALF_LIFE_S, -1000.0)
            self._weighed = {pod: value * factor for pod, value in self._weighed.items()}
            self._since_s = now_s

    def keep_only(self, pods: Iterable[PodId]) -> None:
        for pod in self._weighed.keys() - set(pods):
            del self._weighed[pod]
