"""Settings, as they stand in a Serve YAML. Unknown names are errors; every default is good for production.

In: the `args` of an application, or `request_router_kwargs`. Out: frozen pydantic models.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt

from serve_app.errors import ConfigError
from serve_app.limits import Limits
from serve_app.routing.choice import Policy
from serve_app.routing.costs import TIER_LOAD, CostWeights
from serve_app.scoring import Strategy
from serve_app.types import Tier

EMBEDDED = "embedded"
"""As `redis_url`: a Valkey that the `kvcache` application starts on this node. For one node only."""

REPLICA_HEADER = "x-kvcache-replica"
"""Response header that names the replica which answered."""

MATCHED_HEADER = "x-kvcache-matched"
"""Response header, with `explain`: prompt tokens that the replica held when it was chosen."""

REASON_HEADER = "x-kvcache-reason"
"""Response header, with `explain`: what the choice rested on; a label of kvcache_router_decisions_total."""

DEFAULT_PREFIX_STORE_BYTES = 512 * 1024**2

_WEIGHTS = CostWeights()


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_enum_values=False)


class CostSettings(_Settings):
    """What counts how much in a replica's cost, in tokens of prefill (serve_app/routing/costs.py)."""

    tier_load: Annotated[
        dict[str, NonNegativeFloat], Field(description="Loading a token from a tier, as a share of its prefill.")
    ] = Field(default_factory=lambda: {str(tier): share for tier, share in TIER_LOAD.items()})
    in_flight_tokens: Annotated[NonNegativeFloat, Field(description="What one request in flight costs.")] = (
        _WEIGHTS.in_flight_tokens
    )
    imbalance_tokens: Annotated[
        NonNegativeFloat,
        Field(description="What it costs to have more than a share of the fleet's requests, by means."),
    ] = _WEIGHTS.imbalance_tokens
    displace: Annotated[
        NonNegativeFloat, Field(description="What a computed token costs beyond its own time: others wait, blocks go.")
    ] = _WEIGHTS.displace
    adapter_load_s: Annotated[
        NonNegativeFloat, Field(description="Seconds that a replica takes to load a LoRA adapter.")
    ] = _WEIGHTS.adapter_load_s

    def weights(self) -> CostWeights:
        return CostWeights(
            tier_load={**TIER_LOAD, **{Tier(tier): share for tier, share in self.tier_load.items()}},
            in_flight_tokens=self.in_flight_tokens,
            imbalance_tokens=self.imbalance_tokens,
            displace=self.displace,
            adapter_load_s=self.adapter_load_s,
        )


class AuthSettings(_Settings):
    """Who may ask the Score API."""

    keys_file: Annotated[
        str,
        Field(description="Path of the keys (serve_app/access.py); read again when it changes. Empty: no key needed."),
    ] = ""


class IndexSettings(_Settings):
    """Where the index of one model is, and how much of it to hold."""

    model: Annotated[str, Field(description="Model id that clients send; names the key space in Redis.")]
    redis_url: Annotated[
        str,
        Field(
            description="URL of Redis or Valkey: redis://, rediss:// (TLS), unix://, redis+sentinel:// or "
            "redis+cluster:// (?password_file=/path keeps the password out of it); or `embedded`."
        ),
    ] = EMBEDDED
    max_blocks: Annotated[PositiveInt, Field(description="Cap of a mirror, in blocks (about 50 bytes each).")] = (
        20_000_000
    )
    tier_order: Annotated[tuple[str, ...], Field(description="Cache tiers from fastest to slowest.")] = (
        "gpu",
        "cpu",
        "lmcache",
        "storage",
    )
    prefix_store_bytes: Annotated[PositiveInt, Field(description="Cap of a prefix store, in bytes.")] = (
        DEFAULT_PREFIX_STORE_BYTES
    )
    cost: Annotated[CostSettings, Field(description="Weights of `strategy: expected_ttft`.")] = CostSettings()
    limits: Annotated[Limits, Field(description="How much of a request is looked at, and how many.")] = Limits()


class LMCacheSettings(_Settings):
    """An LMCache server per node, shared by the node's replicas (vLLM's LMCacheMPConnector)."""

    size_gb: Annotated[float, Field(gt=0, description="Host memory for KV blocks, in GB.")] = 4.0
    chunk_size: Annotated[
        PositiveInt, Field(description="Tokens per chunk: a multiple of the engine's block size.")
    ] = 256
    eviction_policy: Annotated[
        Literal["LRU", "ARC", "IsolatedLRU", "noop"], Field(description="As `lmcache server` names it.")
    ] = "LRU"
    linger_s: Annotated[
        float, Field(ge=0, description="How long a server outlives its last replica, so that a restart finds it.")
    ] = 60.0
    attach: Annotated[
        str,
        Field(
            pattern=r"^(|[^:/\s]+:\d+)$",
            description="host:port of a server that runs already; then none is started, and its own size, chunk size "
            "and policy apply. 127.0.0.1 means the one on the replica's node.",
        ),
    ] = ""

    def check_block_size(self, block_size: int, chunk_size: int | None = None) -> None:
        """Whole chunks are whole blocks.

        Raises:
            ConfigError: they are not; vLLM would fail at start with less to go by.
        """
        chunk_size = chunk_size or self.chunk_size
        if chunk_size % block_size:
            where = f"of the LMCache server at {self.attach}" if self.attach else "lmcache.chunk_size"
            raise ConfigError(
                f"{where} {chunk_size} is no multiple of the engine's block size {block_size}: "
                f"use {max(1, round(chunk_size / block_size)) * block_size}"
            )


class DecisionSettings(IndexSettings):
    """How one model's requests are decided."""

    policy: Annotated[Policy, Field(description="kv_aware, or a baseline to compare with.")] = Policy.KV_AWARE
    strategy: Annotated[Strategy, Field(description="How kv_aware weighs what the replicas hold.")] = (
        Strategy.EXPECTED_TTFT
    )
    tokenize_deadline_s: Annotated[
        float, Field(gt=0, description="After this the known prefix decides; the tokens arrive for the next request.")
    ] = 0.05
    decision_deadline_s: Annotated[
        float, Field(gt=0, description="After this a request goes to the least-loaded replica.")
    ] = 0.5


class RouterSettings(DecisionSettings):
    """`request_router_kwargs` of `KVCacheAwareRouter`. The replica's publisher reads them too."""

    prefix_lookup: Annotated[
        Literal["local", "deployment"], Field(description="Prompt -> block keys in the router, or in PrefixStore.")
    ] = "local"
    tokenization: Annotated[
        Literal["local", "deployment"],
        Field(description="Where `prefix_lookup: local` has long cold text tokenized: threads, or Tokenizer."),
    ] = "local"
    index_query: Annotated[
        Literal["local", "deployment"], Field(description="Keys -> matches from the router's mirror, or BlockIndex.")
    ] = "local"
    graph_app: Annotated[str, Field(description="Serve application that has the graph's deployments.")] = "kvcache"
    explain: Annotated[
        bool,
        Field(description="Answers say what the choice rested on, in x-kvcache-matched (tokens) and x-kvcache-reason."),
    ] = False
    lmcache: Annotated[
        LMCacheSettings | None, Field(description="An LMCache server per node; absent: none. Read by the replicas.")
    ] = None


class GraphArgs(IndexSettings):
    """Arguments of `serve_app.app:build_kvcache`."""

    strategy: Annotated[Strategy, Field(description="How a match becomes a score, where a request does not say.")] = (
        Strategy.LONGEST_PREFIX
    )
    auth: Annotated[AuthSettings, Field(description="Keys of the Score API, receipts and pods.")] = AuthSettings()
    tokenizer_replicas: PositiveInt = 1
    prefix_store_replicas: PositiveInt = 1
    block_index_replicas: PositiveInt = 1
    scorer_replicas: PositiveInt = 1
    num_cpus: Annotated[float, Field(ge=0, description="Ray CPUs that each of the graph's replicas reserves.")] = 0.1


class OpenAIArgs(_Settings):
    """Arguments of `serve_app.app:build_openai_app`: those of `ray.serve.llm:build_openai_app`, and `kvcache`."""

    llm_configs: Annotated[
        list[Any],
        Field(
            min_length=1,
            description="Ray Serve LLM's `LLMConfig`s, or their paths. `model_source` may be builtin:...",
        ),
    ]
    kvcache: Annotated[
        dict[str, Any], Field(description="RouterSettings of every model; `model` is the LLMConfig's model id.")
    ] = Field(default_factory=dict)
    ingress_cls_config: Annotated[Any, Field(description="As Ray's; without direct streaming only.")] = None
    ingress_deployment_config: Annotated[
        dict[str, Any],
        Field(description="Serve options of the OpenAI ingress, which is there only without direct streaming."),
    ] = Field(default_factory=dict)


class LLMArgs(_Settings):
    """Arguments of `serve_app.app:build_llm`."""

    llm: Annotated[dict[str, Any], Field(description="A Ray Serve LLM `LLMConfig`. `model_source` may be builtin:...")]
    routing: Annotated[dict[str, Any], Field(description="RouterSettings; `model` defaults to the LLM's model id.")] = (
        Field(default_factory=dict)
    )
    lmcache: Annotated[
        dict[str, Any] | None, Field(description="LMCacheSettings: an LMCache server per node; absent: none.")
    ] = None
    ingress: Annotated[
        dict[str, Any],
        Field(description="Serve options of the OpenAI ingress, which is there only without direct streaming."),
    ] = Field(default_factory=dict)
