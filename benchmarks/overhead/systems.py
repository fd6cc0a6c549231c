"""The systems under test, each as a context manager: two simulated engines behind something that routes.

In: where to put files. Out: `Running`: where to send requests, and where the same engines can be called directly. Only
one system runs at a time, for an idle Ray cluster costs a noticeable part of two cores.

    ours_local     HAProxy -> our ingress router with local stages              (configs/quickstart.yaml)
    ours_graph     the same, prompt and index stages called as deployments      (configs/graph.yaml)
    ours_ingress   Ray Serve LLM's ordinary ingress, local stages               (configs/quickstart.yaml)
    vllm_router_*  vllm-router of PyPI with that policy
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from benchmarks.overhead.client import Endpoint
from benchmarks.overhead.engine_app import MAX_MODEL_LEN, WHERE_PATH
from benchmarks.overhead.router_venv import RouterInstall
from benchmarks.processes import answers, free_pair, inherited, process, until
from serve_app import local_stack
from serve_app.commands.configs import load_config
from serve_app.ports import free_port

ROOT: Final = Path(__file__).resolve().parents[2]
MODEL: Final = "smollm2-135m-instruct"
BLOCK_SIZE: Final = 16  # vLLM's on a GPU
ENGINES: Final = 2
REPLICA, UVICORN = "replica", "uvicorn"  # names of baselines: the replica's HTTP server, plain uvicorn
_START_TIMEOUT_S: Final = 180.0
_QUIET_TIMEOUT_S: Final = 1800.0

Say = Callable[[str], None]


class System(StrEnum):
    OURS_LOCAL = "ours_local"
    OURS_GRAPH = "ours_graph"
    OURS_INGRESS = "ours_ingress"
    CACHE_AWARE = "vllm_router_cache_aware"
    KV_AWARE = "vllm_router_kv_aware"
    ROUND_ROBIN = "vllm_router_round_robin"  # knows nothing: what forwarding alone costs there

    @property
    def ours(self) -> bool:
        return self.value.startswith("ours")


@dataclass(frozen=True, slots=True)
class Running:
    endpoint: Endpoint
    baselines: dict[str, dict[str, Endpoint]]  # name of the baseline -> engine -> where to call it directly
    folder: Path  # with the engines' counters

    def learned(self) -> int:
        """Request bodies that the engines' cores have turned into KV events."""
        return sum(int(path.read_text() or 0) for path in self.folder.glob("*.learned"))


@contextmanager
def start(system: System, model_path: str, router: RouterInstall | None, say: Say) -> Iterator[Running]:
    """Start a system with its engines, and stop all of it at the end."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as name, inherited(_variables(Path(name))):
        folder = Path(name)
        if system.ours:
            with _ours(system, model_path, folder, say) as running:
                yield running
        else:
            assert router is not None
            policy = system.value.removeprefix("vllm_router_")
            with _vllm_router(policy, router, model_path, folder) as running:
                yield running


def _variables(folder: Path) -> dict[str, str]:
    """What every process of the system inherits. KVCACHE_HOME keeps a server of `kvcache up` out of this."""
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "KVCACHE_HOME": str(folder),
        "KVCACHE_OVERHEAD_FOLDER": str(folder),
        "RAYLLM_VLLM_ENGINE_CLS": "benchmarks.overhead.serve_engine.SimulatedEngine",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


# -- this project -----------------------------------------------------------------------------------------------------


@contextmanager
def _ours(system: System, model_path: str, folder: Path, say: Say) -> Iterator[Running]:
    _wait_until_no_other_ray(say)
    direct = system is not System.OURS_INGRESS
    stack = local_stack.start(_serve_config(system, model_path), direct=direct, on_progress=say, name=system.value)
    try:
        host, port = stack.url.removeprefix("http://").split(":")
        endpoint = Endpoint(host, int(port))
        baselines = {UVICORN: _ports(folder)}
        if direct:
            baselines = {REPLICA: _replica_servers(endpoint, baselines[UVICORN].keys()), **baselines}
        yield Running(endpoint, baselines, folder)
    finally:
        local_stack.stop(stack, on_progress=lambda _: None)


def _serve_config(system: System, model_path: str) -> dict[str, Any]:
    """A config of the project with the model's path and the engine's block size put in."""
    name = "graph.yaml" if system is System.OURS_GRAPH else "quickstart.yaml"
    config = load_config(ROOT / "configs" / name, free_port())
    llm = config["applications"][1]["args"]["llm"]
    llm["model_loading_config"] = {"model_id": MODEL, "model_source": model_path}
    llm["engine_kwargs"] = {"block_size": BLOCK_SIZE, "max_model_len": MAX_MODEL_LEN}
    llm["deployment_config"]["num_replicas"] = ENGINES
    llm.pop("runtime_env", None)
    return config


def _replica_servers(endpoint: Endpoint, names: Any) -> dict[str, Endpoint]:
    """The HTTP servers of Serve's replicas: whoever answers through HAProxy says where it was asked."""
    found: dict[str, Endpoint] = {}
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while set(found) != set(names):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"only {sorted(found)} of {sorted(names)} answer through HAProxy")
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = httpx.get(endpoint.url + WHERE_PATH, timeout=10).raise_for_status().json()
            found[answer["name"]] = Endpoint("127.0.0.1", answer["port"])
    return found


def _wait_until_no_other_ray(say: Say) -> None:
    """Two clusters on two cores measure each other."""
    deadline_s = time.monotonic() + _QUIET_TIMEOUT_S
    told = False
    while any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"])):
        if time.monotonic() > deadline_s:
            raise TimeoutError("another Ray cluster has been running on this machine all the time")
        if not told:
            say("waiting for another Ray cluster on this machine to end")
            told = True
        time.sleep(5)


# -- vllm-router ------------------------------------------------------------------------------------------------------


@contextmanager
def _vllm_router(policy: str, router: RouterInstall, model_path: str, folder: Path) -> Iterator[Running]:
    with ExitStack() as stack:
        names = [f"engine-{i}" for i in range(ENGINES)]
        events = [free_pair() for _ in names]
        for name, port in zip(names, events, strict=True):
            options = ["--model-path", model_path, "--model", MODEL, "--block-size", str(BLOCK_SIZE)]
            module = [sys.executable, "-m", "benchmarks.overhead.engine_server", str(folder), name]
            stack.enter_context(process([*module, *options, "--events-port", str(port)], folder / f"{name}.log"))
        until(lambda: len(_ports(folder)) == ENGINES, "the engines", _START_TIMEOUT_S)
        engines = _ports(folder)
        until(
            lambda: all((folder / f"{name}.learned").exists() for name in names), "the engines' cores", _START_TIMEOUT_S
        )

        endpoint = Endpoint("127.0.0.1", free_port())
        workers = {engines[name].url: port for name, port in zip(names, events, strict=True)}
        command = router.serving(endpoint.port, policy, workers, MODEL, BLOCK_SIZE)
        stack.enter_context(process(command, folder / "router.log"))
        until(lambda: answers(f"{endpoint.url}/health"), f"vllm-router {policy}", _START_TIMEOUT_S)
        yield Running(endpoint, {UVICORN: engines}, folder)


def _ports(folder: Path) -> dict[str, Endpoint]:
    return {path.stem: Endpoint("127.0.0.1", int(path.read_text())) for path in sorted(folder.glob("*.port"))}
