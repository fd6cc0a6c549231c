"""What the operator says of an engine, and what the engine says of itself -> the settings of its publishers.

What was given wins, where it can be meant; what cannot be is an error. Without a server all must be given.

    --server http://127.0.0.1:8000, POD_IP 10.0.3.7      pod and address 10.0.3.7:8000, events of tcp://127.0.0.1:5557
    the server has ranks 0 and 1                         pods 10.0.3.7:8000#0 and #1, events of ports 5557 and 5558
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from serve_app.errors import ConfigError
from serve_app.events.discovery import Cache, EngineFacts
from serve_app.events.endpoint import check_endpoint, endpoint_of_rank
from serve_app.events.engine_groups import EngineGroup
from serve_app.events.engine_hash import EngineHasher
from serve_app.events.publisher import PublisherConfig
from serve_app.events.server import EngineServer
from serve_app.events.source import answers_replay
from serve_app.index.connection import connect
from serve_app.types import pod_of_rank

logger = logging.getLogger(__name__)

EVENTS_PORT, REPLAY_PORT = 5557, 5558  # of vLLM's KVEventsConfig, and of its documentation
IP_VARIABLE = "POD_IP"  # by Kubernetes' downward API, as far as the manifest says so
_DEFAULT_HASH = "sha256"


@dataclass(frozen=True, slots=True)
class Given:
    """Options of `kvcache publish`; empty or 0: not given."""

    redis_url: str
    engine: str = ""
    replay: str = ""
    pod: str = ""
    model: str = ""
    address: str = ""
    topic: str = ""
    block_size: int = 0
    capacity: int = 0
    tokenizer: str = ""
    tokenizer_mode: str = ""
    revision: str = ""
    chat_template: str | None = None
    served_names: tuple[str, ...] = ()
    pooling: bool = False
    excludes_tools: bool = False
    attached: tuple[str, ...] = ()
    groups: tuple[EngineGroup, ...] = ()
    eagle: bool = False
    hash_algorithm: str = ""
    hash_seed: str | None = None
    offload_chunk_blocks: int = 0
    data_parallel_size: int = 0
    ranks: tuple[int, ...] = ()

    def check(self, *, discovers: bool) -> None:
        """What can be seen before anybody is asked.

        Args:
            discovers: whether there is a server to ask for what was not given.

        Raises:
            ConfigError: an option is wrong or missing.
        """
        missing = [f"--{name}" for name in ("engine", "pod", "model") if not getattr(self, name)]
        if missing and not discovers:
            raise ConfigError(f"{', '.join(missing)} must be given, or --server URL, which tells them")
        connect(self.redis_url, name="kvcache-publisher").close()
        EngineHasher(self.hash_algorithm or _DEFAULT_HASH, self.hash_seed)
        if self.engine:
            check_endpoint(self.engine, "--engine")
        if self.replay:
            check_endpoint(self.replay, "--replay")
        if self.data_parallel_size > 1 and max(self.ranks, default=0) >= self.data_parallel_size:
            raise ConfigError(
                f"--rank {max(self.ranks)}: with --data-parallel-size {self.data_parallel_size} the last one is "
                f"{self.data_parallel_size - 1}"
            )

    @property
    def all_ranks(self) -> Sequence[int] | None:
        """Data parallel ranks to publish; None: nothing is said of them."""
        if self.ranks:
            return sorted(set(self.ranks))
        return range(self.data_parallel_size) if self.data_parallel_size > 1 else None


def without_server(given: Given) -> list[PublisherConfig]:
    """All is as it was given."""
    return _of_ranks(_config(given), given.all_ranks)


def with_server(given: Given, server: EngineServer, facts: EngineFacts) -> list[PublisherConfig]:
    """What was given, completed by what the engine says.

    Raises:
        ConfigError: the two contradict each other, or there is nothing to publish.
    """
    cache, settings = facts.cache or Cache(), facts.settings
    if not cache.prefix_caching:
        raise ConfigError(f"prefix caching is off at {server.url}: start vLLM without --no-enable-prefix-caching")
    if settings.events is False:
        raise ConfigError(
            f"{server.url} publishes no KV events: start vLLM with --kv-events-config "
            '\'{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557", '
            '"replay_endpoint": "tcp://*:5558"}\''
        )
    if given.block_size and cache.block_size and given.block_size != cache.block_size and not given.groups:
        raise ConfigError(
            f"--block-size {given.block_size}: the engine's blocks have {cache.block_size} tokens; leave the option out"
        )
    for option, ours, theirs in (
        ("--capacity", given.capacity, cache.capacity),
        ("--hash-algorithm", given.hash_algorithm, cache.hash_algorithm),
        ("--tokenizer-mode", given.tokenizer_mode, settings.tokenizer_mode),
    ):
        if ours and theirs and ours != theirs:
            logger.warning("%s %s: the engine says %s; it is published as given", option, ours, theirs)
    address = address_of(given.address, server)
    ranks = given.all_ranks
    if ranks is not None and facts.cache is not None and not set(ranks) <= set(facts.ranks):
        raise ConfigError(f"ranks {list(ranks)} are wanted: the engine at {server.url} has {list(facts.ranks)}")
    if ranks is None and len(facts.ranks) > 1:
        ranks = facts.ranks
    # The only rank of a server is told apart by its ports; requests for the server are its.
    offset = facts.ranks[0] if ranks is None else 0
    engine = given.engine or endpoint_of_rank(_reached(settings.endpoint, server, EVENTS_PORT), offset)
    names = (*facts.models.names, *given.served_names)
    model = given.model or facts.models.names[0]
    complete = msgspec.structs.replace(
        _config(given),
        endpoint=engine,
        replay_endpoint=given.replay or _replay(given, server, facts, offset, (ranks or (0,))[0]),
        pod=given.pod or address,
        model=model,
        address=address,
        topic=given.topic or settings.topic,
        block_size=given.block_size or cache.match_unit or cache.block_size,
        block_size_is_learned=not (given.block_size or cache.match_unit),
        capacity=given.capacity or cache.capacity,
        tokenizer=given.tokenizer or settings.tokenizer or facts.models.root,
        tokenizer_mode=given.tokenizer_mode or settings.tokenizer_mode or "auto",
        revision=given.revision or settings.revision,
        served_names=tuple(dict.fromkeys(name for name in names if name != model)),
        pooling=given.pooling or settings.pooling,
        eagle=given.eagle or settings.eagle,
        hash_algorithm=given.hash_algorithm or _known_hash(cache.hash_algorithm),
        offload_chunk_blocks=given.offload_chunk_blocks or settings.offload_chunk_blocks or 1,
        identity=facts.identity,
    )
    return _of_ranks(complete, ranks)


def address_of(given: str, server: EngineServer) -> str:
    """Where others reach the server: host:port. What was given, the server's own host, `POD_IP`, this host's name."""
    own = "" if _is_local(server.host) else server.host
    host = given or own or os.environ.get(IP_VARIABLE, "") or socket.gethostname()
    with contextlib.suppress(ValueError):  # it is a name, or has a port already
        host = f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    _, colon, port = host.rpartition("]")[2].rpartition(":")
    return host if colon and port.isdecimal() else f"{host}:{server.port}"


def _known_hash(algorithm: str) -> str:
    """What the engine names, if we can compute it: only blocks of sparse attention need it."""
    if not algorithm:
        return _DEFAULT_HASH
    try:
        EngineHasher(algorithm)
    except ConfigError as error:
        logger.warning("%s; taken as %s", error, _DEFAULT_HASH)
        return _DEFAULT_HASH
    return algorithm


def _config(given: Given) -> PublisherConfig:
    return PublisherConfig(
        redis_url=given.redis_url,
        model=given.model,
        pod=given.pod,
        endpoint=given.engine,
        replay_endpoint=given.replay or None,
        topic=given.topic,
        block_size=given.block_size,
        capacity=given.capacity,
        tokenizer=given.tokenizer,
        chat_template=given.chat_template,
        served_names=given.served_names,
        address=given.address,
        attached=given.attached,
        groups=given.groups,
        eagle=given.eagle,
        hash_algorithm=given.hash_algorithm or _DEFAULT_HASH,
        hash_seed=given.hash_seed,
        offload_chunk_blocks=given.offload_chunk_blocks or 1,
        revision=given.revision,
        tokenizer_mode=given.tokenizer_mode or "auto",
        pooling=given.pooling,
        excludes_tools=given.excludes_tools,
    )


def _of_ranks(config: PublisherConfig, ranks: Sequence[int] | None) -> list[PublisherConfig]:
    if ranks is None:
        return [config]
    return [
        msgspec.structs.replace(
            config,
            pod=pod_of_rank(config.pod, number),
            rank=number,
            replica=config.pod,
            endpoint=endpoint_of_rank(config.endpoint, number),
            replay_endpoint=endpoint_of_rank(config.replay_endpoint, number) if config.replay_endpoint else None,
        )
        for number in ranks
    ]


def _replay(given: Given, server: EngineServer, facts: EngineFacts, offset: int, first_rank: int) -> str | None:
    """The replay socket where one is told of, or answers on the usual port; rank 0's, where there are ranks."""
    told = facts.settings.replay_endpoint
    if told:
        return endpoint_of_rank(_reached(told, server, REPLAY_PORT), offset)
    if given.engine or facts.settings.events is not None:
        return None  # it is not where vLLM's usual ports are, or it has none
    usual = endpoint_of_rank(_reached("", server, REPLAY_PORT), offset)
    if answers_replay(endpoint_of_rank(usual, first_rank)):
        return usual
    logger.warning(
        "nobody answers at %s: without `replay_endpoint` in --kv-events-config, or --replay, events that are missed "
        "are lost",
        usual,
    )
    return None


def _reached(endpoint: str, server: EngineServer, port: int) -> str:
    """A socket of the engine's host as it is reached from here: `tcp://*:5557` is where it listens."""
    if endpoint.startswith(("ipc://", "inproc://")):
        return endpoint
    told = endpoint.rpartition(":")[2]
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"tcp://{'127.0.0.1' if _is_unspecified(server.host) else host}:{told if told.isdecimal() else port}"


def _is_local(host: str) -> bool:
    """Whether only this host, or this pod, reaches the server under that name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


def _is_unspecified(host: str) -> bool:
    return host in ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on
