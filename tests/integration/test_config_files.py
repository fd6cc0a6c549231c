"""Every config of the repository is one that its builder takes; what needs GPUs is built here and run elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray
import yaml
from pydantic import ValidationError
from ray.llm._internal.serve import constants as ray_constants
from ray.llm._internal.serve.core.ingress import builder as ray_builder
from ray.serve import Application, Deployment
from ray.serve._private import build_app as ray_build_app
from ray.serve._private.build_app import build_app
from ray.serve.llm import LLMConfig
from ray.serve.schema import ServeDeploySchema

from serve_app.app import build_kvcache, build_llm, build_openai_app
from serve_app.config import GraphArgs, LLMArgs, OpenAIArgs
from serve_app.errors import ConfigError
from serve_app.model import fast_dtype
from tests import chart

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def serve_configs() -> dict[str, dict[str, Any]]:
    paths = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "examples").glob("*/*.yaml")])
    found = {"/".join(path.relative_to(ROOT).parts[1:]): yaml.safe_load(path.read_text()) for path in paths}
    for example in ("rayservice", "rayservice-full"):
        for document in chart.example(example):
            if document["kind"] == "RayService":
                found[f"helm/{example}"] = yaml.safe_load(document["spec"]["serveConfigV2"])
    return found


def llm_config(deployment: Deployment) -> LLMConfig:
    arguments: Any = deployment.init_kwargs  # a dict; Ray's annotation says a tuple
    config: LLMConfig = arguments["llm_config"]
    return config


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


class TestOneLine:
    """`import_path: serve_app.app:build_openai_app`, with the arguments that Ray's own builder takes."""

    ARGS: ClassVar[dict[str, Any]] = {"llm_configs": [{"model_loading_config": {"model_id": "m"}}]}

    @pytest.fixture
    @staticmethod
    def direct(monkeypatch: pytest.MonkeyPatch) -> None:
        """As with configs/direct.env, which is read when Ray is imported."""
        monkeypatch.setattr(ray_constants, "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", True)
        monkeypatch.setattr(ray_builder, "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", True)
        monkeypatch.setattr(ray_build_app, "RAY_SERVE_ENABLE_HA_PROXY", True)

    def built(self, **more: Any) -> tuple[set[str], str]:
        """Names of the deployments, and of the ingress request router."""
        app = build_app(build_openai_app(OpenAIArgs(**self.ARGS, **more)), name="llm")
        router = app.ingress_request_router_deployment
        return {each.name.partition(":")[0] for each in app.deployments}, "" if router is None else router.name

    def test_behind_the_ordinary_ingress(self) -> None:
        assert self.built() == ({"VLLMReplica", "KVCacheIngress", "EmbeddedRedis"}, "")

    @pytest.mark.usefixtures("direct")
    def test_with_direct_streaming(self) -> None:
        assert self.built() == ({"VLLMReplica", "EmbeddedRedis"}, "IngressRouter")
        assert self.built(kvcache={"redis_url": "redis://127.0.0.1:1"}) == ({"VLLMReplica"}, "IngressRouter")

    @pytest.mark.usefixtures("direct")
    def test_with_another_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray, "__version__", "2.61.0")
        assert self.built() == ({"VLLMReplica", "EmbeddedRedis"}, "LLMRouter")

    def test_several_models_and_configs_of_every_kind(self, tmp_path: Path) -> None:
        file = tmp_path / "llm.yaml"
        file.write_text(yaml.safe_dump({"model_loading_config": {"model_id": "two"}}))
        given = [*self.ARGS["llm_configs"], str(file), LLMConfig(model_loading_config={"model_id": "three"})]
        app = build_app(build_openai_app(OpenAIArgs(llm_configs=given)), name="llm")
        routers = [llm_config(each) for each in app.deployments if each.name.startswith("VLLMReplica")]
        models = [llm.deployment_config["request_router_config"]["request_router_kwargs"]["model"] for llm in routers]
        assert models == ["m", "two", "three"]

    def test_who_has_a_router_keeps_it(self) -> None:
        own = {"request_router_class": "ray.serve.llm.request_router:PrefixCacheAffinityRouter"}
        llm = {"model_loading_config": {"model_id": "m"}, "deployment_config": {"request_router_config": own}}
        app = build_app(build_openai_app(OpenAIArgs(llm_configs=[llm])), name="llm")
        assert {each.name.partition(":")[0] for each in app.deployments} == {"LLMServer", "KVCacheIngress"}

    def test_a_misspelt_setting_is_named(self) -> None:
        with pytest.raises(ConfigError, match="polizy"):
            self.built(kvcache={"polizy": "x"})
        with pytest.raises(ValidationError, match="kv_cache"):
            self.built(kv_cache={})


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
        return llm_config(replica).engine_kwargs.get("dtype")

    assert used() == dtype
    assert used(dtype="bfloat16") == "bfloat16"
