"""A vLLM replica of Ray Serve LLM that publishes the blocks it holds.

It turns vLLM's KV events on, on sockets of its own, and runs a publisher for each of the engine's cores (one, or with
internal data parallelism one for each rank): a process that gets its settings and the core's load through a pipe, and
that takes it out of the index when the pipe ends, however this process came to its end.
"""

import asyncio
import json
import logging
import os
import sys
import time
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import DPServer, LLMServer
from vllm.entrypoints.chat_utils import load_chat_template

from serve_app.config import RouterSettings
from serve_app.deployments import rank_header
from serve_app.deployments.answer_headers import AnswerHeaders
from serve_app.deployments.embedded_redis import resolve_redis_url
from serve_app.deployments.engine_cores import EngineCores
from serve_app.deployments.engine_identity import engine_identity, tokenizer_mode
from serve_app.deployments.event_sockets import EventSockets
from serve_app.deployments.lmcache import LMCacheAttachment
from serve_app.errors import ConfigError
from serve_app.events.engine_groups import EngineGroup
from serve_app.events.publisher import Feed, PublisherConfig
from serve_app.supervision import Backoff, keep_running
from serve_app.types import pod_of_rank

logger = logging.getLogger("ray.serve")

LOAD_POLL_S = 0.02
USAGE_POLL_S = 1.0
_WORKER_EXTENSION = "serve_app.deployments.worker_extension.KVCacheReport"
_OFFLOADING = "OffloadingConnector"


class VLLMReplica(LLMServer):
    """`server_cls` of an LLMConfig whose request router is KVCacheAwareRouter; both read the same settings.

    Args:
        redis: is deployed with this one.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, llm_config: LLMConfig, redis: object = None, **kwargs: Any
    ) -> None:
        self._settings = router_settings(llm_config)
        self._pod = serve.get_replica_context().replica_id.unique_id
        self._ranks = self._data_parallel_ranks(llm_config)
        self._sockets = EventSockets(self._ranks)
        self._supervisor: asyncio.Task[None] | None = None
        self._holder: asyncio.Task[None] | None = None
        llm_config.update_engine_kwargs(kv_events_config=self._sockets.kv_events_config())
        # Of the engine's KV cache groups only its workers know all.
        if not llm_config.engine_kwargs.get("worker_extension_cls"):
            llm_config.update_engine_kwargs(worker_extension_cls=_WORKER_EXTENSION)
        _describe_offload(llm_config)
        lmcache = self._settings.lmcache
        self._lmcache = LMCacheAttachment(lmcache, self._pod) if lmcache else None
        if self._lmcache is not None:
            block_size = llm_config.engine_kwargs.get("block_size")
            llm_config.update_engine_kwargs(kv_transfer_config=await self._lmcache.start(block_size))
            self._holder = asyncio.create_task(self._lmcache.hold())
        # The engine's own figure of what was cached, in every answer's usage.
        _frontend_kwargs(llm_config).setdefault("enable_prompt_tokens_details", True)
        await super().__init__(llm_config, **kwargs)

    async def start(self) -> None:
        await super().start()  # type: ignore[no-untyped-call]
        self._identity = await engine_identity(self.engine, self._chat_template())
        self._cores = EngineCores(self._engine_client(), len(self._ranks or (None,)))
        if self._is_spread():
            logger.error("kvcache: ranks of this engine are on other nodes: the index does not know what it holds")
        else:
            self._supervisor = asyncio.create_task(self._run_publishers())

    async def chat(self, request: Any, raw_request_info: Any = None) -> Any:
        return await super().chat(request, self._with_rank(raw_request_info))

    async def completions(self, request: Any, raw_request_info: Any = None) -> Any:
        return await super().completions(request, self._with_rank(raw_request_info))

    async def __serve_build_asgi_app__(self) -> Any:
        app = await super().__serve_build_asgi_app__()  # type: ignore[no-untyped-call]
        app.middleware_stack = None  # vLLM has built it already; Starlette builds it again with ours
        app.add_middleware(
            AnswerHeaders,
            name=self._pod,
            ranks=self._named_ranks,
            explain=self._settings.explain,
            over=self._cores.over,
            model=self._settings.model,
        )
        return app

    def _data_parallel_ranks(self, llm_config: LLMConfig) -> range | None:
        """Ranks of the engine's cores in this replica."""
        size = llm_config.engine_kwargs.get("data_parallel_size") or 1
        return range(size) if size > 1 else None

    @property
    def _named_ranks(self) -> range | None:
        """Ranks of which a request can name one; None: the replica is all that can be chosen."""
        return self._ranks

    def _is_spread(self) -> bool:
        """Whether some of the ranks are where no publisher of this replica hears them.

        Then none is published: routers would send the replica's requests to the ranks that they know, and to no other.
        """
        local: int = self._engine_client().vllm_config.parallel_config.data_parallel_size_local
        return self._ranks is not None and local < len(self._ranks)

    def _with_rank(self, raw_request_info: Any) -> Any:
        if raw_request_info is not None and self._named_ranks is not None:
            rank_header.take(raw_request_info.headers, self._pod)
        return raw_request_info

    def _publisher_config(self, place: int, cache: dict[str, Any]) -> PublisherConfig:
        """Of the engine's core at this place, whose cache is as its KVCacheReport says."""
        frontend = _frontend_kwargs(self._llm_config)
        vllm_config = self._engine_client().vllm_config
        rank = None if self._ranks is None else self._ranks[place]
        endpoints = self._sockets.of_rank(rank)
        config = PublisherConfig(
            redis_url=resolve_redis_url(self._settings.redis_url),
            model=self._settings.model,
            pod=self._pod if rank is None or self._named_ranks is None else pod_of_rank(self._pod, rank),
            rank=rank,
            replica="" if rank is None else self._pod,
            endpoint=endpoints.events,
            replay_endpoint=endpoints.replay,
            block_size=cache.get("block_size") or vllm_config.cache_config.block_size,
            groups=tuple(EngineGroup(**group) for group in cache.get("groups", ())),
            alignment=cache.get("alignment", 0),
            hash_algorithm=vllm_config.cache_config.prefix_caching_hash_algo,
            hash_seed=os.environ.get("PYTHONHASHSEED"),
            offload_chunk_blocks=_offload_chunk_blocks(vllm_config),
            adapter_slots=_adapter_slots(self._llm_config),
            capacity=cache.get("blocks", 0) if self._ranks else vllm_config.cache_config.num_gpu_blocks or 0,
            tokenizer=vllm_config.model_config.tokenizer,
            chat_template=self._chat_template(),
            content_format=frontend.get("chat_template_content_format", "auto"),
            template_kwargs=json.dumps(kwargs) if (kwargs := frontend.get("default_chat_template_kwargs")) else "",
            served_names=(self._llm_config.model_id,),  # all that Ray Serve LLM allows; `base:adapter` is a LoRA's
            pooling=vllm_config.model_config.runner_type == "pooling",
            excludes_tools=bool(frontend.get("exclude_tools_when_tool_choice_none")),
            revision=vllm_config.model_config.tokenizer_revision or vllm_config.model_config.revision or "",
            tokenizer_mode=tokenizer_mode(self._engine_client()),
            identity=self._identity,
            address=ray.util.get_node_ip_address(),
        )
        return config if self._lmcache is None else self._lmcache.attach(config, vllm_config.model_config.model)

    def _adapters(self) -> tuple[str, ...]:
        """LoRA adapters that the engine has, as clients name them. Ray has no public way to them."""
        models = getattr(self.engine, "_oai_models", None)
        return tuple(sorted(getattr(models, "lora_requests", ())))

    def _chat_template(self) -> str | None:
        template: str | None = load_chat_template(_frontend_kwargs(self._llm_config).get("chat_template"))
        return template

    def _engine_client(self) -> Any:
        """vLLM's AsyncLLM. Ray has no public way to it."""
        engine: Any = self.engine
        return engine._engine_client

    async def _run_publishers(self) -> None:
        """Keep a publisher running for each of the engine's cores as long as this replica lives."""
        try:
            async with asyncio.TaskGroup() as publishers:
                for place in range(len(self._ranks or (None,))):
                    publishers.create_task(self._run_publisher(place))
        finally:
            self._sockets.close()

    async def _run_publisher(self, place: int) -> None:
        cache = await self._cores.cache(place)
        await keep_running(
            lambda: self._publish(place, cache), Backoff(), "the publisher of what this replica holds", logger
        )

    async def _publish(self, place: int, cache: dict[str, Any]) -> None:
        """One publisher, until it ends. What it is told of its engine is asked anew for each."""
        config = msgspec.json.encode(self._publisher_config(place, cache))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "serve_app.events", stdin=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        try:
            process.stdin.write(config + b"\n")
            await self._feed_load(place, process, process.stdin)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended; below
        except Exception:
            logger.exception("kvcache: the publisher cannot be told of the engine's requests")
        finally:
            process.stdin.close()  # with which it ends
        logger.error("kvcache: the publisher ended with %s", await process.wait())

    async def _feed_load(self, place: int, process: asyncio.subprocess.Process, pipe: asyncio.StreamWriter) -> None:
        """Tell the publisher of its core's requests whenever there is something new, and once a second.

        A publisher that is told nothing for long says nothing of the load: this process is then frozen.
        """
        told, told_at_s, adapters = None, 0.0, None
        while process.returncode is None:
            # Together, with no wait between: what is counted as in flight is what was told to be accepted.
            now, progress = self._cores.in_flight(place), self._cores.progress(place)
            served, usage, now_s = self._cores.take_ended(place), self._cores.usage(place), time.monotonic()
            if now != told or served or any(progress) or now_s >= told_at_s + USAGE_POLL_S:
                has = self._adapters()
                feed = Feed(now, served, usage, progress, has if has != adapters else None)
                pipe.write(msgspec.json.encode(feed) + b"\n")
                await pipe.drain()
                told, told_at_s, adapters = now, now_s, has
            await asyncio.sleep(LOAD_POLL_S)

    async def __del__(self) -> None:
        tasks: list[asyncio.Task[None] | None] = [getattr(self, name, None) for name in ("_supervisor", "_holder")]
        for task in tasks:
            if task is not None:
                task.cancel()
        await super().__del__()


class DPReplica(VLLMReplica, DPServer):
    """`server_cls` for Ray Serve LLM's data parallel deployments: a gang of replicas, each of which is one rank.

    Serve sends a request to one of the replicas, so whoever chooses the replica has chosen the rank.
    """

    def _data_parallel_ranks(self, llm_config: LLMConfig) -> range | None:
        gang = serve.get_replica_context().gang_context
        return None if gang is None or gang.world_size == 1 else range(gang.rank, gang.rank + 1)

    @property
    def _named_ranks(self) -> range | None:
        return None


def _describe_offload(llm_config: Any) -> None:
    """vLLM's own offload to CPU memory says what it stores, if it is asked to."""
    transfer = llm_config.engine_kwargs.get("kv_transfer_config")
    if isinstance(transfer, dict) and transfer.get("kv_connector") == _OFFLOADING:
        transfer.setdefault("kv_connector_extra_config", {}).setdefault("self_describing_kv_events", True)


def _offload_chunk_blocks(vllm_config: Any) -> int:
    """Blocks that native offload stores as one."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != _OFFLOADING:
        return 1
    extra = transfer.kv_connector_extra_config
    if blocks := extra.get("blocks_per_chunk"):
        return int(blocks)
    return max(1, int(extra.get("block_size") or 0) // int(vllm_config.cache_config.block_size))


def _adapter_slots(llm_config: Any) -> int:
    """LoRA adapters that Ray Serve LLM keeps in a replica, each loaded when a request names it."""
    lora = llm_config.lora_config
    if lora is None or lora.dynamic_lora_loading_path is None:
        return 0
    return int(lora.max_num_adapters_per_replica)


def _frontend_kwargs(llm_config: Any) -> dict[str, Any]:
    """vLLM's server arguments, as the replica will use them."""
    config: Any = llm_config.get_engine_config()
    arguments: dict[str, Any] = config.frontend_kwargs
    return arguments


def router_settings(llm_config: LLMConfig) -> RouterSettings:
    """The settings of the deployment's KVCacheAwareRouter.

    Raises:
        ConfigError: there are none.
    """
    config = llm_config.deployment_config.get("request_router_config")
    kwargs = (
        config.get("request_router_kwargs")
        if isinstance(config, dict)
        else getattr(config, "request_router_kwargs", None)
    )
    if not kwargs:
        raise ConfigError(
            "VLLMReplica needs deployment_config.request_router_config.request_router_kwargs with at least "
            "`model` and `redis_url` (see configs/serve-llm-drop-in.yaml)"
        )
    return RouterSettings(**kwargs)
