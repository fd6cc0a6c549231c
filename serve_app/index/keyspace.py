"""Every Redis key name, and every record that is stored under one. No other module builds a key name.

    kv:{m}:domains                          hash    domain id -> DomainRecord
    kv:{m}:lease:<domain>                   string  HeartbeatRecord, with expiry; gone = the domain is dead
    kv:{m}:blocks:<domain>:<epoch>:<tier>   set     8-byte block keys: the state that a new follower loads
    kv:{m}:seqs                             hash    domain id -> epoch and number of its last entry in the log
    kv:{m}:log                              stream  one LogRecord per entry, under the field `r`
    kv:{m}:routers                          zset    router id -> seconds since 1970 when it was last there
    kv:{m}:receipts                         stream  one receipt per entry (JSON), under the field `r`, the last thousand

`{m}` is a hash tag: all keys of a model are in one slot of a Redis Cluster, so transactions work there.
Records are msgpack arrays; fields are only ever added at the end, with defaults.
"""

from __future__ import annotations

import msgspec

from serve_app.types import Domain, DomainId, EngineSpec, Epoch, ModelId, PodId, Served, Tier

LOG_FIELD = b"r"


class DomainRecord(msgspec.Struct, array_like=True, frozen=True):
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

    @classmethod
    def of(cls, domain: Domain, tiers: tuple[str, ...] = ()) -> DomainRecord:
        spec = domain.spec
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
        )

    def domain(self, domain_id: DomainId) -> Domain:
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
            ),
            pod=None if self.pod is None else PodId(self.pod),
            address=self.address,
            degraded=self.degraded,
            attached=tuple(DomainId(domain) for domain in self.attached),
            chunk_size=self.chunk_size,
        )


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
    """One change. `op` is join | add | remove | clear | leave; or load | route, which are no state of a domain.

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


class SeqRecord(msgspec.Struct, array_like=True, frozen=True):
    """The state is what the log says up to here. Written with every transaction, so that what is lost is noticed."""

    epoch: int
    seq: int


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
decode_domain = msgspec.msgpack.Decoder(DomainRecord).decode
decode_heartbeat = msgspec.msgpack.Decoder(HeartbeatRecord).decode
decode_seq = msgspec.msgpack.Decoder(SeqRecord).decode
decode_log = msgspec.msgpack.Decoder(LogRecord).decode
