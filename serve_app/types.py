"""The nouns every layer shares: ids, and small frozen records.

In: nothing. Out: types only; this module imports no other of the package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, NewType

BlockKey = NewType("BlockKey", bytes)
"""Canonical key of one full block: 8 bytes, XXH3-64, chained over the whole prefix (see blocks.py)."""

BlockKeys = bytes
"""Keys of consecutive blocks, 8 bytes each, one after the other: no object per block on the way to the index."""

EngineHash = bytes | int
"""An engine's own hash of a block. Opaque: it is only ever compared for equality, within one engine."""

ModelId = NewType("ModelId", str)
"""The model name that clients send and that names the key space in Redis."""

PodId = NewType("PodId", str)
"""One engine that requests can be sent to. For Ray Serve: the replica's `ReplicaID.unique_id`."""


def pod_of_rank(replica: str, rank: int) -> PodId:
    """The name of one data parallel rank of several behind a replica."""
    return PodId(f"{replica}#{rank}")


DomainId = NewType("DomainId", str)
"""Who owns cached blocks: one pod (its GPU), or a store that several pods share (an LMCache server)."""

Tier = NewType("Tier", str)
"""Where a block is: lower-case medium of the KV event, `gpu`, `cpu`, `storage`, ..."""

GPU = Tier("gpu")
CPU = Tier("cpu")
LMCACHE = Tier("lmcache")


def group_tier(tier: Tier, place: int) -> Tier:
    """Where the blocks of a layout's further groups are filed: `gpu`, `gpu/1`, `gpu/2`."""
    return tier if place == 0 else Tier(f"{tier}/{place}")


Epoch = NewType("Epoch", int)
"""One life of a domain, ms since 1970 at its start. Blocks and log entries of another epoch are void."""


class Trust(StrEnum):
    """How sure it is that a pod holds what the index says it holds."""

    EXACT = "exact"  # every event of the engine has been applied, and everything was heard in time
    DEGRADED = "degraded"  # events were lost and not yet made up for: it may hold more, or a little less
    STALE = "stale"  # not heard of in time, or not there any more: it may hold less, or more
    UNKNOWN = "unknown"  # no publisher has ever told of it: nothing is known


ID_MAX_CHARS = 128


def short_id(given: str) -> str:
    """An id that a client has chosen, for use as a key: of at most `ID_MAX_CHARS`, and still its own."""
    if len(given) <= ID_MAX_CHARS:
        return given
    digest = hashlib.blake2b(given.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return given[: ID_MAX_CHARS - len(digest)] + digest


class TokenizerSource(NamedTuple):
    """Where a tokenizer and its templates are loaded from. What has another `stamp` is loaded again."""

    name: str  # path or Hugging Face id
    revision: str = ""  # of a Hugging Face repository; empty: its main branch
    stamp: str = ""  # of the engine's identity: the files under one name may be replaced

    @property
    def key(self) -> str:
        return "\0".join(self)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What a router must know of the engine so that its block keys are the engine's."""

    model: ModelId
    block_size: int  # tokens per canonical block = the engine's resolved block size
    tokenizer: str  # path or Hugging Face id
    chat_template: str | None = None  # Jinja source that overrides the tokenizer's own
    content_format: str = "auto"  # vLLM's --chat-template-content-format: auto | string | openai
    template_kwargs: str = ""  # vLLM's --default-chat-template-kwargs, as JSON
    served_names: tuple[str, ...] = ()  # vLLM's --served-model-name: names of the base model beside `model`
    pooling: bool = False  # it embeds, classifies or ranks: vLLM's --runner pooling
    excludes_tools: bool = False  # vLLM's --exclude-tools-when-tool-choice-none
    revision: str = ""  # vLLM's --tokenizer-revision, or --revision
    tokenizer_mode: str = "auto"  # vLLM's --tokenizer-mode
    identity: tuple[tuple[str, str], ...] = ()  # what it makes prompts with (prompts/identity.py); empty: not said

    @property
    def source(self) -> TokenizerSource:
        return TokenizerSource(self.tokenizer, self.revision, "".join(digest for _, digest in self.identity))

    def makes_prompts_as(self, other: EngineSpec) -> bool:
        """Whether block keys of a prompt are the same for both, as far as they say."""
        theirs = dict(other.identity)
        return all(theirs.get(part, digest) == digest for part, digest in self.identity)


class Attention(StrEnum):
    """How the layers of a KV cache group look back, and so what they must find to go on from a cached prefix."""

    FULL = "full"  # every block of the prefix
    SLIDING_WINDOW = "sliding_window"  # the blocks of the last `window - 1` tokens
    CHUNKED_LOCAL = "chunked_local"  # the blocks of the chunk of `window` tokens that the next token is in
    MAMBA = "mamba"  # the one state at the prefix' end


@dataclass(frozen=True, slots=True)
class KVGroup:
    """An engine's KV cache groups of one spec. vLLM looks them up as one: a block counts if all of them hold it."""

    kind: Attention
    block_size: int  # tokens
    window: int = 0  # tokens: the sliding window, or the chunk of local attention
    eagle: bool = False  # the last block of a hit is computed again, for the draft model (EAGLE, MTP)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What an engine's KV cache is made of. The plain one is a single group of full attention."""

    groups: tuple[KVGroup, ...]
    alignment: int  # tokens: a hit's length is a multiple of it


@dataclass(frozen=True, slots=True)
class EncodedKeys:
    """One prompt of a request, as the index needs it."""

    keys: BlockKeys  # of its full blocks; of the known ones, if it is not complete
    token_count: int  # with a guess for what is not known, if it is not complete
    known_token_count: int  # tokens that came from the prefix store, not from the tokenizer
    incomplete: str = ""  # why the keys end before the prompt does: tokens_late, tokenizer_busy, media

    @property
    def complete(self) -> bool:
        return not self.incomplete


@dataclass(frozen=True, slots=True)
class Domain:
    """A holder of blocks, as it is registered in Redis."""

    id: DomainId
    epoch: Epoch
    spec: EngineSpec
    pod: PodId | None = None  # None: shared by the pods that are attached to it
    address: str = ""  # for people: node, or host:port
    degraded: bool = False  # its publisher has lost events of the engine, and knows not of every block
    attached: tuple[DomainId, ...] = ()  # shared domains that this pod loads from
    chunk_size: int = 0  # tokens that a shared domain loads at once, from a prompt's beginning; 0: a block
    layout: CacheLayout | None = None  # None: one group of full attention, whose blocks are the canonical ones
    capacity: int = 0  # blocks of its GPU cache; 0: unknown
    rank: int | None = None  # data parallel rank of the engine behind this pod's replica; None: it has no ranks
    replica: str = ""  # with a rank: the replica that requests for this pod are sent to
    unindexed: Mapping[str, str] = field(default_factory=dict)  # tier that the engine uses -> why it is not indexed
    doubt: str = ""  # with `degraded`: why its publisher does not believe what it knows itself
    adapters: tuple[str, ...] = ()  # LoRA adapters that it has, as clients name them
    adapter_slots: int = 0  # that it may have at once, each loaded when it is asked for; 0: it loads none by itself


@dataclass(frozen=True, slots=True)
class PodMatch:
    """How much of one prompt a pod holds, or can load from the shared domains that it is attached to.

    `tokens` counts the contiguous prefix, tier by tier in tier order: {gpu: 96, cpu: 64} says that the first
    96 tokens are in GPU blocks and the next 64 can be loaded from CPU. `hit_blocks` counts the prompt's blocks
    that the pod holds or can load anywhere, gaps included.
    """

    tokens: Mapping[Tier, int] = field(default_factory=dict)
    hit_blocks: int = 0
    trust: Trust = Trust.EXACT

    @property
    def total_tokens(self) -> int:
        return sum(self.tokens.values())


@dataclass(frozen=True, slots=True)
class Found:
    """What a request's prompts are and who holds how much of them: all that a choice needs."""

    prompts: Sequence[EncodedKeys]
    matches: Sequence[Mapping[PodId, PodMatch]]  # of each prompt
    block_size: int
    stage_s: Mapping[str, float] = field(default_factory=dict)  # seconds by stage: prompt, index
    one_sequence: bool = True  # one prompt and one answer, so that the engine's figures are those of the request

    @property
    def prompt_tokens(self) -> int:
        return sum(prompt.token_count for prompt in self.prompts)

    @property
    def known_tokens(self) -> int:
        return sum(prompt.known_token_count for prompt in self.prompts)

    @property
    def incomplete(self) -> str:
        """Why only the known beginning of some prompt was looked up: tokens_late, tokenizer_busy, media."""
        return next((prompt.incomplete for prompt in self.prompts if prompt.incomplete), "")

    @property
    def complete(self) -> bool:
        return not self.incomplete

    def without_matches(self) -> Found:
        """The same, of a request that no cache is read for."""
        return replace(self, matches=[{} for _ in self.prompts])

    def matched_tokens(self, pod: PodId) -> dict[Tier, int]:
        """Tokens by tier, summed over the prompts."""
        total: dict[Tier, int] = {}
        for match in self.matches:
            for tier, count in match.get(pod, _NOTHING).tokens.items():
                total[tier] = total.get(tier, 0) + count
        return total

    def trust(self, pod: PodId) -> Trust:
        """How far the pod's matches can be relied on."""
        return self.matches[0].get(pod, _NOTHING).trust if self.matches else Trust.EXACT


_NOTHING = PodMatch()


class Served(NamedTuple):
    """One request that an engine has answered, in its own figures."""

    request_id: str  # as the engine knows it: the client's or gateway's x-request-id, in a prefix and suffix of vLLM's
    prompt_tokens: int
    cached_tokens: int  # of these, not computed: from any tier
    queued_s: float  # from arrival to its first step
    prefill_s: float  # from its first step to its first token


RequestTag = bytes
"""What a request is called where a pod reports of it: 8 bytes, of its x-request-id. `b""`: it has no id."""

TAG_BYTES = 8


def request_tag(request_id: str) -> RequestTag:
    """BLAKE2b of the id, as the client or the proxy has given it."""
    if not request_id:
        return b""
    return hashlib.blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=TAG_BYTES).digest()


class Progress(NamedTuple):
    """What has become of requests at a pod since it was said last: packed tags."""

    accepted: bytes = b""  # the engine has them, and counts them as in flight
    prefilled: bytes = b""  # their first token is there
    ended: bytes = b""  # answered, aborted or refused

    def tags(self) -> tuple[list[RequestTag], list[RequestTag], list[RequestTag]]:
        """One by one: accepted, prefilled, ended."""
        accepted, prefilled, ended = (
            [packed[i : i + TAG_BYTES] for i in range(0, len(packed), TAG_BYTES)] for packed in self
        )
        return accepted, prefilled, ended


NO_PROGRESS = Progress()


class Routed(NamedTuple):
    """What another router has sent to a pod."""

    pod: PodId
    keys: BlockKeys  # of the blocks that the pod did not hold
    tokens: int  # that it has to compute
    at_s: float = 0.0  # receiver's monotonic clock
    tag: RequestTag = b""
    lease_s: float = 0.0  # its router tells of its end, or it counts for so long; 0: the pod tells


@dataclass(frozen=True, slots=True)
class PodLoad:
    """What a pod last said of its load."""

    in_flight: int  # requests that the engine has accepted and not finished
    received_at_s: float  # receiver's monotonic clock
    unused_blocks: int = 0  # blocks of its GPU cache that hold nothing; 0 also if that is not known
