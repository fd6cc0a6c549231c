"""What a Serve config says of us: its addresses, its graphs, its engines. Plain reading, without Ray.

In: the YAML of `serve run`, loaded. Out: `Listening`, `Graph`, `Engine`. What Serve itself would refuse is left to it.

    import_path                          what it is
    serve_app.app:build_kvcache          a graph
    serve_app.app:build_llm              engines, `llm` and `routing` in its args
    serve_app.app:build_openai_app       engines, `llm_configs` and `kvcache`
    ray.serve.llm:build_openai_app       engines, `llm_configs`; ours if they name our router
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.config import EMBEDDED
from serve_app.errors import ConfigError

DEFAULT_PORT = 8000
_EVERYWHERE = frozenset({"0.0.0.0", "::"})  # noqa: S104  # compared, not listened on


@dataclass(frozen=True, slots=True)
class Listening:
    """Where Serve's HTTP proxy is."""

    host: str
    port: int
    is_tls: bool = False

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in _EVERYWHERE else self.host
        return f"http{'s' if self.is_tls else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Graph:
    model: str
    redis_url: str
    prefix: str | None  # None: it has no HTTP endpoints


@dataclass(frozen=True, slots=True)
class Engine:
    """One LLM config."""

    model: str
    redis_url: str  # empty: it is not routed by us
    prefix: str | None
    engine_kwargs: dict[str, Any]
    chunk_size: int = 0  # of LMCache; 0: it has none


def listening(config: Mapping[str, Any]) -> Listening | None:
    """None: Serve is to listen nowhere (`proxy_location: Disabled`).

    Raises:
        ConfigError: the port is none.
    """
    if config.get("proxy_location") == "Disabled":
        return None
    options = _mapping(config.get("http_options"))
    port = options.get("port", DEFAULT_PORT)
    if not isinstance(port, int) or not 0 < port < 65536:
        raise ConfigError(f"http_options.port is {port!r}: write a number from 1 to 65535")
    return Listening(str(options.get("host") or "127.0.0.1"), port, bool(options.get("ssl_certfile")))


def applications(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Raises:
    ConfigError: there are none.
    """
    given = config.get("applications")
    if not isinstance(given, list) or not all(isinstance(app, dict) and app.get("import_path") for app in given):
        raise ConfigError("`applications` must be a list of mappings, each with an `import_path`")
    return given


def graphs(config: Mapping[str, Any]) -> Iterator[Graph]:
    """The applications of a Serve config that are our graph."""
    for app in applications(config):
        if _builder(app) == "serve_app.app:build_kvcache":
            args = _mapping(app.get("args"))
            yield Graph(str(args.get("model", "")), str(args.get("redis_url", EMBEDDED)), _prefix(app))


def engines(config: Mapping[str, Any]) -> Iterator[Engine]:
    """Those whose config is in the YAML itself; a path of one is not followed."""
    for app in applications(config):
        args, builder = _mapping(app.get("args")), _builder(app)
        if builder == "serve_app.app:build_llm":
            yield _engine(args.get("llm"), {"lmcache": args.get("lmcache"), **_mapping(args.get("routing"))}, app)
        elif builder == "serve_app.app:build_openai_app":
            for llm in args.get("llm_configs") or ():
                yield _engine(llm, _mapping(args.get("kvcache")), app)
        elif builder == "ray.serve.llm:build_openai_app":
            for llm in args.get("llm_configs") or ():
                yield _engine(llm, None, app)


def openai_prefixes(config: Mapping[str, Any]) -> list[str]:
    """Route prefixes below which there is an OpenAI API."""
    return sorted({one.prefix for one in engines(config) if one.prefix is not None})


def _engine(llm: Any, settings: Mapping[str, Any] | None, app: Mapping[str, Any]) -> Engine:
    llm = _mapping(llm)
    router = _mapping(_mapping(llm.get("deployment_config")).get("request_router_config"))
    if settings is None:
        settings = _mapping(router.get("request_router_kwargs"))
        ours = str(router.get("request_router_class", "")).startswith("serve_app.")
    else:
        ours = not router  # who names a router of its own keeps it
    lmcache = _mapping(settings.get("lmcache"))
    return Engine(
        model=str(_mapping(llm.get("model_loading_config")).get("model_id", "")),
        redis_url=str(settings.get("redis_url", EMBEDDED)) if ours else "",
        prefix=_prefix(app),
        engine_kwargs=_mapping(llm.get("engine_kwargs")),
        chunk_size=int(lmcache.get("chunk_size", 256)) if settings.get("lmcache") is not None else 0,
    )


def _builder(app: Mapping[str, Any]) -> str:
    module, _, name = str(app["import_path"]).replace(":", ".").rpartition(".")
    return f"{module}:{name}"


def _prefix(app: Mapping[str, Any]) -> str | None:
    prefix = app.get("route_prefix", "/")
    return None if prefix is None else str(prefix).rstrip("/")


def _mapping(given: Any) -> dict[str, Any]:
    return given if isinstance(given, dict) else {}
