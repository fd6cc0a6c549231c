"""A Serve cluster of our own on this machine: started in the background, watched until it serves, stopped whole.

It runs `serve run CONFIG` in a session of its own, on a new Ray cluster (never one that is there already), and writes
down its process id. All that comes of it has a mark in its environment. Stopping asks it to end, waits, and then ends
what is left with that mark, by process id: also when the server itself is long gone.
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
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import yaml

from serve_app import readiness
from serve_app.access import KEY_VARIABLE, own_key_header
from serve_app.errors import ConfigError, KVCacheError
from serve_app.extras import require_module
from serve_app.model import cache_home
from serve_app.serve_config import Listening, engines, graphs, listening, openai_prefixes

START_TIMEOUT_S = 900.0
JOIN_TIMEOUT_S = 60.0  # once all else is there; then it serves, and somebody may ask `kvcache doctor` why
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

STACK_VARIABLE = "KVCACHE_STACK"
"""The mark: state file and id of the stack that a process is of."""

Progress = Callable[[str], None]


class StackError(KVCacheError):
    """The stack did not start, or ended by itself. The message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True)
class Running:
    """A stack that was started: what is needed to find and stop it."""

    pid: int
    created_s: float  # creation time of the process, so that a reused pid is not taken for it
    url: str  # empty: Serve has no HTTP proxy
    config: str
    log: str
    graph: str | None  # route prefix of the graph's application
    openai: tuple[str, ...] = ()  # route prefixes of the OpenAI APIs
    mark: str = ""  # value of STACK_VARIABLE

    @property
    def is_tls(self) -> bool:
        return self.url.startswith("https:")

    def process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            return process if abs(process.create_time() - self.created_s) < 1 and _is_there(process) else None
        except psutil.NoSuchProcess:
            return None


class Orphan(NamedTuple):
    """A process of a stack whose server has ended."""

    pid: int
    command: str
    stack: str


def last() -> Running | None:
    """The stack that `start` has started and nobody has stopped. Its server may have ended by itself."""
    try:
        told = json.loads(_state_file().read_text())
        return Running(**{**told, "openai": tuple(told["openai"])})
    except (OSError, TypeError, KeyError, json.JSONDecodeError):
        return None


def current() -> Running | None:
    """The same, if its server is there."""
    running = last()
    return running if running is not None and running.process() is not None else None


def config_file() -> Path:
    """The config of the stack that was started last."""
    return _state_file().with_name("serve.yaml")


def orphans(running: Running | None) -> list[Orphan]:
    """Processes of our stacks that are not of `running`."""
    found = []
    for process, mark in _marked():
        if running is None or mark != running.mark:
            with contextlib.suppress(psutil.Error):
                found.append(Orphan(process.pid, process.name(), mark.rpartition(":")[2]))
    return found


def start(config: Mapping[str, Any], *, direct: bool, on_progress: Progress, name: str = "") -> Running:
    """Start a stack and wait until it serves. One that runs already is an error: it may have another config.

    Args:
        config: a Serve config (schema of `serve run`).
        direct: stream straight from the replicas, through HAProxy.
        on_progress: told, in words, whenever there is something new to say.
        name: what the config is called, for people.

    Raises:
        ConfigError: one is running, the port is taken, the config is none, or the engine is not installed.
        StackError: it did not come up. Nothing of it is left.
    """
    where = listening(config)
    wanted = readiness.names(config)
    if any(engines(config)):
        require_module("vllm", "an application with engines", "cpu", "gpu")
    _require_nothing_there(where)

    home = _state_file().parent
    home.mkdir(parents=True, exist_ok=True)
    path, log, status = config_file(), home / "serve.log", _status_file()
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    status.unlink(missing_ok=True)
    mark = f"{_state_file()}:{uuid.uuid4().hex}"
    environment = {**(DIRECT_ENV if direct else {}), **os.environ, **_LOCAL_ENV, STACK_VARIABLE: mark}
    process = _serve_run(path, status, log, environment)
    running = Running(
        process.pid,
        psutil.Process(process.pid).create_time(),
        where.url if where is not None else "",
        name or str(path),
        str(log),
        next((graph.prefix for graph in graphs(config)), None) if where is not None else None,
        tuple(openai_prefixes(config)) if where is not None else (),
        mark,
    )
    try:
        _state_file().write_text(json.dumps(asdict(running)))
        _wait_until_serving(running, wanted, process, on_progress)
    except BaseException:
        stop(running, on_progress=lambda _: None)
        raise
    return running


def stop(running: Running, *, on_progress: Progress) -> None:
    """Stop the stack with all that belongs to it."""
    process = running.process()
    family = [each for each, mark in _marked() if mark == running.mark] if running.mark else []
    if process is not None:
        family.extend(each for each in _family(process) if each not in family)
        on_progress(f"asking the server (pid {running.pid}) to stop")
        _send(process, signal.SIGINT)
        _wait_gone([process], STOP_TIMEOUT_S)
    _end(family, on_progress, 5 if process is not None else 0)
    if running.mark:  # what has started meanwhile
        _end([each for each, mark in _marked() if mark == running.mark], lambda _: None)
    _state_file().unlink(missing_ok=True)
    _status_file().unlink(missing_ok=True)


def end(left: Sequence[Orphan], *, on_progress: Progress) -> None:
    """End what is left of stacks that nothing else is known of."""
    pids = {orphan.pid for orphan in left}
    _end([process for process, _ in _marked() if process.pid in pids], on_progress, patience_s=0)


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


def _status_file() -> Path:
    """What Serve says of its applications, as serve_run.py writes it."""
    return _state_file().with_name("status.json")


def _serve_status() -> dict[str, Any]:
    """Empty while it has not said anything."""
    try:
        status: dict[str, Any] = json.loads(_status_file().read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return status


def _require_nothing_there(where: Listening | None) -> None:
    """Raises:
    ConfigError: a stack, what is left of one, or somebody on the port.
    """
    if (running := current()) is not None:
        raise ConfigError(f"a server is already running at {running.url} (pid {running.pid}): `kvcache down` stops it")
    if left := orphans(None):
        raise ConfigError(f"{len(left)} processes of an earlier `kvcache up` are left: `kvcache down` ends them")
    if where is not None and (error := why_taken(where.host, where.port)):
        raise ConfigError(f"port {where.port} on {where.host} is taken ({error}): choose another with --port")


def why_taken(host: str, port: int) -> str:
    """Why nobody can listen there; empty: it is free."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return ""


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


def _serve_run(config: Path, status: Path, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "serve_app.serve_run", str(config), str(status)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _wait_until_serving(
    running: Running, wanted: Sequence[str], process: subprocess.Popen[bytes], on_progress: Progress
) -> None:
    """Serving means: Serve runs every application, each OpenAI API answers, every replica is in the graph's index."""
    started_s = time.monotonic()
    runs_since_s: float | None = None
    said = ""
    while True:
        status = _serve_status()
        if why := readiness.why_failed(status):
            raise StackError(f"{why}\n{log_tail(running)}")
        waiting_for = readiness.not_running(wanted, status) or _no_api(running)
        now_s = time.monotonic()
        if not waiting_for:
            runs_since_s = runs_since_s or now_s
            waiting_for = _not_joined(running, status)
            if waiting_for and now_s - runs_since_s > JOIN_TIMEOUT_S:
                on_progress(f"[yellow]still waiting for {waiting_for}[/yellow]; `kvcache doctor` looks into it")
                return
        if not waiting_for:
            return
        if process.poll() is not None:
            raise StackError(f"the server ended with status {process.returncode}:\n{log_tail(running)}")
        if now_s - started_s > START_TIMEOUT_S:
            raise StackError(f"after {now_s - started_s:.0f} s still waiting for {waiting_for}:\n{log_tail(running)}")
        if waiting_for != said:
            on_progress(f"waiting for {waiting_for}")
            said = waiting_for
        time.sleep(_POLL_S)


def _not_joined(running: Running, status: Mapping[str, Any]) -> str:
    if running.graph is None or running.is_tls:
        return ""
    described = describe(running)
    return "the kvcache application" if described is None else readiness.not_joined(status, described)


def _no_api(running: Running) -> str:
    """Which OpenAI API does not answer; with TLS Serve's own word is enough, for it may want a certificate of ours."""
    for prefix in () if running.is_tls else running.openai:
        try:
            httpx.get(f"{running.url}{prefix}/v1/models", timeout=10).raise_for_status()
        except httpx.HTTPError:
            return f"the OpenAI API{f' at {prefix}' if prefix else ''}"
    return ""


def _marked() -> Iterator[tuple[psutil.Process, str]]:
    """Processes of stacks that were started with this state file, and their marks."""
    ours = f"{_state_file()}:"
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mark = process.environ().get(STACK_VARIABLE, "")
            if mark.startswith(ours) and process.pid != os.getpid() and _is_there(process):
                yield process, mark


def _end(processes: Sequence[psutil.Process], on_progress: Progress, patience_s: float = 5) -> None:
    """Args: patience_s: how long they may take to end by themselves."""
    left = [process for process in processes if _is_there(process)]
    if left:
        on_progress(f"ending {len(left)} processes that are left")
    for process in _wait_gone(left, patience_s):
        _send(process, signal.SIGTERM)
    for process in _wait_gone(left, 5):
        _send(process, signal.SIGKILL)
    _wait_gone(left, 5)


def _wait_gone(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
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
