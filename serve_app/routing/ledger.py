"""What was routed and not yet seen stored: prefill that is queued at each pod, and blocks that will be there soon.

A request that was just sent to a pod is in no index yet. Without a memory of it, the next requests with the same new
prefix would be spread, and a burst would be sent to the pod that looks idle. So every routed request is an entry here
until the pod says that its first token is there, or that it has ended. Of a pod that says no such thing, the entry ends
when BlockStored events tell of the request's last block. While it is open,

- the tokens that the pod has to compute for it count as queued prefill;
- its blocks count as speculative: whoever comes next with the same prefix will find them when its turn comes.

    routed to a: 6 blocks, of which a held 2      queued at a: 4 blocks      speculative at a: 6 blocks
    a has stored block 6 and made a token         queued at a: 0             (the index has them now)

Speculative blocks are kept in two tables that take turns, so that old ones go away without being removed one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from serve_app.blocks import KEY_BYTES
from serve_app.index.table import BlockTable
from serve_app.routing.early import Early
from serve_app.routing.in_flight import ACCEPT_S, REPORT_DELAY_S
from serve_app.types import BlockKeys, PodId, PodLoad, Progress, RequestTag

FORGET_S = 120.0  # an entry that nothing was heard of for so long is closed
LATE_TIMES, LATE_S = 5.0, 2.0  # a first token is overdue after so many times the expected time, and so many seconds
SPECULATE_S = 2.0  # a block that was routed counts for so long at least, twice as long at most, unless still queued

_WORD_BITS = 64  # of a BlockTable's masks

Held = Callable[[Sequence[PodId], BlockKeys], Sequence[bool]]
"""Whether each pod holds the block beside it, in any tier."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One routed request."""

    pod: PodId
    keys: BlockKeys
    tokens: int  # that the pod has to compute
    sent_at_s: float
    last: BlockKeys  # its last block: when that is stored, all is; empty: unknown, or there is none
    tag: RequestTag = b""  # of the request
    due_s: float = 0.0  # when its first token should be there, if all goes as expected


class Ledger:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._entries: dict[PodId, list[Entry]] = {}  # the oldest first
        self._by_tag: dict[tuple[PodId, RequestTag], list[Entry]] = {}  # a request of several prompts has several
        self._accepted: set[tuple[PodId, RequestTag]] = set()  # of these
        self._tells: set[PodId] = set()  # pods that say what becomes of each request
        self._early = Early()
        self._queued: dict[PodId, int] = {}
        self._bits: dict[PodId, int] = {}
        self._pods: dict[int, PodId] = {}  # by bit
        self._all_bits = 0
        self._tables = (BlockTable(), BlockTable())  # new ones, and those of the time before
        self._turn_at_s = 0.0

    def sent(
        self,
        pod: PodId,
        keys: BlockKeys,
        tokens: int,
        now_s: float,
        *,
        complete: bool = True,
        tag: RequestTag = b"",
        expected_s: float = 0.0,
    ) -> Entry:
        """A request was routed to `pod`, which has to compute `tokens` of it.

        Args:
            complete: whether the keys are those of the whole prompt. If not, the pod may hold them all and yet have
                the rest to compute; only its reports, and time, close the entry.
            tag: of the request; empty: the pod cannot tell of it.
            expected_s: time to its first token.
        """
        self._turn(now_s)
        entry = Entry(pod, keys, tokens, now_s, keys[-KEY_BYTES:] if complete else b"", tag, now_s + expected_s)
        if not (tag and self._early.was_told(pod, tag)):
            self._entries.setdefault(pod, []).append(entry)
            self._queued[pod] = self._queued.get(pod, 0) + tokens
            if tag:
                self._by_tag.setdefault((pod, tag), []).append(entry)
        if keys:
            self._tables[0].add(keys, self._bit(pod))
        return entry

    def withdraw(self, entry: Entry) -> None:
        """It has not gone there after all. (Its blocks stay speculative for a moment: others may have them too.)"""
        self._close({entry})

    def progress(self, pod: PodId, progress: Progress) -> None:
        """What has become of requests there."""
        accepted, prefilled, ended = progress.tags()
        if accepted:
            self._tells.add(pod)
        self._accepted.update((pod, tag) for tag in accepted if (pod, tag) in self._by_tag)
        done: set[Entry] = set()
        for tag in (*prefilled, *ended):
            done.update(self._by_tag.get((pod, tag), ()))
        for tag in prefilled:
            if (pod, tag) not in self._by_tag:
                self._early.told(pod, tag)
        if done:
            self._close(done)

    def settle(self, held: Held, now_s: float) -> None:
        """Close the entries that have come to an end without being told of.

        That is: the last block is stored, at a pod that does not tell; the engine has not accepted it in time, at one
        that does; or nothing was heard for very long.
        """
        old, ending = [], []
        for entries in self._entries.values():
            for entry in entries:
                if now_s - entry.sent_at_s >= FORGET_S or (
                    now_s - entry.sent_at_s >= ACCEPT_S and self._is_told(entry) and not self._is_accepted(entry)
                ):
                    old.append(entry)
                elif entry.last and not self._is_told(entry):
                    ending.append(entry)
        if ending:
            stored = held([entry.pod for entry in ending], b"".join([entry.last for entry in ending]))
            old += [entry for entry, is_stored in zip(ending, stored, strict=True) if is_stored]
        if old:
            self._close(set(old))

    def overdue_s(self, now_s: float) -> dict[PodId, float]:
        """How much later than five times the expected time, and two seconds, the oldest first token is, where it is."""
        overdue = {}
        for pod, entries in self._entries.items():
            if entries and now_s - entries[0].sent_at_s > LATE_S and self._is_told(entries[0]):
                oldest = entries[0]
                late_s = now_s - oldest.sent_at_s - LATE_TIMES * (oldest.due_s - oldest.sent_at_s) - LATE_S
                if late_s > 0:
                    overdue[pod] = late_s
        return overdue

    def reported(self, pod: PodId, load: PodLoad) -> None:
        """No more entries can be open than the pod has requests: the oldest beyond are done, or never came.

        Of a pod that tells of each, these are the ones that it has accepted: what it has told since may be lost.
        """
        if pod in self._tells:
            accepted = [entry for entry in self._entries.get(pod, ()) if self._is_accepted(entry)]
            lost = len({entry.tag for entry in accepted}) - load.in_flight
            if lost > 0:
                tags = list(dict.fromkeys(entry.tag for entry in accepted))[:lost]
                self._close({entry for entry in accepted if entry.tag in tags})
            return
        known_until_s = load.received_at_s - REPORT_DELAY_S
        seen = [entry for entry in self._entries.get(pod, ()) if entry.sent_at_s <= known_until_s]
        excess = len(seen) - load.in_flight
        if excess > 0:
            self._close(set(seen[:excess]))

    def queued_tokens(self, pod: PodId) -> int:
        return self._queued.get(pod, 0)

    def queued(self, pods: Iterable[PodId]) -> dict[PodId, float]:
        """The same of several."""
        known = self._queued
        return {pod: known.get(pod, 0) for pod in pods}

    def waiting(self, pods: Iterable[PodId]) -> dict[PodId, int]:
        """Requests at each whose first token is not there, as far as is known."""
        open_at = self._entries
        return {pod: len({entry.tag or id(entry) for entry in open_at.get(pod, ())}) for pod in pods}

    def speculative_blocks(self, keys: BlockKeys, matched: Mapping[PodId, int], now_s: float) -> dict[PodId, int]:
        """How many blocks from the prompt's beginning each pod will hold.

        Pods that gain nothing are left out.

        Args:
            matched: how many a pod holds now; none, where it is not in here.
        """
        self._turn(now_s)
        pods = self._pods
        starts: dict[int, int] = {}
        others = self._all_bits
        for pod, blocks in matched.items():
            bit = self._bits.get(pod)
            if bit is not None and blocks:
                starts[blocks] = starts.get(blocks, 0) | 1 << bit
                others &= ~(1 << bit)
        if others:
            starts[0] = others
        starts.pop(len(keys) // KEY_BYTES, None)
        found: dict[PodId, int] = {}
        if not starts:
            return found
        next_keys = b"".join([keys[start * KEY_BYTES : (start + 1) * KEY_BYTES] for start in starts])
        for table in self._tables:
            if not len(table):
                continue
            for (start, mask), words in zip(starts.items(), table.masks(next_keys).tolist(), strict=True):
                gaining = mask & sum([word << i * _WORD_BITS for i, word in enumerate(words)])
                if gaining:  # seldom: most prompts have nothing under way
                    for end, ended in table.runs(keys, start, gaining):
                        for bit in _each_bit(ended):
                            found[pods[bit]] = max(end, found.get(pods[bit], 0))
        return found

    def keep_only(self, pods: Iterable[PodId]) -> None:
        for pod in (self._entries.keys() | self._bits.keys()) - set(pods):
            self._close(set(self._entries.get(pod, ())))
            self._entries.pop(pod, None)
            self._queued.pop(pod, None)
            self._tells.discard(pod)
            bit = self._bits.pop(pod, None)
            if bit is not None:
                del self._pods[bit]
                self._all_bits &= ~(1 << bit)
                for table in self._tables:
                    table.erase(bit)

    def _is_told(self, entry: Entry) -> bool:
        """Whether the pod will say what becomes of it."""
        return bool(entry.tag) and entry.pod in self._tells

    def _is_accepted(self, entry: Entry) -> bool:
        return (entry.pod, entry.tag) in self._accepted

    def _close(self, done: AbstractSet[Entry]) -> None:
        for entry in done:
            self._by_tag.pop((entry.pod, entry.tag), None)
            self._accepted.discard((entry.pod, entry.tag))
        for pod in {entry.pod for entry in done}:
            left = [entry for entry in self._entries.get(pod, ()) if entry not in done]
            self._entries[pod] = left
            self._queued[pod] = sum(entry.tokens for entry in left)

    def _turn(self, now_s: float) -> None:
        """When it is time, start a new table; what is still open goes on to count."""
        late_s = now_s - self._turn_at_s
        if late_s < 0:
            return
        self._turn_at_s = now_s + SPECULATE_S
        self._tables = (BlockTable(), self._tables[0] if late_s < SPECULATE_S else BlockTable())
        for pod, entries in self._entries.items():
            for entry in entries:
                if entry.keys:
                    self._tables[0].add(entry.keys, self._bit(pod))

    def _bit(self, pod: PodId) -> int:
        bit = self._bits.get(pod)
        if bit is None:
            used = set(self._bits.values())
            bit = self._bits[pod] = next(i for i in range(len(used) + 1) if i not in used)
            self._pods[bit] = pod
            self._all_bits |= 1 << bit
        return bit


def _each_bit(mask: int) -> list[int]:
    bits = []
    while mask:
        low = mask & -mask
        bits.append(low.bit_length() - 1)
        mask ^= low
    return bits
