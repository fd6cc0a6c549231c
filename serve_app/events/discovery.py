"""What a vLLM server tells of its engine over HTTP.

    /v1/models     names of the base model, its path, LoRA adapters
    /metrics       vllm:cache_config_info: block size, blocks, prefix caching; a sample for each data parallel rank
    /tokenize      what it makes prompts with (prompts/probing.py)
    /server_info   event sockets, tokenizer, speculation; only with VLLM_SERVER_DEV_MODE=1
    /version

In: the server. Out: `EngineFacts`. Source: vLLM 0.29, entrypoints/serve and v1/metrics/loggers.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from serve_app.errors import ConfigError, EngineAway
from serve_app.events.exposition import samples
from serve_app.events.server import KEY_VARIABLE, Answer, EngineServer
from serve_app.prompts.probing import identity_of_server

logger = logging.getLogger(__name__)

CACHE_INFO = "vllm:cache_config_info"
_VLLM = "vllm"
_EAGLE = frozenset({"eagle", "eagle3", "mtp", "dflash", "dspark"})  # SpeculativeConfig.use_eagle


class _Card(msgspec.Struct):
    id: str
    owned_by: str = ""
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


@dataclass(frozen=True, slots=True)
class Models:
    """What /v1/models lists."""

    names: tuple[str, ...]  # of the base model, as clients may call it; the first is its usual one
    root: str = ""  # its path or Hugging Face id
    adapters: tuple[str, ...] = ()  # LoRA adapters, as clients name them
    max_model_len: int = 0  # tokens; 0: not told


@dataclass(frozen=True, slots=True)
class Cache:
    """The engine's KV cache; 0 and empty: not told."""

    block_size: int = 0  # tokens
    capacity: int = 0  # blocks of one rank's GPU cache
    prefix_caching: bool = True
    hash_algorithm: str = ""
    match_unit: int = 0  # tokens that are hashed at a time, where that was chosen


@dataclass(frozen=True, slots=True)
class Settings:
    """What only /server_info tells; empty: not told."""

    events: bool | None = None  # whether the engine publishes KV events
    endpoint: str = ""  # as `--kv-events-config` has it, so with a `*` in place of the host
    replay_endpoint: str = ""
    topic: str = ""
    tokenizer: str = ""
    tokenizer_mode: str = ""
    revision: str = ""
    eagle: bool = False
    pooling: bool = False
    offload_chunk_blocks: int = 0


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine's HTTP server says of it."""

    models: Models
    version: str = ""
    ranks: tuple[int, ...] = (0,)  # data parallel ranks that it serves
    cache: Cache | None = None  # None: it gives no metrics
    settings: Settings = Settings()
    identity: tuple[tuple[str, str], ...] = ()


def discover(server: EngineServer, model: str = "") -> EngineFacts:
    """Ask everything.

    Args:
        server: where the engine's API is.
        model: the name that is published, if it was given; else the server's first.

    Raises:
        EngineAway: it is not there, or not yet.
        ConfigError: it is no vLLM server, or refuses.
    """
    health = server.get("/health")
    if not health.ok:
        raise _not_vllm(server, f"/health answers {health.status}")
    models = read_models(server)
    metrics = server.get("/metrics")
    if not metrics.ok:
        raise _not_vllm(server, f"/metrics answers {metrics.status}")
    text = metrics.body.decode("utf-8", "replace")
    ranks, cache = parse_cache(text)
    if cache is None and f"\n{_VLLM}:" in text:
        raise ConfigError(f"{server.url}/metrics has no {CACHE_INFO}: which vLLM is that?")
    if cache is None:
        logger.warning(
            "%s/metrics has no vllm: metrics (--disable-log-stats?): load, block size and capacity are not known",
            server.url,
        )
    name = model or models.names[0]
    if name not in models.names:
        raise ConfigError(
            f"--model {name!r} is no name of the base model at {server.url}: it serves {', '.join(models.names)}"
            + (f", and the LoRA adapters {', '.join(models.adapters)}" if models.adapters else "")
        )

    def tokenize(body: dict[str, Any]) -> Any:
        try:
            answer = server.post("/tokenize", body)
        except EngineAway as error:
            if error.status != httpx.codes.INTERNAL_SERVER_ERROR:
                raise
            return None  # a template that fails on this request, say
        return answer.json() if answer.ok else None

    return EngineFacts(
        models,
        _version(server.get("/version")),
        ranks,
        cache,
        _settings(server),
        identity_of_server(tokenize, name),
    )


def read_models(server: EngineServer) -> Models:
    """Raises: EngineAway, ConfigError: see `discover`."""
    answer = server.get("/v1/models")
    if answer.status in (401, 403):
        raise ConfigError(f"{server.url} wants a key: give it to this process in {KEY_VARIABLE}, or as --api-key")
    if not answer.ok:
        raise _not_vllm(server, f"/v1/models answers {answer.status}")
    try:
        return parse_models(answer.body)
    except ValueError as error:
        raise _not_vllm(server, f"/v1/models {error}") from error


def parse_models(body: bytes) -> Models:
    """
    Raises:
        ValueError: it is no list of models, or one of another server than vLLM.
    """
    try:
        cards = msgspec.json.decode(body, type=_Cards).data
    except msgspec.MsgspecError as error:
        raise ValueError(f"is no list of models ({error})") from error
    if others := {card.owned_by for card in cards} - {_VLLM}:
        raise ValueError(f"lists models that are owned by {', '.join(sorted(map(repr, others)))}")
    base = [card for card in cards if card.parent is None]
    if not base:
        raise ValueError("lists no base model")
    return Models(
        tuple(dict.fromkeys(card.id for card in base)),
        base[0].root or "",
        tuple(sorted(card.id for card in cards if card.parent is not None)),
        base[0].max_model_len or 0,
    )


def parse_cache(text: str) -> tuple[tuple[int, ...], Cache | None]:
    """Ranks and cache from /metrics; no cache, if there are no figures of vLLM's."""
    try:
        infos = samples(text, (CACHE_INFO,)).get(CACHE_INFO, [])
    except ValueError:
        infos = []
    by_rank = {_number(info.labels.get("engine", "0")): info for info in infos}
    if not by_rank:
        return (0,), None
    ranks = tuple(sorted(by_rank))
    labels = by_rank[ranks[0]].labels
    cache = Cache(
        block_size=_number(labels.get("block_size", "")),
        capacity=_capacity(labels, len(ranks)),
        prefix_caching=labels.get("enable_prefix_caching", "True") != "False",
        hash_algorithm=_text(labels.get("prefix_caching_hash_algo", "")),
        match_unit=_number(labels.get("prefix_match_unit", "")),
    )
    return ranks, cache


def _capacity(labels: Mapping[str, str], ranks: int) -> int:
    """Blocks of one rank.

    vLLM's `num_gpu_blocks` is the sum of the ranks, which may differ; its size in tokens is that of the first one.
    """
    blocks, block_size = _number(labels.get("num_gpu_blocks", "")), _number(labels.get("block_size", ""))
    if ranks == 1:
        return blocks
    tokens = _number(labels.get("kv_cache_size_tokens", ""))
    each = blocks // ranks
    return each if each * ranks == blocks and each * block_size == tokens else 0


def parse_settings(config: Mapping[str, Any]) -> Settings:
    """From /server_info's `vllm_config` as JSON; what is not as in vLLM 0.29 is not told."""
    model, events = _section(config, "model_config"), _section(config, "kv_events_config")
    transfer = _section(config, "kv_transfer_config")
    return Settings(
        events=bool(events.get("enable_kv_cache_events")) if "kv_events_config" in config else None,
        endpoint=_text(events.get("endpoint")),
        replay_endpoint=_text(events.get("replay_endpoint")),
        topic=_text(events.get("topic")),
        tokenizer=_text(model.get("tokenizer")),
        tokenizer_mode=_text(model.get("tokenizer_mode")),
        revision=_text(model.get("tokenizer_revision")) or _text(model.get("revision")),
        eagle=_section(config, "speculative_config").get("method") in _EAGLE,
        pooling=_section(config, "scheduler_config").get("runner_type") == "pooling",
        offload_chunk_blocks=_offload_chunk_blocks(transfer, _section(config, "cache_config")),
    )


def _offload_chunk_blocks(transfer: Mapping[str, Any], cache: Mapping[str, Any]) -> int:
    """Blocks that native offload stores as one; 0: there is none."""
    if transfer.get("kv_connector") != "OffloadingConnector":
        return 0
    extra = _section(transfer, "kv_connector_extra_config")
    chunk, size, block = extra.get("blocks_per_chunk"), extra.get("block_size"), cache.get("block_size")
    if isinstance(chunk, int) and chunk > 0:
        return chunk
    return max(1, size // block) if isinstance(size, int) and isinstance(block, int) and block > 0 else 1


def _settings(server: EngineServer) -> Settings:
    """It is there for developers only, and never waited for."""
    try:
        answer = server.get("/server_info?config_format=json")
    except EngineAway as error:
        logger.info("%s: %s; doing without", server.url, error)
        return Settings()
    told = answer.json() if answer.ok else None
    config = told.get("vllm_config") if isinstance(told, dict) else None
    return parse_settings(config) if isinstance(config, dict) else Settings()


def _version(answer: Answer) -> str:
    told = answer.json() if answer.ok else None
    return _text(told.get("version")) if isinstance(told, dict) else ""


def _not_vllm(server: EngineServer, why: str) -> ConfigError:
    return ConfigError(
        f"{server.url} is no vLLM server: {why}. --server is the URL of a vLLM server's API; other engines are not "
        "supported"
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) and value != "None" else ""


def _number(text: str) -> int:
    """Of a label, which is `None` where there is none."""
    return int(text) if text.isascii() and text.isdecimal() else 0
