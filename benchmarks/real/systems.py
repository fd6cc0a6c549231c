"""The systems under test: real vLLM engines behind something that routes. Only one runs at a time.

    kv_aware, least_loaded, round_robin   this project, `routing.policy`         (configs/quickstart.yaml)
    ray_prefix                            Ray's PrefixCacheAffinityRouter        (ray_prefix.py)
    vllm_router_cache_aware, _kv_aware    vllm-router of PyPI, in front of plain vLLM servers

The engines have the same options everywhere. A stack is what takes long to start; it gives a `Fleet` for each scenario,
whose routers know nothing yet. Those of plain vLLM servers serve both policies of vllm-router.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol

import httpx
import psutil

from benchmarks.overhead.router_venv import RouterInstall
from benchmarks.processes import answers, free_pair, inherited, process, until
from benchmarks.real.named_engine import FOLDER_VARIABLE, NAME_VARIABLE
from benchmarks.real.workload import BLOCK_SIZE, Shape
from serve_app import local_stack
from serve_app.commands.configs import load_config
from serve_app.config import REPLICA_HEADER
from serve_app.events.lmcache_server import LMCacheProcess
from serve_app.model import fast_dtype
from serve_app.ports import free_port

ROOT: Final = Path(__file__).resolve().parents[2]
MODEL: Final = "smollm2-135m-instruct"
_START_TIMEOUT_S: Final = 300.0
_REPLICA_PORTS: Final = range(30_000, 31_000)  # RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT and MAX
_RECEIPTS: Final = 1000
_LMCACHE_GB: Final = 2.0  # more than all documents take
_LMCACHE_CHUNK: Final = 256  # tokens, its own default
_CONNECTOR: Final = {
    "kv_connector": "LMCacheMPConnector",
    "kv_connector_module_path": "serve_app.deployments.lmcache_connector",
    "kv_role": "kv_both",
}
_RAY_TREE: Final = "ray::PrefixTreeActor"
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
    restart_routers: Callable[[], None]  # returns when the new ones answer
    receipts: Callable[[], list[dict[str, Any]]]  # this project's; others have none


class Stack(Protocol):
    """Engines that are up."""

    def fleet(self, system: System) -> AbstractContextManager[Fleet]: ...


def engine_options(kv_blocks: int, lmcache: LMCacheProcess | None) -> dict[str, Any]:
    """Of every engine of every system."""
    options: dict[str, Any] = {
        "max_model_len": 2048,
        "dtype": fast_dtype(),
        "block_size": BLOCK_SIZE,
        "enforce_eager": True,
        "num_gpu_blocks_override": kv_blocks,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 64,
        "enable_prompt_tokens_details": True,
    }
    if lmcache is not None:
        where = {"lmcache.mp.host": "127.0.0.1", "lmcache.mp.port": lmcache.port}
        options["kv_transfer_config"] = {**_CONNECTOR, "kv_connector_extra_config": where}
    return options


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
        with inherited(ours):
            yield Path(name)


@contextmanager
def _lmcache_of(shape: Shape, folder: Path) -> Iterator[LMCacheProcess | None]:
    """One server for all engines of a stack: it is new, and so it is empty."""
    if not shape.lmcache:
        yield None
        return
    server = LMCacheProcess(
        size_gb=_LMCACHE_GB,
        chunk_size=_LMCACHE_CHUNK,
        eviction_policy="LRU",
        instance="bench",
        log=folder / "lmcache.log",
    )
    try:
        yield server
    finally:
        server.stop()


# -- this project, and Ray's router -----------------------------------------------------------------------------------


class ServeStack:
    """Ray Serve: ours with direct streaming, Ray's router behind the ordinary ingress."""

    def __init__(self, system: System, shape: Shape, running: local_stack.Running, engines: list[Engine]) -> None:
        self._system, self._shape, self._running, self._engines = system, shape, running, engines
        self._used = False

    @contextmanager
    def fleet(self, system: System) -> Iterator[Fleet]:
        """Ours starts from what the engines hold: nothing. Ray's would start from what it has sent before."""
        assert system is self._system
        if self._used and system is System.RAY_PREFIX:
            _kill(self._running, _RAY_TREE)
            self._restart()
        self._used = True
        yield Fleet([self._running.url], self._engines, self._restart, self._receipts)

    def _restart(self) -> None:
        """The tree of Ray's router is an actor of its own, which outlives the ingress, and so it does here."""
        before = {receipt["router"] for receipt in self._receipts()}

        def new_ones_decide() -> bool:
            """Until HAProxy knows a new router it routes without one."""
            if not _ask_something(self._running.url) or self._system is not System.KV_AWARE:
                return True
            routers = {receipt["router"] for receipt in self._receipts()} - before
            return len(routers) >= self._shape.routers

        prefix = f"ray::ServeReplica:llm:{'KVCacheIngress' if self._system is System.RAY_PREFIX else 'IngressRouter'}"
        old = _kill(self._running, prefix)
        if not old:
            raise TimeoutError(f"no process of {prefix} was found")
        until(lambda: len(_processes(self._running, prefix) - old) >= len(old), f"a new {prefix}", _START_TIMEOUT_S)
        until(lambda: _ask_something(self._running.url), "the OpenAI API", _START_TIMEOUT_S)
        until(new_ones_decide, "the new routers", _START_TIMEOUT_S)
        time.sleep(_FOLLOW_S)

    def _receipts(self) -> list[dict[str, Any]]:
        if self._system is not System.KV_AWARE:
            return []
        url = f"{self._running.url}{self._running.graph}/v1/receipts"
        answer = httpx.get(url, params={"limit": _RECEIPTS}, timeout=30)
        found: list[dict[str, Any]] = answer.raise_for_status().json()
        return found


@contextmanager
def serve_stack(
    system: System, shape: Shape, model_path: str, kv_blocks: int, folder: Path, say: Say
) -> Iterator[Stack]:
    ours = system is not System.RAY_PREFIX
    for old in folder.glob("*.port"):
        old.unlink()
    routers = {"RAY_SERVE_INGRESS_ROUTER_REPLICAS_PER_NODE": str(shape.routers)}  # with direct streaming
    with _lmcache_of(shape, folder) as lmcache, inherited(routers):
        config = (_our_config if ours else _ray_config)(system, shape, model_path, kv_blocks, lmcache)
        running = local_stack.start(config, direct=ours, on_progress=say, name=system.value)
        try:
            engines: list[Engine] = []

            def all_there() -> bool:
                engines[:] = _direct_replicas(running) if ours else _written_ports(folder)
                return len(engines) == shape.engines

            until(all_there, "the replicas' HTTP servers", _START_TIMEOUT_S)
            yield ServeStack(system, shape, running, engines)
        finally:
            local_stack.stop(running, on_progress=lambda _: None)


def _ask_something(url: str) -> bool:
    """A prompt that is new each time."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"{time.time_ns()}"}], "max_tokens": 1}
    try:
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).is_success
    except httpx.HTTPError:
        return False


def _our_config(
    system: System, shape: Shape, model_path: str, kv_blocks: int, lmcache: LMCacheProcess | None
) -> dict[str, Any]:
    config = load_config(ROOT / "configs/quickstart.yaml", free_port())
    arguments = config["applications"][1]["args"]
    if system is not System.RAY_PREFIX:
        arguments["routing"]["policy"] = system.value
        if lmcache is not None:
            arguments["lmcache"] = {"attach": f"127.0.0.1:{lmcache.port}"}
            lmcache = None  # the replica attaches its engine itself
    arguments["llm"]["model_loading_config"] = {"model_id": MODEL, "model_source": model_path}
    arguments["llm"]["engine_kwargs"] = engine_options(kv_blocks, lmcache)
    arguments["llm"]["deployment_config"]["num_replicas"] = shape.engines
    # Reserves less than the quickstart's two replicas do, so that three fit into Ray's idea of two cores.
    arguments["llm"]["placement_group_config"] = {"bundle_per_worker": {"CPU": 0.3}}
    arguments["llm"]["runtime_env"]["env_vars"] |= _ENGINE_ENVIRONMENT
    return config


def _ray_config(
    system: System, shape: Shape, model_path: str, kv_blocks: int, lmcache: LMCacheProcess | None
) -> dict[str, Any]:
    """The same LLMConfig for Ray's own builder, with Ray's router."""
    ours = _our_config(system, shape, model_path, kv_blocks, lmcache)
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
            "ingress_deployment_config": {"num_replicas": shape.routers, "ray_actor_options": {"num_cpus": 0.1}},
        },
    }
    return {**ours, "applications": [application]}


def _direct_replicas(stack: local_stack.Running) -> list[Engine]:
    """Serve's replicas listen on ports of their own with direct streaming; who answers with the header is an engine."""
    found = {}
    for member in _family(stack):
        with contextlib.suppress(psutil.Error):
            for connection in member.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port in _REPLICA_PORTS:
                    url = f"http://127.0.0.1:{connection.laddr.port}"
                    with contextlib.suppress(httpx.HTTPError):
                        name = httpx.get(f"{url}/v1/models", timeout=5).headers.get(REPLICA_HEADER)
                        if name:
                            found[name] = Engine(name, url)
    return [found[name] for name in sorted(found)]


def _written_ports(folder: Path) -> list[Engine]:
    return [Engine(path.stem, f"http://127.0.0.1:{path.read_text()}") for path in sorted(folder.glob("*.port"))]


def _processes(running: local_stack.Running, prefix: str) -> set[psutil.Process]:
    """Of the stack, those whose title begins so."""
    found = set()
    for member in _family(running):
        with contextlib.suppress(psutil.Error):
            if any(part.startswith(prefix) for part in member.cmdline()[:1]):
                found.add(member)
    return found


def _kill(running: local_stack.Running, prefix: str) -> set[psutil.Process]:
    found = _processes(running, prefix)
    for member in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(found, timeout=5)
    return found


def _family(stack: local_stack.Running) -> list[psutil.Process]:
    process = stack.process()
    return process.children(recursive=True) if process is not None else []


# -- vllm-router ------------------------------------------------------------------------------------------------------


class PlainStack:
    """vLLM servers as anybody starts them, KV events on. Each fleet has routers of its own."""

    def __init__(
        self, engines: list[Engine], events: list[int], shape: Shape, router: RouterInstall, folder: Path
    ) -> None:
        self._engines, self._events, self._shape, self._router, self._folder = engines, events, shape, router, folder

    @contextmanager
    def fleet(self, system: System) -> Iterator[Fleet]:
        ports = [free_port() for _ in range(self._shape.routers)]
        with ExitStack() as running:

            def restart() -> None:
                running.close()
                for port in ports:
                    command = self._command(system, port)
                    running.enter_context(process(command, self._folder / f"{system.value}.log"))
                for port in ports:
                    until(lambda port=port: answers(f"http://127.0.0.1:{port}/health"), system.value, _START_TIMEOUT_S)  # type: ignore[misc]

            restart()
            yield Fleet([f"http://127.0.0.1:{port}" for port in ports], self._engines, restart, list)

    def _command(self, system: System, port: int) -> list[str]:
        workers = {engine.url: events for engine, events in zip(self._engines, self._events, strict=True)}
        policy = system.value.removeprefix("vllm_router_")
        return self._router.serving(port, policy, workers, MODEL, BLOCK_SIZE)


@contextmanager
def plain_stack(
    shape: Shape, router: RouterInstall, model_path: str, kv_blocks: int, folder: Path, say: Say
) -> Iterator[Stack]:
    with _lmcache_of(shape, folder) as lmcache, ExitStack() as stack:
        engines: list[Engine] = []
        ports: list[int] = []  # of events; the replay socket's is the next one
        started: list[subprocess.Popen[bytes]] = []
        say(f"starting {shape.engines} vLLM servers")
        for i in range(shape.engines):
            port, events = free_port(), free_pair()
            name = f"engine-{i}"
            options = {"model": model_path, "served_model_name": MODEL, "host": "127.0.0.1", "port": port}
            options |= engine_options(kv_blocks, lmcache)
            options |= {
                "middleware": "benchmarks.real.named_engine.NamedEngine",
                "kv_events_config": {
                    "enable_kv_cache_events": True,
                    "publisher": "zmq",
                    "endpoint": f"tcp://*:{events}",
                    "replay_endpoint": f"tcp://*:{events + 1}",
                },
            }
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
            for option, value in options.items():
                text = json.dumps(value) if isinstance(value, dict) else str(value)
                command += [f"--{option.replace('_', '-')}", *([] if value is True else [text])]
            started.append(stack.enter_context(process(command, folder / f"{name}.log", {NAME_VARIABLE: name})))
            engines.append(Engine(name, f"http://127.0.0.1:{port}"))
            ports.append(events)

        def all_answer() -> bool:
            for engine, server in zip(engines, started, strict=True):
                if server.poll() is not None:
                    log = (folder / f"{engine.name}.log").read_text(errors="replace")
                    raise local_stack.StackError(f"{engine.name} ended with {server.returncode}:\n{log[-2000:]}")
            return all(answers(f"{engine.url}/health") for engine in engines)

        until(all_answer, "the vLLM servers", _START_TIMEOUT_S)
        yield PlainStack(engines, ports, shape, router, folder)
