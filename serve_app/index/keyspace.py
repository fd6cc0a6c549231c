"""Every Redis key name, and every record that is stored under one. No other module builds a key name.

    kv:{m}:domains                          hash    domain id -> DomainRecord
    kv:{m}:lease:<domain>                   string  HeartbeatRecord, with expiry; gone = the domain is dead
    kv:{m}:blocks:<domain>:<epoch>:<tier>   set     8-byte block keys: the state that a new follower loads
    kv:{m}:seqs                             hash    domain id -> epoch and number of its last entry in the log
    kv:{m}:log                              stream  one LogRecord per entry, under the field `r`
    kv:{m}:routers                          zset    router id -> seconds since 1970 when it was last there
    kv:{m}:receipts                         stream  one receipt per entry (JSON), under the field `r`, the last thousand
                                                    beside it, under `m` and `t`: keys of its prompt's blocks

`{m}` is a hash tag: all keys of a model are in one slot of a Redis Cluster, so transactions work there.
Records are msgpack arrays; fields are only ever added at the end, with defaults. A change that a reader must not
overlook raises the record's version: who reads a higher one than it knows leaves the domain out.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from serve_app.blocks import KEY_BYTES
from serve_app.decoding import decoder
from serve_app.errors import RecordNotUnderstood
from serve_app.types import (
    NO_PROGRESS,
    TAG_BYTES,
    Attention,
    CacheLayout,
    Domain,
    DomainId,
    EngineSpec,
    Epoch,
    KVGroup,
    ModelId,
    PodId,
    Progress,
    Served,
    Tier,
)

LOG_FIELD = b"r"
MARKS_FIELD, TAIL_FIELD = b"m", b"t"  # beside a receipt: packed block keys
TEXT_MAX_CHARS = 1024  # of a name or a reason in a log entry
ADAPTERS_MAX = 1024  # of one engine
_NUMBER_MAX = 2**53
_SECONDS_MAX = 1e9
PLAIN_VERSION = 1  # of a domain whose blocks are those of one group of full attention
RECORD_VERSION = 2  # with KV cache groups: their blocks are in tiers of their own


class GroupRecord(msgspec.Struct, array_like=True, frozen=True):
    """See KVGroup."""

    kind: str
    block_size: int
    window: int = 0
    eagle: bool = False


class DomainRecord(msgspec.Struct, array_like=True, frozen=True):
    """A domain as Redis has it: an array, to which fields are only added."""

    epoch: int
    pod: str | None
    address: str
    model: str
    block_size: int
    tokenizer: str
    chat_template: str | None = None
    content_format: str = "auto"
    tiers: tuple[str, ...] = ()  # tiers that may have a blocks set in this epoch
    template_kwargs: str = ""
    degraded: bool = False
    served_names: tuple[str, ...] = ()
    attached: tuple[str, ...] = ()
    chunk_size: int = 0
    version: int = PLAIN_VERSION
    groups: tuple[GroupRecord, ...] = ()  # empty: plain
    alignment: int = 0  # tokens; with groups
    capacity: int = 0
    rank: int | None = None
    replica: str = ""
    unindexed: dict[str, str] = {}
    pooling: bool = False
    excludes_tools: bool = False
    doubt: str = ""
    revision: str = ""
    tokenizer_mode: str = "auto"
    identity: tuple[tuple[str, str], ...] = ()
    adapters: tuple[str, ...] = ()
    adapter_slots: int = 0

    @classmethod
    def of(cls, domain: Domain, tiers: tuple[str, ...] = ()) -> DomainRecord:
        spec, layout = domain.spec, domain.layout
        return cls(
            domain.epoch,
            domain.pod,
            domain.address,
            spec.model,
            spec.block_size,
            spec.tokenizer,
            spec.chat_template,
            spec.content_format,
            tiers,
            spec.template_kwargs,
            domain.degraded,
            spec.served_names,
            domain.attached,
            domain.chunk_size,
            PLAIN_VERSION if layout is None else RECORD_VERSION,
            ()
            if layout is None
            else tuple(GroupRecord(g.kind, g.block_size, g.window, g.eagle) for g in layout.groups),
            0 if layout is None else layout.alignment,
            domain.capacity,
            domain.rank,
            domain.replica,
            dict(domain.unindexed),
            spec.pooling,
            spec.excludes_tools,
            domain.doubt,
            spec.revision,
            spec.tokenizer_mode,
            spec.identity,
            domain.adapters[:ADAPTERS_MAX],
            domain.adapter_slots,
        )

    def domain(self, domain_id: DomainId) -> Domain:
        """What the record says.

        Raises:
            RecordNotUnderstood: it says what this version of the package does not know, or what cannot be.
        """
        return Domain(
            id=domain_id,
            epoch=Epoch(self.epoch),
            spec=EngineSpec(
                ModelId(self.model),
                self.block_size,
                self.tokenizer,
                self.chat_template,
                self.content_format,
                self.template_kwargs,
                self.served_names,
                self.pooling,
                self.excludes_tools,
                self.revision,
                self.tokenizer_mode,
                self.identity,
            ),
            pod=None if self.pod is None else PodId(self.pod),
            address=self.address,
            degraded=self.degraded,
            attached=tuple(DomainId(domain) for domain in self.attached),
            chunk_size=self.chunk_size,
            layout=self._layout(),
            capacity=self.capacity,
            rank=self.rank,
            replica=self.replica,
            unindexed=self.unindexed,
            doubt=self.doubt,
            adapters=self.adapters[:ADAPTERS_MAX],
            adapter_slots=max(self.adapter_slots, 0),
        )

    def _layout(self) -> CacheLayout | None:
        if self.version > RECORD_VERSION:
            raise RecordNotUnderstood("version", f"record version {self.version}; known up to {RECORD_VERSION}")
        if self.block_size <= 0:
            raise RecordNotUnderstood("block_size", f"block size {self.block_size}")
        if not self.groups:
            return None
        for group in self.groups:
            if group.kind not in _KINDS:
                raise RecordNotUnderstood("group_kind", f"KV cache group of kind {group.kind!r}")
            if group.block_size <= 0 or group.block_size % self.block_size:
                raise RecordNotUnderstood(
                    "group_block_size", f"KV cache group with blocks of {group.block_size} tokens"
                )
            if group.window < 0 or (group.window == 0 and group.kind in _WITH_WINDOW):
                raise RecordNotUnderstood(
                    "group_window", f"KV cache group {group.kind} with a window of {group.window}"
                )
        if self.alignment <= 0 or self.alignment % self.block_size:
            raise RecordNotUnderstood("alignment", f"hits aligned to {self.alignment} tokens")
        groups = tuple(KVGroup(Attention(g.kind), g.block_size, g.window, g.eagle) for g in self.groups)
        return CacheLayout(groups, self.alignment)


_KINDS = frozenset(map(str, Attention))
_WITH_WINDOW = frozenset({Attention.SLIDING_WINDOW, Attention.CHUNKED_LOCAL})


class HeartbeatRecord(msgspec.Struct, array_like=True, frozen=True):
    """What a publisher says with every renewal of its lease. Counters are since the publisher's start."""

    epoch: int
    in_flight: int | None = None  # requests in the engine; None: the publisher does not know
    blocks: int = 0  # blocks held now, all tiers
    events_applied: int = 0
    events_lost: int = 0  # batches that the engine sent and that could not be had again
    events_skipped: dict[str, int] = {}
    resyncs: int = 0
    beat: int = 0  # counts the renewals: one that does not change is late


class LogRecord(msgspec.Struct, array_like=True, frozen=True):
    """One change. `op` is join | add | remove | clear | leave; or load | route | told | verdict: no domain's state.

    A join of the current epoch renews the domain's record.
    """

    op: str
    domain: str
    epoch: int
    seq: int = 0  # per domain and epoch, no gaps, 1 is the join; 0 for what is no state
    tier: str = ""
    keys: bytes = b""  # packed block keys
    record: DomainRecord | None = None  # with `join`
    in_flight: int = 0  # with `load`
    served: tuple[Served, ...] = ()  # with `load`: requests that have ended since the one before
    router: str = ""  # with `route`: who routed; `domain` is the pod, `keys` are blocks that it did not hold
    tokens: int = 0  # with `route`: prefill that it has to do
    unused_blocks: int = 0  # with `load`: blocks of the GPU cache that hold nothing; 0 also if that is not known
    cause: str = ""  # with `verdict`: why a router does not believe what it knows of the domain; renewed every second
    tag: bytes = b""  # with `route`: the request
    progress: Progress = NO_PROGRESS  # with `load`; with `told`: by the router that has sent the requests there
    lease_s: float = 0.0  # with `route`: so long it counts, unless its end is `told`; 0: the pod tells of it


class SeqRecord(msgspec.Struct, array_like=True, frozen=True):
    """The state is what the log says up to here. Written with every transaction, so that what is lost is noticed."""

    epoch: int
    seq: int


def decode_log(entry: bytes) -> LogRecord:
    """An entry of the log.

    Raises:
        msgspec.DecodeError: it is none, or says what cannot be.
    """
    record = _decode_log(entry)
    if len(record.keys) % KEY_BYTES:
        raise msgspec.ValidationError(f"{len(record.keys)} bytes are no block keys")
    numbers = (record.epoch, record.seq, record.in_flight, record.tokens, record.unused_blocks)
    if any(len(tags) % TAG_BYTES for tags in (record.tag, *record.progress)) or len(record.tag) > TAG_BYTES:
        raise msgspec.ValidationError("these are no tags of requests")
    if not all(0 <= number < _NUMBER_MAX for number in numbers):
        raise msgspec.ValidationError("a number is out of range")
    if max(map(len, (record.op, record.domain, record.tier, record.router, record.cause))) > TEXT_MAX_CHARS:
        raise msgspec.ValidationError(f"a text is longer than {TEXT_MAX_CHARS} characters")
    for one in record.served:
        if not (0 <= one.cached_tokens <= one.prompt_tokens < _NUMBER_MAX and 0 <= one.queued_s < _SECONDS_MAX):
            raise msgspec.ValidationError("a served request's figures cannot be")
        if not 0 <= one.prefill_s < _SECONDS_MAX or len(one.request_id) > TEXT_MAX_CHARS:
            raise msgspec.ValidationError("a served request's figures cannot be")
    return record


class Keyspace:
    """Key names of one model."""

    def __init__(self, model: ModelId) -> None:
        self._prefix = f"kv:{{{model}}}"
        self.domains = f"{self._prefix}:domains"
        self.seqs = f"{self._prefix}:seqs"
        self.log = f"{self._prefix}:log"
        self.routers = f"{self._prefix}:routers"
        self.receipts = f"{self._prefix}:receipts"

    def lease(self, domain: DomainId) -> str:
        return f"{self._prefix}:lease:{domain}"

    def blocks(self, domain: DomainId, epoch: Epoch, tier: Tier) -> str:
        return f"{self._prefix}:blocks:{domain}:{epoch}:{tier}"


encode = msgspec.msgpack.encode
decode_domain: Callable[[bytes], DomainRecord] = decoder(DomainRecord)
decode_heartbeat: Callable[[bytes], HeartbeatRecord] = decoder(HeartbeatRecord)
decode_seq: Callable[[bytes], SeqRecord] = decoder(SeqRecord)
_decode_log: Callable[[bytes], LogRecord] = decoder(LogRecord)
