"""What the mirror says beside what the engines hold.

A simulated engine pauses while it is compared: all blocks of its pool, and some that it lately removed. A real engine's
clients pause, and it is asked a conversation. At the end all engines are quiet, and the numbers of blocks must agree.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Final

from benchmarks.soak.real import RealEngine
from benchmarks.soak.wire import Asker
from serve_app.blocks import KEY_BYTES

REAL_TRUTH_S: Final = 15.0  # between questions to a real engine: its clients wait meanwhile
GRACE_S: Final = 5.0  # for the last events of a paused engine to arrive
JOIN_S: Final = 10.0  # it may wait for a slow engine; Ctrl-C does not
EXAMPLES_MAX: Final = 20
_COUNTED: Final = (
    *("comparisons", "compared", "wrong"),  # simulated engines; blocks
    *("real_compared", "real_wrong", "real_cached_tokens", "real_unanswered"),  # prompts
)


class Truth:
    """Args:
    follower: where the mirror's process is asked.
    engine_of: simulated pod -> its process.
    real: engines with clients.
    """

    def __init__(self, follower: str, engine_of: Mapping[str, Asker], real: Sequence[RealEngine]) -> None:
        self._follower_address, self._follower = follower, Asker(follower)
        self._engine_of, self._real = engine_of, real
        self._pods = list(engine_of)
        self._dice = random.Random(1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._compare_real_engines, daemon=True)
        self.counts = dict.fromkeys(_COUNTED, 0)
        self.settled_ms: list[float] = []  # until the mirror was right
        self.examples: list[str] = []  # of what was wrong

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    @property
    def summary(self) -> str:
        counts = self.counts
        some = f"{counts['compared'] - counts['wrong']}/{counts['compared']}"
        real = f" and {counts['real_compared'] - counts['real_wrong']}/{counts['real_compared']}"
        return some + (real if self._real else "")

    def for_verdict(self) -> dict[str, int]:
        counts = self.counts
        compared = counts["compared"]
        if self._real:  # both kinds of engines, or it says nothing
            compared = min(compared, counts["real_compared"])
        return {"compared": compared, "wrong": counts["wrong"] + counts["real_wrong"]}

    def compare_one(self) -> None:
        pod = self._dice.choice(self._pods)
        self.counts["comparisons"] += 1
        self._compare(pod)
        self._engine_of[pod].ask(what="resume", pod=pod)

    def _compare(self, pod: str) -> set[bytes]:
        """Pauses the engine. Returns the blocks that its pool holds."""
        held, gone = self._engine_of[pod].ask(what="pause", pod=pod)
        expected = b"\1" * (len(held) // KEY_BYTES) + b"\0" * (len(gone) // KEY_BYTES)
        asked = time.monotonic()
        while True:
            said, trust = self._follower.ask(what="held", pod=pod, keys=held + gone)
            waited = time.monotonic() - asked
            if (said == expected and trust == "exact") or waited > GRACE_S:
                break
            time.sleep(0.01)
        wrong = sum(one != other for one, other in zip(said, expected, strict=True))
        if trust != "exact":
            wrong = max(wrong, 1)
        if wrong:
            missing = sum(one < other for one, other in zip(said, expected, strict=True))
            self._note(f"{pod} ({trust}): {missing} missing of {len(held) // KEY_BYTES}, {wrong - missing} too many")
        self.counts["compared"] += len(expected)
        self.counts["wrong"] += wrong
        self.settled_ms.append(waited * 1e3)
        return {held[i : i + KEY_BYTES] for i in range(0, len(held), KEY_BYTES)}

    def _compare_real_engines(self) -> None:
        """In a thread: it waits for the requests under way."""
        asker = Asker(self._follower_address)
        for engine in itertools.cycle(self._real):
            if self._over.wait(REAL_TRUTH_S):
                break
            answer = engine.compare(asker)
            if answer is None:
                self.counts["real_unanswered"] += 1
                continue
            predicted, actual = answer
            self.counts["real_compared"] += 1
            self.counts["real_cached_tokens"] += actual
            if predicted != actual:
                self.counts["real_wrong"] += 1
                self._note(f"{engine.pod}: {actual} tokens reused, {predicted} predicted")
        asker.close()

    def compare_all(self) -> dict[str, int]:
        """All engines are quiet: what the mirror has of them is all that it has."""
        distinct: set[bytes] = set()
        for pod in self._pods:
            distinct |= self._compare(pod)
        of_real = sum(engine.held() for engine in self._real)
        blocks = self._follower.ask(what="state")["blocks"]
        # A prompt of a real engine has no block in common with the made up ones; two real engines may share some.
        left = {"blocks_in_mirror": blocks, "blocks_in_simulated_engines": len(distinct), "real_at_most": of_real}
        if not 0 <= blocks - len(distinct) <= of_real:
            self.counts["wrong"] += 1
            self._note(f"at the end: {left}")
        return left

    def _note(self, what: str) -> None:
        print(f"WRONG {what}", flush=True)
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(what)
