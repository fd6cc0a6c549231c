"""Composition root: the arguments of a Serve YAML -> Serve applications.

    import_path: serve_app.app:build_kvcache   the graph: Scorer -> PrefixStore -> Tokenizer, Scorer -> BlockIndex
    import_path: serve_app.app:build_llm       the data path: an OpenAI API whose requests are routed by KV cache

(No `from __future__ import annotations` here: Ray reads the annotations to convert `args`.)
"""

import logging
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app

from serve_app.config import EMBEDDED, GraphArgs, LLMArgs, RouterSettings
from serve_app.deployments.embedded_redis import EmbeddedRedis, resolve_redis_url
from serve_app.deployments.graph import BlockIndex, PrefixStore, Tokenizer
from serve_app.deployments.scorer import Scorer
from serve_app.errors import ConfigError
from serve_app.model import fast_dtype, resolve_model

logger = logging.getLogger("ray.serve")

_HEALTH_CHECK_S = 2.0  # Serve acts on the third failure

# One, so that one router sees all requests; it reserves little, as LLMRouter does.
_INGRESS_OPTIONS = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}

_ROUTER = "serve_app.deployments.request_router.KVCacheAwareRouter"
_REPLICA = "serve_app.deployments.vllm_replica.VLLMReplica"
_INGRESS = "serve_app.deployments.openai_ingress.KVCacheIngress"


def build_kvcache(args: GraphArgs) -> Application:
    """The graph, and with `redis_url: embedded` the Valkey that it needs."""
    redis_url = resolve_redis_url(args.redis_url)

    def deployment(cls: type, replicas: int = 1) -> Any:
        return serve.deployment(
            num_replicas=replicas,
            ray_actor_options={"num_cpus": args.num_cpus},
            max_ongoing_requests=256,
            health_check_period_s=_HEALTH_CHECK_S,
        )(cls)

    tokenizer = deployment(Tokenizer, args.tokenizer_replicas).bind()
    prefix_store = deployment(PrefixStore, args.prefix_store_replicas).bind(args, tokenizer)
    block_index = deployment(BlockIndex, args.block_index_replicas).bind(args, redis_url)
    scorer = deployment(Scorer, args.scorer_replicas)
    redis = deployment(EmbeddedRedis).bind(redis_url) if args.redis_url == EMBEDDED else None
    graph: Application = scorer.bind(args, prefix_store, block_index, redis)
    return graph


def build_llm(args: LLMArgs) -> Application:
    """A Ray Serve LLM application with VLLMReplica and KVCacheAwareRouter put in."""
    llm = dict(args.llm)
    loading = dict(llm.get("model_loading_config") or {})
    if "model_id" not in loading:
        raise ConfigError("llm.model_loading_config.model_id is missing: the model name that clients send")
    if loading.get("model_source"):
        loading["model_source"] = resolve_model(loading["model_source"])
    llm["model_loading_config"] = loading
    llm["engine_kwargs"] = _engine_kwargs(llm)

    try:
        lmcache = {} if args.lmcache is None else {"lmcache": args.lmcache}
        settings = RouterSettings(**{"model": loading["model_id"], **args.routing, **lmcache})
    except ValidationError as error:
        raise ConfigError(f"routing: {error}") from error
    block_size = llm["engine_kwargs"].get("block_size")
    if settings.lmcache and not settings.lmcache.attach and block_size:
        settings.lmcache.check_block_size(block_size)
    deployment_config = dict(llm.get("deployment_config") or {})
    deployment_config["request_router_config"] = {
        "request_router_class": _ROUTER,
        "request_router_kwargs": settings.model_dump(mode="json"),
    }
    llm["deployment_config"] = deployment_config
    llm.setdefault("server_cls", _REPLICA)

    from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING

    builder: dict[str, object] = {"llm_configs": [LLMConfig(**llm)]}
    if not RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:
        logger.info("kvcache: direct streaming is off, tokens pass the ordinary ingress (see configs/direct.env)")
        builder["ingress_cls_config"] = {"ingress_cls": _INGRESS}
        builder["ingress_deployment_config"] = {**_INGRESS_OPTIONS, **args.ingress}
    application = build_openai_app(builder)
    if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING and llm["engine_kwargs"].get("data_parallel_size", 1) > 1:
        from serve_app.deployments.rank_router import with_rank_names

        return with_rank_names(application)
    return application


def _engine_kwargs(llm: dict[str, Any]) -> dict[str, Any]:
    """As given. On a CPU, numbers that this one computes fast with, unless they are named."""
    given = dict(llm.get("engine_kwargs") or {})
    on_cpu = dict(llm.get("accelerator_config") or {}).get("kind") == "cpu"
    return {"dtype": fast_dtype(), **given} if on_cpu else given
