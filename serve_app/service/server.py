"""One process of the service: follows the indexes, serves HTTP and gRPC on one event loop, ends gently.

SIGTERM, SIGINT   /readyz is red, nothing new is taken on, questions that are there are answered, then it ends
SIGHUP            keys, limits and defaults are read again; what else has changed needs a new start, and is named
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve_app.access import Access
from serve_app.config import EMBEDDED, DecisionSettings
from serve_app.decider import Decider, local_stages
from serve_app.errors import ConfigError
from serve_app.index.mirror import Mirror
from serve_app.indexer import IndexStage, PromptStage
from serve_app.metric_table import PICKER_REQUESTS
from serve_app.ports import is_loopback
from serve_app.service.backend import LocalBackend
from serve_app.service.config import ServiceConfig, TLSSettings
from serve_app.service.discovery import Discovery
from serve_app.service.ext_proc import add_picker, server_options
from serve_app.service.grpc_api import add_score_api
from serve_app.service.http import http_app
from serve_app.service.instruments import PrometheusInstruments, Registered
from serve_app.service.pod_chooser import PodChooser
from serve_app.service.score_service import ScoreService
from serve_app.supervision import Backoff, LoopGuard

logger = logging.getLogger("kvcache.scores")

PREFIX = "/kvcache"  # where Ray's graph has the same endpoints, and the page
_LOOK_S = 1.0
_GRPC_MAX_BYTES_MORE = 1 << 20  # of a message, beyond the prompt


class LocalHost:
    """What a Decider is given in this process."""

    def __init__(self, settings: DecisionSettings, redis_url: str, registered: Registered) -> None:
        self.logger = logger
        self._settings = settings
        self._redis_url = redis_url
        self._registered = registered

    def redis_url(self) -> str:
        return self._redis_url

    def instruments(self) -> PrometheusInstruments:
        return PrometheusInstruments(self._settings.model, self._registered)

    def stages(self, mirror: Mirror) -> tuple[PromptStage, IndexStage]:
        return local_stages(self._settings, mirror)


class ScoreServer:
    """Args:
    config: of the service.
    embedded_url: where the embedded Valkey is, if there is one.
    read_again: the configuration as it is now, at SIGHUP; raises ConfigError.
    """

    def __init__(
        self, config: ServiceConfig, embedded_url: str = "", read_again: Callable[[], ServiceConfig] | None = None
    ) -> None:
        self.config = config
        self._embedded_url = embedded_url
        self._read_again = read_again or (lambda: config)
        self._registered = Registered()
        self._stop = asyncio.Event()
        self.http_port = self.grpc_port = self.picker_port = 0
        self._grpc_names: tuple[str, ...] = ()  # that gRPC's health is asked for

    async def run(self) -> None:
        """Until a signal, or `stop`."""
        self._listen_to_signals()
        self.service = self._service()
        self._grpc_health = health.aio.HealthServicer()
        http, sockets = self._http()
        grpc_server = await self._grpc()
        serving = asyncio.create_task(http.serve(sockets=sockets))
        picker = await self._picker()
        background = [asyncio.create_task(self._watch())]
        if self._discovery is not None:
            background.append(asyncio.create_task(self._discovery.run()))
        scheme, at = "https" if self.config.tls else "http", _shown(self.config.http, self.http_port)
        logger.info("scores and choices at %s://%s, the live page at %s://%s%s/", scheme, at, scheme, at, PREFIX)
        if self.config.grpc:
            logger.info("gRPC at %s", _shown(self.config.grpc, self.grpc_port))
        if self.config.picker:
            logger.info("Envoy's endpoint picker (ext_proc) at %s", _shown(self.config.picker, self.picker_port))
        self._say_if_open()
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
        logger.info("ending: questions that are here are answered, for %g s at most", self.config.drain_s)
        await self._grpc_health.enter_graceful_shutdown()
        http.should_exit = True
        servers = [server for server in (grpc_server, picker) if server is not None]
        await asyncio.gather(serving, *(server.stop(self.config.drain_s) for server in servers))
        for task in background:
            task.cancel()
        await asyncio.gather(*(model.decider.close() for model in self._models))

    def stop(self) -> None:
        self._stop.set()

    # -- parts ------------------------------------------------------------------------------------------------------

    def _service(self) -> ScoreService:
        config, loop = self.config, asyncio.get_running_loop()
        self._discovery = Discovery(config.discovery) if config.discovery else None
        self._models = [
            LocalBackend(Decider(settings, loop, LocalHost(settings, url, self._registered)), url, self._discovery)
            for settings in config.models
            for url in [self._embedded_url if settings.redis_url == EMBEDDED else settings.redis_url]
        ]
        for model in self._models:
            model.decider.start()
        return ScoreService(
            self._models,
            access=Access(config.auth.keys_file),
            limits=config.limits,
            strategy=config.score_strategy,
            lease_s=config.lease_s,
        )

    def _http(self) -> tuple[uvicorn.Server, list[socket.socket]]:
        config = self.config
        listening = bind(config.http, shared=config.workers > 1)
        self.http_port = listening.getsockname()[1]
        app = http_app(self.service, logger=logger, metrics=self._registered.text, also_below=PREFIX)
        tls: dict[str, Any] = {}
        if config.tls:
            tls = {"ssl_certfile": str(config.tls.certificate), "ssl_keyfile": str(config.tls.key)}
        server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=max(1, round(config.drain_s)),
                **tls,
            )
        )
        return server, [listening]

    async def _grpc(self) -> grpc.aio.Server | None:
        config = self.config
        if config.grpc is None:
            return None
        most = config.limits.body_bytes + _GRPC_MAX_BYTES_MORE
        server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", most), ("grpc.so_reuseport", int(config.workers > 1))]
        )
        names = add_score_api(server, self.service, logger)
        health_pb2_grpc.add_HealthServicer_to_server(self._grpc_health, server)
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        self.grpc_port = add_port(server, config.grpc, config.tls)
        self._grpc_names = ("", *names)
        await server.start()
        return server

    async def _picker(self) -> grpc.aio.Server | None:
        config = self.config
        if config.picker is None:
            return None
        most = config.limits.body_bytes
        server = grpc.aio.server(options=[*server_options(most), ("grpc.so_reuseport", int(config.workers > 1))])
        chooser = PodChooser(self.service, self._models[0], config.lease_s, logger)
        counters: Counter[str] = Counter()
        self._registered.show(PICKER_REQUESTS, counters)
        add_picker(server, chooser, max_body_bytes=most, counters=counters)
        health_pb2_grpc.add_HealthServicer_to_server(self._grpc_health, server)
        self.picker_port = add_port(server, config.picker, config.tls)
        await server.start()
        return server

    async def _watch(self) -> None:
        """Once a second: leases that are over, and what gRPC's health is told."""
        guard = LoopGuard("kvcache: leases and health could not be looked at", Backoff(_LOOK_S), logger)
        wait_s, said = 0.0, None
        while True:
            await asyncio.sleep(wait_s)
            wait_s = _LOOK_S
            try:
                self.service.expire()
                whys = [f"{model.model}: {why}" for model in self._models if (why := model.why_not_ready())]
                if whys != said:
                    said = whys
                    logger.info("not ready: %s", "; ".join(whys)) if whys else logger.info("ready")
                    await self._set_health(is_ready=not whys)
                guard.went_well()
            except Exception as error:
                wait_s = guard.failed(error)

    async def _set_health(self, *, is_ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._grpc_names:
            await self._grpc_health.set(name, status)

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _reload(self) -> None:
        try:
            new = self._read_again()
            self.service.configure(
                access=Access(new.auth.keys_file),
                limits=new.limits,
                strategy=new.score_strategy,
                lease_s=new.lease_s,
            )
        except ConfigError as error:
            logger.error("SIGHUP: all stays as it was: %s", error)
            return
        now = {"auth", "limits", "score_strategy", "lease_s"}
        later = [name for name in ServiceConfig.model_fields if getattr(new, name) != getattr(self.config, name)]
        logger.info("SIGHUP: the configuration was read again")
        if needs_start := sorted(set(later) - now):
            logger.warning("SIGHUP: changes of %s need a new start", ", ".join(needs_start))

    def _say_if_open(self) -> None:
        host = self.config.http.rpartition(":")[0]
        if self.service.access.is_open and not is_loopback(host):
            logger.warning(
                "%s is open without keys: whoever reaches it can find out which prompts are cached; set auth.keys_file "
                "(`kvcache key` makes one), or listen on 127.0.0.1",
                self.config.http,
            )


class _Server(uvicorn.Server):
    """Signals are this module's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(address: str, *, shared: bool) -> socket.socket:
    """A listening socket.

    Args:
        shared: other processes of this service have one of the same port.

    Raises:
        OSError: the port is taken, or the host is not here.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind((host, int(port)))
    return listening


def add_port(server: grpc.aio.Server, address: str, tls: TLSSettings | None) -> int:
    """Have it listen there. Returns the port."""
    if tls is None:
        port: int = server.add_insecure_port(address)
    else:
        credentials = grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.certificate.read_bytes())])
        port = server.add_secure_port(address, credentials)
    return port


def _shown(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"
