"""The service's processes: this one alone, or several that listen on the same ports, each with its own index.

parent    the embedded Valkey, if there is one; starts again a worker that has ended; hands signals on
workers   `python -m serve_app.service`, which ends when the parent does, however that went
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

from serve_app.errors import ConfigError
from serve_app.index.valkey import ValkeyProcess
from serve_app.model import cache_home
from serve_app.service.config import ServiceConfig
from serve_app.service.server import ScoreServer
from serve_app.supervision import Backoff

logger = logging.getLogger("kvcache.scores")

_LOOK_S = 0.2


class WorkerConfig(msgspec.Struct):
    """First line of a worker's stdin. Its end means that the parent has ended."""

    config: str  # ServiceConfig as JSON
    embedded_url: str


def serve(read: Callable[[], ServiceConfig]) -> None:
    """Until a signal.

    Args:
        read: the configuration; again at SIGHUP.

    Raises:
        ConfigError: it is wrong, or a port is taken.
    """
    config = read()
    if config.workers > 1 and any(address and address.endswith(":0") for address in (config.http, config.grpc)):
        raise ConfigError("workers: several processes cannot share a port that any is good for; name http and grpc")
    valkey, url = _embedded(config)
    try:
        if config.workers == 1:
            run_one(ScoreServer(config, url, read))
        else:
            _Workers(config, url).run()
    finally:
        if valkey is not None:
            valkey.stop()


def run_one(server: ScoreServer) -> None:
    """Raises:
    ConfigError: a port is taken, or a host is not here.
    """
    import uvloop

    loop = uvloop.new_event_loop()  # it is not closed: that would wait for a thread that loads a tokenizer
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(server.run())
    except (OSError, RuntimeError) as error:
        addresses = ", ".join(filter(None, (server.config.http, server.config.grpc, server.config.picker)))
        raise ConfigError(f"cannot serve at {addresses}: {error}") from error


def leave() -> NoReturn:
    """End the process at once: all is done, but a thread may be loading a tokenizer from a network that is gone."""
    logging.shutdown()
    os._exit(0)


def socket_path() -> Path:
    """Of the embedded Valkey of this user on this machine."""
    return cache_home() / "scores" / "valkey.sock"


def _embedded(config: ServiceConfig) -> tuple[ValkeyProcess | None, str]:
    if not config.is_embedded:
        return None, ""
    socket = socket_path()
    socket.parent.parent.mkdir(parents=True, exist_ok=True)
    process = ValkeyProcess(socket)
    url = f"unix://{socket}"
    logger.info("embedded Valkey at %s; beside each engine: kvcache publish --redis %s --model ...", url, url)
    return process, url


class _Workers:
    def __init__(self, config: ServiceConfig, url: str) -> None:
        self._config = config
        self._line = msgspec.json.encode(WorkerConfig(config.model_dump_json(), url)) + b"\n"
        self._stop = threading.Event()
        self._children: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        signal.signal(signal.SIGHUP, lambda *_: self._hand_on(signal.SIGHUP))
        backoffs = [Backoff() for _ in range(self._config.workers)]
        started_s = [time.monotonic()] * self._config.workers
        start_at_s = [0.0] * self._config.workers
        self._children = [self._start() for _ in range(self._config.workers)]
        try:
            while not self._stop.wait(_LOOK_S):
                now_s = time.monotonic()
                for i, child in enumerate(self._children):
                    if child.poll() is None:
                        continue
                    if not start_at_s[i]:
                        wait_s = backoffs[i].after(now_s - started_s[i])
                        start_at_s[i] = now_s + wait_s
                        logger.error("worker %d has ended with %s; again in %.1f s", i, child.returncode, wait_s)
                    elif now_s >= start_at_s[i]:
                        self._children[i], started_s[i], start_at_s[i] = self._start(), now_s, 0.0
        finally:
            self._hand_on(signal.SIGTERM)
            for child in self._children:
                try:
                    child.wait(self._config.drain_s + 5)
                except subprocess.TimeoutExpired:
                    child.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-m", "serve_app.service"], stdin=subprocess.PIPE)
        assert child.stdin is not None
        child.stdin.write(self._line)
        child.stdin.flush()
        return child

    def _hand_on(self, number: signal.Signals) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)
