"""Every config of the repository is one that its builder takes; what needs GPUs is built here and run elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from pydantic import ValidationError
from ray.serve import Application
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from serve_app.app import build_kvcache, build_llm
from serve_app.config import GraphArgs, LLMArgs
from serve_app.errors import ConfigError
from serve_app.model import fast_dtype

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def serve_configs() -> dict[str, dict[str, Any]]:
    found = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs").glob("*.yaml"))}
    for document in yaml.safe_load_all((ROOT / "cluster/kubernetes/rayservice.yaml").read_text()):
        if document["kind"] == "RayService":
            found["rayservice.yaml"] = yaml.safe_load(document["spec"]["serveConfigV2"])
    return found


@pytest.fixture(scope="module", autouse=True)
def a_ray_session() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("name", serve_configs())
def test_config_builds(name: str) -> None:
    config = serve_configs()[name]
    ServeDeploySchema.model_validate(config)
    for app in config["applications"]:
        module, _, function = app["import_path"].partition(":")
        builder = getattr(importlib.import_module(module), function)
        arguments = {"build_kvcache": GraphArgs, "build_llm": LLMArgs}.get(function, dict)
        assert isinstance(builder(arguments(**app["args"])), Application)


def test_models_agree_within_a_config() -> None:
    """The graph and the router must name the same key space, or nothing ever matches."""
    for name, config in serve_configs().items():
        models = set()
        for app in config["applications"]:
            args = app["args"]
            if "llm" in args:
                models.add(args["llm"]["model_loading_config"]["model_id"])
            elif "model" in args:
                models.add(args["model"])
        assert len(models) <= 1, name


def test_a_misspelt_setting_is_named() -> None:
    with pytest.raises(ValidationError, match="strategie"):
        GraphArgs(model="m", strategie="longest_prefix")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="polizy"):
        build_llm(LLMArgs(llm={"model_loading_config": {"model_id": "m"}}, routing={"polizy": "x"}))
    with pytest.raises(ConfigError, match="model_id"):
        build_llm(LLMArgs(llm={}))
    llm = {"model_loading_config": {"model_id": "m"}, "engine_kwargs": {"block_size": 32}}
    with pytest.raises(ConfigError, match=r"lmcache.chunk_size 100 is no multiple"):
        build_llm(LLMArgs(llm=llm, lmcache={"chunk_size": 100}))
    with pytest.raises(ConfigError, match="chunksize"):
        build_llm(LLMArgs(llm=llm, lmcache={"chunksize": 64}))


@pytest.mark.parametrize(("redis_url", "embedded"), [("embedded", True), ("redis://127.0.0.1:1", False)])
def test_the_graph_has_its_stages_and_a_redis_only_if_asked_for(redis_url: str, embedded: bool) -> None:
    graph = build_app(build_kvcache(GraphArgs(model="m", redis_url=redis_url)), name="kvcache")
    stages = {"Scorer", "PrefixStore", "Tokenizer", "BlockIndex"}
    assert {deployment.name for deployment in graph.deployments} == stages | ({"EmbeddedRedis"} if embedded else set())


@pytest.mark.parametrize(
    ("engine", "dtype"), [({"accelerator_config": {"kind": "cpu"}}, fast_dtype()), ({}, None)], ids=["cpu", "gpu"]
)
def test_engines_on_a_cpu_get_numbers_that_it_is_fast_with(engine: dict[str, Any], dtype: str | None) -> None:
    def used(**engine_kwargs: Any) -> Any:
        llm = {"model_loading_config": {"model_id": "m"}, "engine_kwargs": engine_kwargs, **engine}
        deployments = build_app(build_llm(LLMArgs(llm=llm)), name="llm").deployments
        (replica,) = (each for each in deployments if each.name.startswith("VLLMReplica"))
        return replica.init_kwargs["llm_config"].engine_kwargs.get("dtype")

    assert used() == dtype
    assert used(dtype="bfloat16") == "bfloat16"
