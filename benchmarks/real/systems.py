"""The systems under test: two real vLLM engines behind something that routes. Only one runs at a time.

    kv_aware, least_loaded, round_robin   this project, `routing.policy`         (configs/quickstart.yaml)
    ray_prefix                            Ray's PrefixCacheAffinityRouter        (ray_prefix.py)
    vllm_router_cache_aware, _kv_aware    vllm-router of PyPI, in front of plain vLLM servers

The engines have the same options everywhere. Those behind vllm-router are started once for both of its policies.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from benchmarks.overhead.router_venv import RouterInstall
from benchmarks.real.named_engine import FOLDER_VARIABLE, NAME_VARIABLE
from benchmarks.real.workload import BLOCK_SIZE, ENGINES
from serve_app import local_stack
from serve_app.cli import load_config
from serve_app.config import REPLICA_HEADER

ROOT: Final = Path(__file__).resolve().parents[2]
MODEL: Final = "smollm2-135m-instruct"
_START_TIMEOUT_S: Final = 300.0
_REPLICA_PORTS: Final = range(30_000, 31_000)  # RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT and MAX
_RECEIPTS: Final = 1000
_FOLLOW_S: Final = 2.0  # for HAProxy to hear of a new replica

Say = Callable[[str], None]

_ENGINE_ENVIRONMENT: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # POST /reset_prefix_cache
}


class System(StrEnum):
    """In the order in which they are run."""

    KV_AWARE = "kv_aware"
    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    RAY_PREFIX = "ray_prefix"
    VLLM_CACHE_AWARE = "vllm_router_cache_aware"
    VLLM_KV_AWARE = "vllm_router_kv_aware"

    @property
    def vllm_router(self) -> bool:
        return self.value.startswith("vllm_router")

    @property
    def knows_prefixes(self) -> bool:
        return self not in {System.ROUND_ROBIN, System.LEAST_LOADED}


@dataclass(frozen=True, slots=True)
class Engine:
    name: str  # as its answers say in the header
    url: str  # of the engine itself, past the router


@dataclass(frozen=True, slots=True)
class Fleet:
    urls: list[str]  # of the routers
    engines: list[Engine]
    restart_router: Callable[[], None]  # returns when the new one answers
    receipts: Callable[[], list[dict[str, Any]]]  # this project's; others have none


class PlainEngines:
    """vLLM servers as anybody starts them, KV events on."""

    def __init__(self, stack: ExitStack, model_path: str, kv_blocks: int, folder: Path, say: Say) -> None:
        self.engines: list[Engine] = []
        self.events: list[int] = []  # ports; the replay socket's is the next one
        started: list[subprocess.Popen[bytes]] = []
        say("starting vLLM servers")
        for i in range(ENGINES):
            port, events = local_stack.free_port(), _free_pair()
            name = f"engine-{i}"
            options = {"model": model_path, "served_model_name": MODEL, "host": "127.0.0.1", "port": port}
            options |= engine_options(kv_blocks)
            options |= {
                "middleware": "benchmarks.real.named_engine.NamedEngine",
                "kv_events_config": json.dumps(
                    {
                        "enable_kv_cache_events": True,
                        "publisher": "zmq",
                        "endpoint": f"tcp://*:{events}",
                        "replay_endpoint": f"tcp://*:{events + 1}",
                    }
                ),
            }
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
            for option, value in options.items():
                command += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
            environment = {**os.environ, **_ENGINE_ENVIRONMENT, NAME_VARIABLE: name}
            started.append(stack.enter_context(_process(command, folder / f"{name}.log", environment)))
            self.engines.append(Engine(name, f"http://127.0.0.1:{port}"))
            self.events.append(events)

        def all_answer() -> bool:
            for engine, process in zip(self.engines, started, strict=True):
                if process.poll() is not None:
                    log = (folder / f"{engine.name}.log").read_text(errors="replace")
                    raise local_stack.StackError(f"{engine.name} ended with {process.returncode}:\n{log[-2000:]}")
            return all(_answers(f"{engine.url}/health") for engine in self.engines)

        _until(all_answer, "the vLLM servers")


def engine_options(kv_blocks: int) -> dict[str, Any]:
    """Of every engine of every system."""
    return {
        "max_model_len": 2048,
        "dtype": "bfloat16",
        "block_size": BLOCK_SIZE,
        "enforce_eager": True,
        "num_gpu_blocks_override": kv_blocks,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 64,
        "enable_prompt_tokens_details": True,
    }


@contextmanager
def environment() -> Iterator[Path]:
    """What every process inherits. KVCACHE_HOME keeps a server of `kvcache up` out of this."""
    with tempfile.TemporaryDirectory(prefix="bench-real-") as name:
        ours = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "KVCACHE_HOME": name,
            FOLDER_VARIABLE: name,
            "VLLM_LOGGING_LEVEL": "WARNING",
            "TOKENIZERS_PARALLELISM": "false",
            **_ENGINE_ENVIRONMENT,
        }
        before = {variable: os.environ.get(variable) for variable in ours}
        os.environ.update(ours)
        try:
            yield Path(name)
        finally:
            for variable, value in before.items():
                if value is None:
                    del os.environ[variable]
                else:
                    os.environ[variable] = value


# -- this project, and Ray's router -----------------------------------------------------------------------------------


@contextmanager
def serve_fleet(system: System, model_path: str, kv_blocks: int, folder: Path, say: Say) -> Iterator[Fleet]:
    """A Ray Serve stack: ours with direct streaming, Ray's router behind the ordinary ingress."""
    ours = system is not System.RAY_PREFIX
    for old in folder.glob("*.port"):
        old.unlink()
    config = _our_config(system, model_path, kv_blocks) if ours else _ray_config(model_path, kv_blocks)
    stack = local_stack.start(config, direct=ours, on_progress=say, name=system.value)
    try:
        engines: list[Engine] = []

        def all_there() -> bool:
            engines[:] = _direct_replicas(stack) if ours else _written_ports(folder)
            return len(engines) == ENGINES

        _until(all_there, "the replicas' HTTP servers")
        router = "LLMRouter" if ours else "KVCacheIngress"

        def receipts() -> list[dict[str, Any]]:
            if system is not System.KV_AWARE:
                return []
            answer = httpx.get(f"{stack.url}{stack.graph}/v1/receipts", params={"limit": _RECEIPTS}, timeout=30)
            found: list[dict[str, Any]] = answer.raise_for_status().json()
            return found

        def restart() -> None:
            before = _routers(receipts())
            _restart_deployment(stack, router)
            if system is System.KV_AWARE:  # until HAProxy knows the new router it routes without one
                _until(lambda: _ask_something(stack.url) and bool(_routers(receipts()) - before), "the new router")

        yield Fleet([stack.url], engines, restart, receipts)
    finally:
        local_stack.stop(stack, on_progress=lambda _: None)


def _routers(receipts: list[dict[str, Any]]) -> set[str]:
    return {receipt["router"] for receipt in receipts}


def _ask_something(url: str) -> bool:
    """A prompt that is new each time."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"{time.time_ns()}"}], "max_tokens": 1}
    try:
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).is_success
    except httpx.HTTPError:
        return False


def _our_config(system: System, model_path: str, kv_blocks: int) -> dict[str, Any]:
    config = load_config(ROOT / "configs/quickstart.yaml", local_stack.free_port())
    arguments = config["applications"][1]["args"]
    arguments["routing"]["policy"] = system.value
    arguments["llm"]["model_loading_config"] = {"model_id": MODEL, "model_source": model_path}
    arguments["llm"]["engine_kwargs"] = engine_options(kv_blocks)
    arguments["llm"]["deployment_config"]["num_replicas"] = ENGINES
    arguments["llm"]["runtime_env"]["env_vars"] |= _ENGINE_ENVIRONMENT
    return config


def _ray_config(model_path: str, kv_blocks: int) -> dict[str, Any]:
    """The same LLMConfig for Ray's own builder, with Ray's router."""
    ours = _our_config(System.KV_AWARE, model_path, kv_blocks)
    llm = ours["applications"][1]["args"]["llm"]
    llm["server_cls"] = "benchmarks.real.ray_prefix.RayReplica"
    llm["deployment_config"]["request_router_config"] = {
        "request_router_class": "benchmarks.real.ray_prefix.RayRouter",
    }
    application = {
        "name": "llm",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {
            "llm_configs": [llm],
            "ingress_cls_config": {"ingress_cls": "serve_app.deployments.openai_ingress.KVCacheIngress"},
            "ingress_deployment_config": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}},
        },
    }
    return {**ours, "applications": [application]}


def _direct_replicas(stack: local_stack.Running) -> list[Engine]:
    """Serve's replicas listen on ports of their own with direct streaming; who answers with the header is an engine."""
    found = {}
    for process in _family(stack):
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port in _REPLICA_PORTS:
                    url = f"http://127.0.0.1:{connection.laddr.port}"
                    with contextlib.suppress(httpx.HTTPError):
                        name = httpx.get(f"{url}/v1/models", timeout=5).headers.get(REPLICA_HEADER)
                        if name:
                            found[name] = Engine(name, url)
    return [found[name] for name in sorted(found)]


def _written_ports(folder: Path) -> list[Engine]:
    return [Engine(path.stem, f"http://127.0.0.1:{path.read_text()}") for path in sorted(folder.glob("*.port"))]


def _restart_deployment(stack: local_stack.Running, deployment: str) -> None:
    """Kill the processes of a deployment's replicas; Serve starts them anew. With them goes the router inside."""

    def replicas() -> dict[int, psutil.Process]:
        found = {}
        for process in _family(stack):
            with contextlib.suppress(psutil.Error):
                if any(f"ServeReplica:llm:{deployment}" in part for part in process.cmdline()[:1]):
                    found[process.pid] = process
        return found

    old = replicas()
    if not old:
        raise TimeoutError(f"no process of {deployment} was found")
    for process in old.values():
        process.kill()
    _until(lambda: bool(set(replicas()) - set(old)), f"a new {deployment}")
    _until(lambda: _ask_something(stack.url), "the OpenAI API")
    time.sleep(_FOLLOW_S)


def _family(stack: local_stack.Running) -> list[psutil.Process]:
    process = stack.process()
    return process.children(recursive=True) if process is not None else []


# -- vllm-router ------------------------------------------------------------------------------------------------------


@contextmanager
def vllm_router_fleet(system: System, router: RouterInstall, plain: PlainEngines, folder: Path) -> Iterator[Fleet]:
    policy = system.value.removeprefix("vllm_router_")
    port = local_stack.free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(router.command), "--host", "127.0.0.1", "--port", str(port), "--policy", policy]
    command += ["--prometheus-port", str(local_stack.free_port()), "--log-level", "error"]
    command += ["--worker-urls", *(engine.url for engine in plain.engines)]
    if policy == "kv_aware":
        command += ["--kv-event-model", MODEL, "--kv-event-block-size", str(BLOCK_SIZE)]
        for engine, events in zip(plain.engines, plain.events, strict=True):
            command += ["--kv-event-source", f"{engine.url}=tcp://127.0.0.1:{events}"]
            command += ["--kv-event-replay-source", f"{engine.url}=tcp://127.0.0.1:{events + 1}"]

    with ExitStack() as running:

        def restart() -> None:
            running.close()
            running.enter_context(_process(command, folder / f"{system.value}.log", dict(os.environ)))
            _until(lambda: _answers(f"{url}/health"), system.value)

        restart()
        yield Fleet([url], plain.engines, restart, list)


# -- processes --------------------------------------------------------------------------------------------------------


@contextmanager
def _process(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=dict(environment)
        )
    family = []
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        for member in family:  # an engine core that has outlived its server
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def _free_pair() -> int:
    """A port that is free together with the next one."""
    while True:
        port = local_stack.free_port()
        with contextlib.suppress(OSError), socket.socket() as next_one:
            next_one.bind(("127.0.0.1", port + 1))
            return port


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def _until(check: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not check():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what}: nothing after {_START_TIMEOUT_S:.0f} s")
        time.sleep(0.25)
