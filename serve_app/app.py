"""Composition root: the arguments of a Serve YAML -> Serve applications.

    import_path: serve_app.app:build_kvcache      the graph: Scorer -> PrefixStore -> Tokenizer, Scorer -> BlockIndex
    import_path: serve_app.app:build_openai_app   the data path: an OpenAI API whose requests are routed by KV cache
    import_path: serve_app.app:build_llm          the same, of one model

The graph needs no engine: what Ray has of LLMs, which looks for one when it is imported, is imported where it is used.
(No `from __future__ import annotations` here: Ray reads the annotations to convert `args`.)
"""

import logging
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application

from serve_app.config import EMBEDDED, GraphArgs, LLMArgs, OpenAIArgs, RouterSettings
from serve_app.deployments.embedded_redis import EmbeddedRedis, resolve_redis_url
from serve_app.deployments.graph import BlockIndex, PrefixStore, Tokenizer
from serve_app.deployments.scorer import Scorer
from serve_app.errors import ConfigError
from serve_app.extras import require_module
from serve_app.model import fast_dtype, resolve_model

if TYPE_CHECKING:
    from ray.serve.llm import LLMConfig

logger = logging.getLogger("ray.serve")

_HEALTH_CHECK_S = 2.0  # Serve acts on the third failure

# One, so that one router sees all requests; it reserves little, as LLMRouter does.
_INGRESS_OPTIONS = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}

_ROUTER = "serve_app.deployments.request_router.KVCacheAwareRouter"
_REPLICA_MODULE = "serve_app.deployments.vllm_replica"
_REPLICA = f"{_REPLICA_MODULE}.VLLMReplica"
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
    redis = deployment(EmbeddedRedis).bind() if args.redis_url == EMBEDDED else None
    graph: Application = scorer.bind(args, prefix_store, block_index, redis)
    return graph


def build_openai_app(args: OpenAIArgs) -> Application:
    """What `ray.serve.llm:build_openai_app` builds of the same arguments, routed by KV cache.

    An LLMConfig that names a request router of its own keeps it, and is left as it is.

    Raises:
        ConfigError: vLLM is not installed.
    """
    require_module("vllm", "an application with engines", "cpu", "gpu")
    from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING
    from ray.serve.llm import build_openai_app as build_openai_app_of_ray

    configs = [_llm_config(config, args.kvcache) for config in args.llm_configs]
    builder = args.model_dump(exclude={"kvcache"}, exclude_unset=True) | {"llm_configs": configs}
    if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:
        return _direct(build_openai_app_of_ray(builder), configs[0])
    logger.info("kvcache: direct streaming is off, tokens pass the ordinary ingress (see configs/direct.env)")
    redis = _embedded_redis(configs)
    own = {"ingress_cls": _INGRESS, "ingress_extra_kwargs": {"redis": redis} if redis is not None else {}}
    builder.setdefault("ingress_cls_config", own)
    builder["ingress_deployment_config"] = {**_INGRESS_OPTIONS, **args.ingress_deployment_config}
    return build_openai_app_of_ray(builder)


def build_llm(args: LLMArgs) -> Application:
    """The same for one model, with its parts beside each other: `llm`, `routing`, `lmcache`."""
    lmcache = {} if args.lmcache is None else {"lmcache": args.lmcache}
    more = {"ingress_deployment_config": args.ingress} if args.ingress else {}
    return build_openai_app(OpenAIArgs(llm_configs=[args.llm], kvcache={**args.routing, **lmcache}, **more))


def _llm_config(given: "str | dict[str, Any] | LLMConfig", kvcache: dict[str, Any]) -> "LLMConfig":
    """An LLMConfig with VLLMReplica and KVCacheAwareRouter put in."""
    from ray.serve.llm import LLMConfig

    if isinstance(given, str):
        given = LLMConfig.from_file(given)
    llm = given.model_dump(exclude_unset=True) if isinstance(given, LLMConfig) else dict(given)
    loading = dict(llm.get("model_loading_config") or {})
    if "model_id" not in loading:
        raise ConfigError("llm.model_loading_config.model_id is missing: the model name that clients send")
    if loading.get("model_source"):
        loading["model_source"] = resolve_model(loading["model_source"])
    deployment = dict(llm.get("deployment_config") or {})
    if "request_router_config" in deployment:
        return LLMConfig(**llm)
    llm["model_loading_config"] = loading
    llm["engine_kwargs"] = _engine_kwargs(llm)
    try:
        settings = RouterSettings(**{"model": loading["model_id"], **kvcache})
    except ValidationError as error:
        raise ConfigError(f"routing: {error}") from error
    block_size = llm["engine_kwargs"].get("block_size")
    if settings.lmcache and not settings.lmcache.attach and block_size:
        settings.lmcache.check_block_size(block_size)
    router = {"request_router_class": _ROUTER, "request_router_kwargs": settings.model_dump(mode="json")}
    llm["deployment_config"] = {**deployment, "request_router_config": router}
    llm.setdefault("server_cls", _REPLICA)
    return LLMConfig(**llm)


def _settings_of(config: "LLMConfig") -> dict[str, Any] | None:
    """Those of its KVCacheAwareRouter; None: it has another router."""
    router = config.deployment_config.get("request_router_config")
    router = router if isinstance(router, dict) else getattr(router, "__dict__", {})
    of_ours = str(router.get("request_router_class", "")).replace(":", ".") == _ROUTER
    return dict(router.get("request_router_kwargs") or {}) if of_ours else None


def _embedded_redis(configs: "list[LLMConfig]") -> Application | None:
    """The Valkey that these need, which is the graph's if that is there first."""
    if not any((_settings_of(config) or {}).get("redis_url") == EMBEDDED for config in configs):
        return None
    redis: Application = serve.deployment(
        num_replicas=1, ray_actor_options={"num_cpus": 0}, health_check_period_s=_HEALTH_CHECK_S
    )(EmbeddedRedis).bind()
    return redis


def _direct(application: Application, config: "LLMConfig") -> Application:
    """With direct streaming: our own ingress request router in the place of Ray's, if this Ray is as it must be."""
    from serve_app.deployments import ingress_router

    if _settings_of(config) is None:
        return application
    if why_not := ingress_router.can_be_used():
        logger.warning("kvcache: Ray's LLMRouter is used, which is slower and cannot name ranks: %s", why_not)
    else:
        adapters_of = config.model_id if config.lora_config is not None else ""
        application = ingress_router.with_ingress_router(application, adapters_of)
    if (redis := _embedded_redis([config])) is not None and _REPLICA_MODULE in str(config.server_cls):
        # A router may have no deployment beside it, so the replicas do. There is no public way after `bind`.
        application._bound_deployment.init_kwargs["redis"] = redis  # type: ignore[index]  # Ray calls a dict a tuple
    return application


def _engine_kwargs(llm: dict[str, Any]) -> dict[str, Any]:
    """As given. On a CPU, numbers that this one computes fast with, unless they are named."""
    given = dict(llm.get("engine_kwargs") or {})
    on_cpu = dict(llm.get("accelerator_config") or {}).get("kind") == "cpu"
    return {"dtype": fast_dtype(), **given} if on_cpu else given
