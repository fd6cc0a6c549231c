"""How a sidecar is doing, for a kubelet and for Prometheus: a small HTTP server on a thread of its own.

GET /healthz   200 while the loops turn; else a restart helps
GET /readyz    200 while the engine is there and all of its pods' records are in Redis; else says what is missing
GET /metrics   Prometheus' text
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from typing import ClassVar

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve_app import metric_table as table
from serve_app.errors import ConfigError
from serve_app.events.publisher import Report

ALIVE_S = 120.0  # more than a discovery takes at most, each of its questions at its limit
QUIET_S = 60.0  # a publisher says something every second; while its machine is busy, later
FRESH_S = 15.0  # while Redis does not answer, a publisher waits for it


@dataclass(frozen=True, slots=True)
class Pod:
    """The last report of one pod's publisher."""

    name: str
    report: Report | None  # the last one; None: none yet
    heard_at_s: float  # monotonic: when that was, or when its publisher was started


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The sidecar's state at one turn of its loop."""

    turned_at_s: float  # monotonic: the loop's last turn
    up: bool  # the engine is there
    waiting_for: str  # else for what
    lives: int  # of the engine
    scrapes: Mapping[str, int]  # by result: ok, or why not
    pods: tuple[Pod, ...]

    def sick(self, now_s: float) -> str:
        """Why a restart of the process would help; empty: it would not."""
        if now_s > self.turned_at_s + ALIVE_S:
            return f"the loop has not turned for {now_s - self.turned_at_s:.0f} s"
        quiet = [pod.name for pod in self.pods if now_s > pod.heard_at_s + QUIET_S]
        return f"nothing was heard of the publishers of {', '.join(quiet)} for {QUIET_S:.0f} s" if quiet else ""

    def missing(self, now_s: float) -> str:
        """Why the engine is not in the index; empty: it is."""
        if not self.up:
            return f"waiting for {self.waiting_for}"
        for pod in self.pods:
            if pod.report is None or now_s > pod.heard_at_s + FRESH_S:
                return f"the publisher of {pod.name} has not said anything yet, or lately"
            if not pod.report.connected:
                return f"nobody sends the events of {pod.name}: check --kv-events-config of vLLM, and --engine"
            if not pod.report.joined:
                return f"the record of {pod.name} is not in Redis yet: the log says why"
        return ""


Look = Callable[[], Snapshot]


class HealthServer:
    """Args:
    listen: host:port; port 0: any that is free.
    look: how the sidecar is doing.

    Raises:
        ConfigError: `listen` is no such address, or cannot be listened on.
    """

    def __init__(self, listen: str, look: Look) -> None:
        host, _, port = listen.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"--listen {listen!r} is no address to listen on: write HOST:PORT, e.g. 0.0.0.0:9411")
        registry = CollectorRegistry()
        registry.register(_Metrics(look))

        class Handler(_Handler):
            answers: ClassVar = {
                "/healthz": lambda: _verdict(look().sick(time.monotonic())),
                "/readyz": lambda: _verdict(look().missing(time.monotonic())),
                "/metrics": lambda: (200, CONTENT_TYPE_LATEST, generate_latest(registry)),
            }

        server_class = _ServerV6 if ":" in host else ThreadingHTTPServer
        try:
            self._server = server_class((host, int(port)), Handler)
        except OSError as error:
            raise ConfigError(f"--listen {listen!r} cannot be listened on: {error}") from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _ServerV6(ThreadingHTTPServer):
    address_family = AF_INET6


class _Handler(BaseHTTPRequestHandler):
    timeout = 10.0  # seconds that a client may take
    answers: ClassVar[Mapping[str, Callable[[], tuple[int, str, bytes]]]]

    def do_GET(self) -> None:
        answer = self.answers.get(self.path.partition("?")[0])
        status, kind, body = answer() if answer is not None else (404, "text/plain", b"not found\n")
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """A probe a second is no news."""


def _verdict(problem: str) -> tuple[int, str, bytes]:
    return (503 if problem else 200), "text/plain; charset=utf-8", f"{problem or 'ok'}\n".encode()


class _Metrics(Collector):
    """Made anew of what is known whenever Prometheus asks."""

    def __init__(self, look: Look) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        now, now_s = self._look(), time.monotonic()
        yield _family(table.ENGINE_UP, [((), now.up)])
        yield _family(table.READY, [((), not now.missing(now_s))])
        yield _family(table.ENGINE_LIVES, [((), now.lives)])
        yield _family(table.SCRAPES, (((result,), n) for result, n in now.scrapes.items()))
        told = [(pod, pod.report) for pod in now.pods if pod.report is not None]
        yield _family(
            table.PUBLISHER_EVENTS,
            (
                ((pod.name, result), count)
                for pod, report in told
                for result, count in {"applied": report.applied, "lost": report.lost, **report.skipped}.items()
            ),
        )
        yield _family(table.JOINS, (((pod.name,), report.joins) for pod, report in told))
        yield _family(table.HELD_BLOCKS, (((pod.name,), report.blocks) for pod, report in told))
        yield _family(table.JOINED, (((pod.name,), report.joined) for pod, report in told))
        yield _family(table.DEGRADED, (((pod.name,), report.degraded) for pod, report in told))
        yield _family(
            table.HEARTBEAT_AGE,
            (
                ((pod.name,), report.heartbeat_age_s + now_s - pod.heard_at_s)
                for pod, report in told
                if report.heartbeat_age_s >= 0
            ),
        )


def _family(metric: table.Metric, values: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    """Args: values: those of its labels, and its own."""
    kind = CounterMetricFamily if metric.kind is table.Kind.COUNTER else GaugeMetricFamily
    family = kind(metric.name, metric.text, labels=metric.labels)
    for labels, value in values:
        family.add_metric(list(labels), float(value))
    return family
