"""What a pod's prefill costs, learned from the requests that it has served.

    served: 4096 tokens computed in 0.31 s  ->  76 us a token
    lower quartile of the pod's last 64 of these, with 8 of the fleet's own value put in

The lower quartile, because a prefill that shares its steps with others takes longer than its own tokens do, and what
others cost is counted elsewhere (`Cost.queue_s`, `Cost.decode_s`). No single figure can set a pod apart from the
fleet: neither an outlier, nor the first figure of a new pod. A pod that is about as fast as the fleet has the fleet's
value: on an idle fleet all costs would otherwise differ a little, and every new prompt would go to the same pod.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from serve_app.types import PodId, Served

PRIOR_S_PER_TOKEN = 1 / 15_000  # a 32B model on two H100s; good until the fleet has served something
MIN_TOKENS = 128  # of fewer computed tokens, a step's fixed time is most of it
SAME = 0.2  # a pod's value this close to the fleet's is the fleet's
_WINDOW, _FLEET_WINDOW = 64, 512
_PRIOR_COUNT = 8


class PrefillRates:
    """Seconds of prefill per token, by pod."""

    def __init__(self) -> None:
        self._seen: dict[PodId, deque[float]] = {}
        self._learned: dict[PodId, float] = {}  # made at need: every figure of the fleet moves all pods
        self._fleet: deque[float] = deque(maxlen=_FLEET_WINDOW)
        self._fleet_s = PRIOR_S_PER_TOKEN

    def observe(self, pod: PodId, served: Iterable[Served]) -> None:
        """Requests that a pod has served."""
        new = [
            one.prefill_s / computed
            for one in served
            if (computed := one.prompt_tokens - one.cached_tokens) >= MIN_TOKENS and one.prefill_s > 0
        ]
        if not new:
            return
        seen = self._seen.setdefault(pod, deque(maxlen=_WINDOW))
        seen.extend(new)
        self._fleet.extend(new)
        self._fleet_s = _lower_quartile(self._fleet)
        self._learned.clear()

    def s_per_token(self, pod: PodId) -> float:
        """A pod's own value; the fleet's, for a pod that has not served enough or is about as fast."""
        seen = self._seen.get(pod)
        if not seen:
            return self._fleet_s
        learned = self._learned.get(pod)
        if learned is None:
            learned = _lower_quartile([*seen, *[self._fleet_s] * _PRIOR_COUNT])
            if abs(learned - self._fleet_s) <= SAME * self._fleet_s:
                learned = self._fleet_s
            self._learned[pod] = learned
        return learned

    def keep_only(self, pods: Iterable[PodId]) -> None:
        for pod in self._seen.keys() - set(pods):
            self._seen.pop(pod)
            self._learned.pop(pod, None)


def _lower_quartile(values: Collection[float]) -> float:
    return sorted(values)[len(values) // 4]
