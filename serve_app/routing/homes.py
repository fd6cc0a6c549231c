"""Who got a conversation's last request, so that it stays there while no other pod is better.

A hot prefix is held by several pods, and a short turn adds less than a block: they cost the same then. Without a memory
the conversation would wander among them, and leave a copy of its own part at each.

    request 1, 40 full blocks, goes to a                     block 40 -> a
    request 2 begins with them; a and b hold 40 of its 41    a

The request before is found by its last full block. It is among the last blocks that the pods hold of the new prompt:
what its answer added behind it is short, or its pod holds more than the others and needs no help.
"""

from __future__ import annotations

from serve_app.blocks import KEY_BYTES
from serve_app.types import BlockKeys, PodId

MAX_HOMES = 16_384
_LOOK_BACK = 4  # blocks


class Homes:
    """The pods of the last `MAX_HOMES` requests."""

    def __init__(self) -> None:
        self._pods: dict[BlockKeys, PodId] = {}  # by last full block; the oldest first

    def sent(self, pod: PodId, keys: BlockKeys) -> None:
        """A request with this prompt, or this end of one, went to `pod`."""
        if not keys:
            return
        last = keys[-KEY_BYTES:]
        self._pods.pop(last, None)
        self._pods[last] = pod
        if len(self._pods) > MAX_HOMES:
            del self._pods[next(iter(self._pods))]

    def find(self, keys: BlockKeys, held_blocks: int) -> PodId | None:
        """Who got the request that this prompt goes on from; `held_blocks` of it are held by some pod."""
        for end in range(held_blocks, max(held_blocks - _LOOK_BACK, 0), -1):
            pod = self._pods.get(keys[(end - 1) * KEY_BYTES : end * KEY_BYTES])
            if pod is not None:
                return pod
        return None
