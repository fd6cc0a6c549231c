"""The last decisions, and what they tell together: hit rate, error of the prediction, conversations, hot beginnings.

They come from the receipts that the routers keep in Redis, and are read when somebody asks: only what is new, once a
second at most. So it is the same whichever process has decided.

Which request goes on from which is seen by block keys. A receipt has those of its prompt's last blocks: the last block
of the request before is among them, if answer and new question are short enough.

    request 1   ... k38 k39 k40                        ends with k40
    request 2   ... k38 k39 k40 k41 ... k47            k40 is among its last 32: the same conversation

A key with which two conversations end (many short questions behind one long system prompt) joins nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from serve_app.blocks import KEY_BYTES
from serve_app.index.router_log import Kept
from serve_app.routing.receipts import MARKS_MAX, TAIL_BLOCKS, Receipt
from serve_app.service import views
from serve_app.supervision import ErrorLog
from serve_app.types import BlockKeys

logger = logging.getLogger(__name__)

RING = 256
LOOK_S = 1.0
BRANCHES_MAX = 12
HOLDERS_SHOWN = 8
_SAME = 0.8  # a beginning is left out if a longer one has so many of its requests

Read = Callable[[int, str], Awaitable[Sequence[Kept]]]
"""(how many, after which id) -> receipts, newest first."""


class Seen(NamedTuple):
    """A decision that an engine has told of."""

    id: str
    receipt: Receipt
    marks: BlockKeys
    conversation: str


class Recent:
    """Used on one event loop."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._ring: deque[Seen] = deque(maxlen=RING)
        self._conversations = _Conversations()
        self._lock = asyncio.Lock()
        self._look_at_s = 0.0
        self._last = ""
        self._unread = ErrorLog("kvcache: a receipt in Redis cannot be read; it is left out", logger)

    async def catch_up(self) -> None:
        """Take in what came since the last look."""
        async with self._lock:
            if time.monotonic() < self._look_at_s:
                return
            for kept in reversed(await self._read(RING, self._last)):
                self._last = kept.id
                try:
                    receipt = msgspec.json.decode(kept.receipt, type=Receipt)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:  # somebody else's, or of a later version
                    self._unread.failed(error)
                    continue
                own = self._conversations.take(receipt.request_id, kept.tail[-TAIL_BLOCKS * KEY_BYTES :])
                self._ring.append(Seen(kept.id, receipt, kept.marks[: MARKS_MAX * KEY_BYTES], own))
            self._look_at_s = time.monotonic() + LOOK_S

    @property
    def last(self) -> str:
        """Id of the newest one that was read."""
        return self._last

    def after(self, place: tuple[int, int], count: int) -> list[Seen]:
        """The last ones behind `place` in the stream, newest first."""
        newest: list[Seen] = []
        for seen in reversed(self._ring):
            if len(newest) == count or place_of(seen.id) <= place:
                break
            newest.append(seen)
        return newest

    def conversation(self, tail: BlockKeys) -> str:
        """What a request goes on from that is not among these yet."""
        return self._conversations.find(tail)

    def traffic(self) -> tuple[views.Traffic, dict[str, views.Traffic]]:
        """Of all, and of each pod."""
        by_pod: dict[str, Counter[str]] = {}
        total: Counter[str] = Counter()
        for seen in self._ring:
            counted = _counted(seen.receipt)
            total.update(counted)
            by_pod.setdefault(seen.receipt.chosen, Counter()).update(counted)
        return views.Traffic(**total), {pod: views.Traffic(**counts) for pod, counts in by_pod.items()}

    def beginnings(self) -> list[Beginning]:
        """The hottest that several prompts have in common, each behind the one that it goes on from."""
        counts: Counter[Path] = Counter()
        for seen in self._ring:
            counts.update(_paths(seen.marks))
        return _hottest(counts)


Path = BlockKeys
"""Keys of the blocks 1, 2, 4, ... of a prompt, as far as this beginning goes."""


class Beginning(NamedTuple):
    path: Path
    requests: int
    parent: int  # place in the list; -1: none

    @property
    def blocks(self) -> int:
        return 1 << len(self.path) // KEY_BYTES - 1


class _Conversations:
    """Who ended where: last block -> conversation; empty: several ended there."""

    def __init__(self) -> None:
        self._by_end: dict[BlockKeys, str] = {}

    def take(self, request_id: str, tail: BlockKeys) -> str:
        """The conversation that it belongs to: that of the request before, or a new one of its own name."""
        end = tail[-KEY_BYTES:]
        if not end:
            return ""
        own = self.find(tail) or request_id
        known = self._by_end.pop(end, own)
        self._by_end[end] = own if known == own else ""
        if len(self._by_end) > 4 * RING:
            del self._by_end[next(iter(self._by_end))]
        return own

    def find(self, tail: BlockKeys) -> str:
        for start in range(len(tail) - KEY_BYTES, -1, -KEY_BYTES):
            known = self._by_end.get(tail[start : start + KEY_BYTES])
            if known is not None:
                return known
        return ""


def place_of(entry_id: str) -> tuple[int, int]:
    """`1700000000000-3` -> its order in the stream.

    Raises:
        ValueError: it is no id of an entry.
    """
    time_ms, _, number = entry_id.partition("-")
    if not (time_ms.isdecimal() and number.isdecimal() and len(entry_id) <= 41):
        raise ValueError(entry_id)
    return int(time_ms), int(number)


def _counted(receipt: Receipt) -> dict[str, int]:
    counted = {"requests": 1}
    actual = receipt.actual
    if actual is None:
        return counted
    counted |= {"prompt_tokens": actual.prompt_tokens, "cached_tokens": actual.cached_tokens}
    if receipt.prompt_tokens and not receipt.incomplete and receipt.one_sequence:
        error = abs(receipt.predicted_cached_tokens - actual.cached_tokens)
        counted |= {"compared": 1, "exact": int(error == 0), "error_tokens": error}
    return counted


def _paths(marks: BlockKeys) -> Iterator[Path]:
    return (marks[:end] for end in range(KEY_BYTES, len(marks) + 1, KEY_BYTES))


def _hottest(counts: Mapping[Path, int]) -> list[Beginning]:
    shared = {path: count for path, count in counts.items() if count > 1}
    longer: Counter[Path] = Counter()  # of each, the most requests that one of the next longer ones has
    for path, count in shared.items():
        longer[path[:-KEY_BYTES]] = max(longer[path[:-KEY_BYTES]], count)
    telling = [path for path, count in shared.items() if longer[path] < _SAME * count]
    telling.sort(key=lambda path: shared[path] << len(path) // KEY_BYTES, reverse=True)
    return _in_order(telling[:BRANCHES_MAX], shared)


def _in_order(paths: Iterable[Path], counts: Mapping[Path, int]) -> list[Beginning]:
    """Each behind its parent; what is hotter comes first."""
    chosen = list(paths)
    known = set(chosen)
    below: dict[Path, list[Path]] = {}
    for path in chosen:
        shorter = (path[:end] for end in range(len(path) - KEY_BYTES, 0, -KEY_BYTES))
        below.setdefault(next((one for one in shorter if one in known), b""), []).append(path)
    ordered: list[Beginning] = []

    def put(path: Path, parent: int) -> None:
        place = len(ordered)
        ordered.append(Beginning(path, counts[path], parent))
        for child in below.get(path, ()):
            put(child, place)

    for root in below.get(b"", ()):
        put(root, -1)
    return ordered
