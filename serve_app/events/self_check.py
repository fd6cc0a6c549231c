"""Whether what is believed of an engine's GPU cache can be true, by what the engine says of it.

In: copies that are believed to be held, vLLM's own figure of blocks in use, requests. Out: a reason why it cannot be.

    capacity 1000   believed 1200                      no engine holds more blocks than it has: removals are not heard
    capacity 1000   believed 300, 600 in use by 2      300 blocks or more hold something that was never heard of

vLLM gives a block its hash, and tells of it, in the step that fills it. So a request has few blocks without one: the
last of each group, those of tokens that are guessed ahead, and where attention is sparse, those that nobody will look
up: of its window, and of the step under way.
"""

from __future__ import annotations

from serve_app.events.engine_groups import EngineLayout
from serve_app.types import Attention

LASTING_S = 5.0  # figure and events come on two ways: only a contradiction that stays is one
STEP_TOKENS = 16384  # most tokens that an engine computes in a step; vLLM's own default is 2048 to 16384
_NULL_BLOCK = 1  # vLLM sets one block of the pool aside
_OPEN_BLOCKS = 2  # of a request in a group: the one being filled, and one for tokens guessed ahead


class SelfCheck:
    """Of one life of an engine.

    Args:
        groups: its KV cache groups, as far as they are known.
        capacity: blocks of its GPU cache; 0: not known, and nothing is checked.
    """

    def __init__(self, groups: EngineLayout, capacity: int) -> None:
        layout, count = groups.layout, len(groups.members)
        self._capacity = capacity
        # Where hits end inside blocks, a block has two names.
        self._names = 2 if any(group.block_size > layout.alignment for group in layout.groups) else 1
        sparse = [group for group in layout.groups if group.kind is not Attention.FULL]
        self._tells_all = -1 not in groups.members  # blocks of a group that nobody looks up have no hash
        self._open_blocks = count * (_OPEN_BLOCKS + max((g.window // g.block_size for g in sparse), default=0))
        self._step_blocks = count * STEP_TOKENS // min(g.block_size for g in layout.groups) if sparse else 0
        self._since_s: float | None = None  # when what is in use began to contradict

    def capacity(self, copies: int) -> str:
        """Why `copies` blocks cannot be held; empty: they can."""
        if not self._capacity or copies <= self._names * (self._capacity - _NULL_BLOCK):
            return ""
        return f"{copies} blocks are believed to be in a cache of {self._capacity}: removals are not heard"

    def in_use(self, copies: int, in_use: int, requests: int, now_s: float) -> str:
        """Why `copies` blocks cannot be all while `requests` use `in_use`; empty: they can, or it has not lasted."""
        most = copies + requests * self._open_blocks + self._step_blocks
        if not self._capacity or not self._tells_all or in_use <= most:
            self._since_s = None
            return ""
        if self._since_s is None:
            self._since_s = now_s
        if now_s < self._since_s + LASTING_S:
            return ""
        return (
            f"{in_use} blocks are in use by {requests} requests, and {copies} are known: the engine stores what its "
            "events do not tell, or prefix caching is off"
        )
