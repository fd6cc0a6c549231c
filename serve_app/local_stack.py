"""A Serve cluster of our own on this machine: started in the background, watched until it serves, stopped whole.

It runs `serve run CONFIG` in a session of its own, on a new Ray cluster (never one that is there already), and writes
down its process id. Stopping asks it to end, waits, and then ends what is left of its process tree, by process id.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from serve_app.access import KEY_VARIABLE, own_key_header
from serve_app.errors import ConfigError, KVCacheError
from serve_app.extras import require_module
from serve_app.model import cache_home

START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 60.0
_POLL_S = 0.5

# Direct streaming, as in configs/direct.env; and short drains, for nobody waits behind a load balancer here.
_HAPROXY = Path(sys.executable).with_name("kvcache-haproxy")  # installed with this package
DIRECT_ENV = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
    **({"RAY_SERVE_HAPROXY_BINARY_PATH": str(_HAPROXY)} if _HAPROXY.exists() else {}),
    "RAY_SERVE_INGRESS_ROUTER_REPLICAS_PER_NODE": "2",
}
_LOCAL_ENV = {
    "RAY_ADDRESS": "local",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}

# The `serve` command, which stops on SIGINT: a background shell hands on an ignored one, so it is set again.
_SERVE_RUN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ray.serve.scripts import cli; cli()"
)

Progress = Callable[[str], None]


class StackError(KVCacheError):
    """The stack did not start, or ended by itself. The message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True)
class Running:
    """A stack that was started: what is needed to find and stop it."""

    pid: int
    created_s: float  # creation time of the process, so that a reused pid is not taken for it
    url: str
    config: str
    log: str
    replicas: int  # of all LLM deployments together
    graph: str | None  # route prefix of the graph's application

    def process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            return process if abs(process.create_time() - self.created_s) < 1 and process.is_running() else None
        except psutil.NoSuchProcess:
            return None


def current() -> Running | None:
    """The stack that `start` has started and nobody has stopped."""
    try:
        running = Running(**json.loads(_state_file().read_text()))
    except (FileNotFoundError, TypeError, json.JSONDecodeError):
        return None
    return running if running.process() is not None else None


def start(config: Mapping[str, Any], *, direct: bool, on_progress: Progress, name: str = "") -> Running:
    """Start a stack and wait until it serves. One that runs already is an error: it may have another config.

    Args:
        config: a Serve config (schema of `serve run`).
        direct: stream straight from the replicas, through HAProxy.
        on_progress: told, in words, whenever there is something new to say.
        name: what the config is called, for people.

    Raises:
        ConfigError: one is running, the port is taken, or the engine is not installed.
        StackError: it did not come up.
    """
    if _applications(config, ":build_llm"):
        require_module("vllm", "an application with engines", "cpu", "gpu")
    if (running := current()) is not None:
        raise ConfigError(f"a server is already running at {running.url} (pid {running.pid}): `kvcache down` stops it")
    host = config.get("http_options", {}).get("host", "127.0.0.1")
    port = int(config.get("http_options", {}).get("port", 8000))
    _require_free(host, port)

    home = _state_file().parent
    home.mkdir(parents=True, exist_ok=True)
    path, log = home / "serve.yaml", home / "serve.log"
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    environment = {**(DIRECT_ENV if direct else {}), **os.environ, **_LOCAL_ENV}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE_RUN, "run", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    running = Running(
        process.pid,
        psutil.Process(process.pid).create_time(),
        f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}",  # noqa: S104  # compared, not listened on
        name or str(path),
        str(log),
        _replica_count(config),
        _graph_prefix(config),
    )
    _state_file().write_text(json.dumps(asdict(running)))
    try:
        _wait_until_serving(running, process, on_progress)
    except BaseException:
        stop(running, on_progress=lambda _: None)
        raise
    return running


def stop(running: Running, *, on_progress: Progress) -> None:
    """Stop the stack with all that belongs to it."""
    process = running.process()
    if process is not None:
        family = _family(process)
        on_progress(f"asking the server (pid {running.pid}) to stop")
        _send(process, signal.SIGINT)
        _wait_gone([process], STOP_TIMEOUT_S)
        left = [member for member in family if _is_there(member)]
        if left:
            on_progress(f"ending {len(left)} processes that are left")
        for member in _wait_gone(left, 5):
            _send(member, signal.SIGTERM)
        for member in _wait_gone(left, 5):
            _send(member, signal.SIGKILL)
        _wait_gone(left, 5)
    _state_file().unlink(missing_ok=True)


def describe(running: Running) -> dict[str, Any] | None:
    """What the graph says of the pods; None while it does not answer.

    Raises:
        ConfigError: it wants a key that we do not have.
    """
    if running.graph is None:
        return None
    try:
        got = httpx.get(f"{running.url}{running.graph}/v1/pods", headers=own_key_header(), timeout=10)
        if got.status_code in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
            raise ConfigError(
                f"the graph refuses to tell of its pods ({got.status_code}): set {KEY_VARIABLE} to a key of its "
                "keys_file that has `admin: true`"
            )
        answer: dict[str, Any] = got.raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        return None
    return answer


def log_tail(running: Running, lines: int = 30) -> str:
    return "\n".join(Path(running.log).read_text(errors="replace").splitlines()[-lines:])


# -- inside -----------------------------------------------------------------------------------------------------------


def _state_file() -> Path:
    return cache_home() / "run" / "stack.json"


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} is taken ({error.strerror}): choose another with --port"
            ) from error


def with_kv_blocks(config: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """A Serve config whose engines have so few KV blocks that they evict, and a context that still fits into these.

    Raises:
        ConfigError: no application of it is ours, with engines.
    """
    pressed = copy.deepcopy(dict(config))
    engines = [app["args"]["llm"] for app in pressed["applications"] if "llm" in (app.get("args") or {})]
    if not engines:
        raise ConfigError("the config has no application of serve_app.app:build_llm to give fewer KV blocks to")
    for llm in engines:
        engine = llm.setdefault("engine_kwargs", {})
        engine["num_gpu_blocks_override"] = blocks
        if "max_model_len" in engine and "block_size" in engine:
            # vLLM keeps one block for itself, and does not start if the longest prompt does not fit.
            engine["max_model_len"] = min(engine["max_model_len"], (blocks - 1) * engine["block_size"])
    return pressed


def _applications(config: Mapping[str, Any], builder: str) -> list[Mapping[str, Any]]:
    return [app for app in config.get("applications", []) if str(app.get("import_path", "")).endswith(builder)]


def _replica_count(config: Mapping[str, Any]) -> int:
    deployments = [app["args"]["llm"].get("deployment_config", {}) for app in _applications(config, ":build_llm")]
    return sum(int(deployment.get("num_replicas", 1)) for deployment in deployments)


def _graph_prefix(config: Mapping[str, Any]) -> str | None:
    return next((app.get("route_prefix", "/") for app in _applications(config, ":build_kvcache")), None)


def _wait_until_serving(running: Running, process: subprocess.Popen[bytes], on_progress: Progress) -> None:
    """Serving means: the OpenAI API lists its models, and every replica is in the index."""
    started_s = time.monotonic()
    said = ""
    while True:
        waiting_for = _what_is_missing(running)
        if waiting_for is None:
            return
        waited_s = time.monotonic() - started_s
        if process.poll() is not None:
            raise StackError(f"the server ended with status {process.returncode}:\n{log_tail(running)}")
        if waited_s > START_TIMEOUT_S:
            raise StackError(f"after {waited_s:.0f} s still waiting for {waiting_for}:\n{log_tail(running)}")
        if waiting_for != said:
            on_progress(f"waiting for {waiting_for}")
            said = waiting_for
        time.sleep(_POLL_S)


def _what_is_missing(running: Running) -> str | None:
    if running.graph is not None:
        answer = describe(running)
        if answer is None:
            return "Ray and the kvcache application"
        live = sum(1 for pod in answer["pods"] if pod["live"])
        if live < running.replicas:
            return f"vLLM replicas to join the index ({live} of {running.replicas})"
    try:
        httpx.get(f"{running.url}/v1/models", timeout=10).raise_for_status()
    except httpx.HTTPError:
        return "the OpenAI API"
    return None


def _wait_gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return list(alive)


# Processes end whenever they want, so also between any two of the calls below: that one is gone must not keep the
# rest from being stopped.


def _family(process: psutil.Process) -> list[psutil.Process]:
    """The process and all that it has started, and they."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [process]


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
