"""A vLLM replica of Ray Serve LLM that publishes the blocks it holds.

It turns vLLM's KV events on, on Unix sockets of its own (no port can be taken, replicas of one node never meet), and
runs the publisher beside the engine: a process that gets its settings and the engine's load through a pipe, and that
takes the replica out of the index when the pipe ends, however this process came to its end.
"""

import asyncio
import json
import logging
import shutil
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.chat_utils import load_chat_template
from vllm.v1.metrics.loggers import StatLoggerBase

from serve_app.config import REPLICA_HEADER, RouterSettings
from serve_app.deployments.embedded_redis import resolve_redis_url
from serve_app.deployments.lmcache import LMCacheAttachment
from serve_app.errors import ConfigError
from serve_app.events.publisher import SERVED_MAX, Feed, PublisherConfig
from serve_app.events.restarts import Backoff, keep_running
from serve_app.types import Served

logger = logging.getLogger("ray.serve")

LOAD_POLL_S = 0.02


class VLLMReplica(LLMServer):
    """`server_cls` of an LLMConfig whose request router is KVCacheAwareRouter; both read the same settings."""

    async def __init__(self, llm_config: LLMConfig, **kwargs: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        self._settings = router_settings(llm_config)
        self._pod = serve.get_replica_context().replica_id.unique_id
        self._sockets = Path(tempfile.mkdtemp(prefix="kvcache-"))
        self._supervisor: asyncio.Task[None] | None = None
        self._holder: asyncio.Task[None] | None = None
        self._ended = _EndedRequests()
        llm_config.update_engine_kwargs(
            kv_events_config={
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": f"ipc://{self._sockets}/events",
                "replay_endpoint": f"ipc://{self._sockets}/replay",
            }
        )
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
        manager = self._engine_client().logger_manager
        if manager is not None:  # with `disable_log_stats` it is: then nothing is learned of served requests
            manager.stat_loggers.append(self._ended)
        self._supervisor = asyncio.create_task(self._run_publishers())

    async def __serve_build_asgi_app__(self) -> Any:
        app = await super().__serve_build_asgi_app__()  # type: ignore[no-untyped-call]
        app.middleware_stack = None  # vLLM has built it already; Starlette builds it again with ours
        app.add_middleware(_ReplicaHeader, name=self._pod)
        return app

    def _publisher_config(self) -> PublisherConfig:
        frontend = _frontend_kwargs(self._llm_config)
        vllm_config = self._engine_client().vllm_config
        config = PublisherConfig(
            redis_url=resolve_redis_url(self._settings.redis_url),
            model=self._settings.model,
            pod=self._pod,
            endpoint=f"ipc://{self._sockets}/events",
            replay_endpoint=f"ipc://{self._sockets}/replay",
            block_size=vllm_config.cache_config.block_size,
            capacity=vllm_config.cache_config.num_gpu_blocks or 0,
            tokenizer=vllm_config.model_config.tokenizer,
            chat_template=load_chat_template(frontend.get("chat_template")),
            content_format=frontend.get("chat_template_content_format", "auto"),
            template_kwargs=json.dumps(kwargs) if (kwargs := frontend.get("default_chat_template_kwargs")) else "",
            served_names=(self._llm_config.model_id,),  # all that Ray Serve LLM allows; `base:adapter` is a LoRA's
            address=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
        )
        return config if self._lmcache is None else self._lmcache.attach(config, vllm_config.model_config.model)

    def _engine_client(self) -> Any:
        """vLLM's AsyncLLM. Ray has no public way to it."""
        engine: Any = self.engine
        return engine._engine_client

    async def _run_publishers(self) -> None:
        """Keep a publisher running as long as this replica lives."""
        try:
            await keep_running(self._run_publisher, Backoff())
        finally:
            shutil.rmtree(self._sockets, ignore_errors=True)

    async def _run_publisher(self) -> None:
        """One publisher, until it ends. What it is told of its engine is asked anew for each."""
        config = msgspec.json.encode(self._publisher_config())
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "serve_app.events", stdin=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        try:
            process.stdin.write(config + b"\n")
            await self._feed_load(process, process.stdin)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended; below
        except Exception:
            logger.exception("kvcache: the publisher cannot be told of the engine's requests")
        finally:
            process.stdin.close()  # with which it ends
        logger.error("kvcache: the publisher ended with %s", await process.wait())

    async def _feed_load(self, process: asyncio.subprocess.Process, pipe: asyncio.StreamWriter) -> None:
        """Tell the publisher how many requests the engine has, and of those that have ended, whenever that changes."""
        requests = self._engine_client().output_processor
        told = None
        while process.returncode is None:
            now, served = requests.get_num_unfinished_requests(), self._ended.take()
            if now != told or served:
                pipe.write(msgspec.json.encode(Feed(now, served)) + b"\n")
                await pipe.drain()
                told = now
            await asyncio.sleep(LOAD_POLL_S)

    async def __del__(self) -> None:
        tasks: list[asyncio.Task[None] | None] = [getattr(self, name, None) for name in ("_supervisor", "_holder")]
        for task in tasks:
            if task is not None:
                task.cancel()
        await super().__del__()


class _EndedRequests(StatLoggerBase):  # type: ignore[misc]  # vLLM is not followed by mypy
    """vLLM's stat logger interface: takes the figures of requests that have ended."""

    def __init__(self) -> None:  # vLLM makes none of these itself
        self._served: deque[Served] = deque(maxlen=SERVED_MAX)  # while there is no publisher, nobody takes them

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        for ended in iteration_stats.finished_requests if iteration_stats is not None else ():
            self._served.append(
                Served(
                    ended.request_id or "",
                    ended.num_prompt_tokens,
                    ended.num_cached_tokens,
                    ended.queued_time,
                    ended.prefill_time,
                )
            )

    def log_engine_initialized(self) -> None:
        pass

    def take(self) -> list[Served]:
        """Those since the last call."""
        served = list(self._served)
        self._served.clear()
        return served


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


class _ReplicaHeader:
    """ASGI middleware: every answer names the replica that gave it."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._header = (REPLICA_HEADER.encode(), name.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), self._header]
            await send(message)

        await self._app(scope, receive, send_named if scope["type"] == "http" else send)
