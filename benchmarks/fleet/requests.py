"""The records that flow through the simulator: one request, and what became of it.

In: nothing. Out: types only. Prompts are not tokens here but block keys: one 8-byte key for each full block of the
prompt and of the answer, as the router would see them. The partial last block exists only in the token counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.types import BlockKey, BlockKeys

BLOCK_SIZE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and the length of its answer.

    A sequence of `prompt_tokens` + `output_tokens` - 1 tokens is computed (the last token is never fed back), so
    `answer_keys` are the full blocks of that length beyond `prompt_keys`; the first of them may begin in the prompt.
    """

    id: int
    arrival_s: float  # simulated time at which the client sends it
    prompt_keys: Sequence[BlockKey]  # full blocks of the prompt
    packed_prompt_keys: BlockKeys  # the same, as a router has them
    answer_keys: Sequence[BlockKey]  # full blocks that end in the answer
    prompt_tokens: int
    output_tokens: int
    session: int  # user, tenant or conversation: what a session-affine balancer would hash
    stage: int = 0  # step of a rate ladder


@dataclass(slots=True, eq=False)
class Record:
    """What happened to a request. Times are simulated seconds; -1 means not yet."""

    request: Request
    router: int = 0
    replica: int = -1
    routed_s: float = -1.0
    first_token_s: float = -1.0
    finished_s: float = -1.0
    cached_tokens: int = 0  # at first scheduling, as the engine counts them
    loaded_tokens: int = 0  # of these, from the CPU tier
    preemptions: int = 0
    rejections: int = 0  # queue was full

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.request.arrival_s


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a replica says of itself at one moment."""

    taken_at_s: float
    in_flight: int  # accepted and not finished
    waiting: int  # of these, not scheduled yet
    waiting_tokens: int  # prompt tokens of those, cached or not
    kv_used_share: float  # blocks that running requests hold / all blocks
    unused_blocks: int = 0  # blocks of the cache that hold nothing


@dataclass(slots=True)
class FleetView:
    """What one router knows besides cache events when it routes.

    `in_flight` is the last report plus what this router sent since and minus what it saw finish since; with reports at
    interval 0 it is exact. `closed` replicas have just refused this request.
    """

    in_flight: list[int]
    reports: list[LoadReport | None]
    closed: set[int] = field(default_factory=set)

    def candidates(self) -> list[int]:
        """Replicas that have not refused, in a stable order."""
        return [replica for replica in range(len(self.in_flight)) if replica not in self.closed]
