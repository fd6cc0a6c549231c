"""What `kvcache up` reads from a Serve config, and waits for: every valid one, not only those of this package."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app import readiness
from serve_app.commands.configs import load_config, shipped
from serve_app.serve_config import Listening, engines, graphs, listening, openai_prefixes

LLM = {"model_loading_config": {"model_id": "org/m-1.5"}, "deployment_config": {"num_replicas": "auto"}}


def app(builder: str, prefix: str | None = "/", **args: Any) -> dict[str, Any]:
    return {"import_path": builder, "route_prefix": prefix, "args": args}


def running(*replicas: int) -> dict[str, Any]:
    """Serve's word on an application with so many replicas in each of its deployments."""
    names = ("VLLMReplica:org--m-1_5", "KVCacheIngress", "VLLMReplica:other")
    return {"status": "RUNNING", "message": "", "replicas": dict(zip(names, replicas, strict=False))}


@pytest.mark.parametrize("name", [name for name in shipped() if name not in {"direct.env", "service/score"}])
def test_each_shipped_config_is_read(name: str) -> None:
    config = load_config(shipped()[name])
    assert listening(config) is not None
    assert openai_prefixes(config) == [""]
    (engine,) = engines(config)
    assert engine.redis_url
    assert [graph.model for graph in graphs(config)] == [engine.model] * (name != "serve-llm-drop-in")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Listening("127.0.0.1", 8000)),
        ({"http_options": None}, Listening("127.0.0.1", 8000)),
        ({"http_options": {"host": "::", "port": 81}}, Listening("::", 81)),
        ({"http_options": {"ssl_certfile": "c", "ssl_keyfile": "k"}}, Listening("127.0.0.1", 8000, True)),
        ({"proxy_location": "Disabled"}, None),
    ],
)
def test_where_it_listens(config: dict[str, Any], expected: Listening | None) -> None:
    assert listening(config) == expected


@pytest.mark.parametrize(
    ("where", "url"),
    [
        (Listening("0.0.0.0", 1), "http://127.0.0.1:1"),
        (Listening("::", 1), "http://127.0.0.1:1"),
        (Listening("::1", 1, True), "https://[::1]:1"),
    ],
)
def test_how_it_is_reached(where: Listening, url: str) -> None:
    assert where.url == url


def test_several_apps_below_their_prefixes_each_have_an_api() -> None:
    config = {
        "applications": [
            app("serve_app.app:build_llm", "/a", llm=LLM),
            app("serve_app.app.build_openai_app", "/b/", llm_configs=[LLM, "a-path.yaml"]),
            app("ray.serve.llm:build_openai_app", llm_configs=[LLM]),
            app("serve_app.app:build_llm", None, llm=LLM),  # no HTTP
            app("mine:app", "/mine"),
        ]
    }
    assert openai_prefixes(config) == ["", "/a", "/b"]
    assert [engine.model for engine in engines(config)] == ["org/m-1.5"] * 2 + [""] + ["org/m-1.5"] * 2
    assert [bool(engine.redis_url) for engine in engines(config)] == [True, True, True, False, True]


def test_a_graph_alone_has_no_openai_api_to_wait_for() -> None:
    config = {"applications": [app("serve_app.app:build_kvcache", "/kvcache", model="m")]}
    assert openai_prefixes(config) == []
    assert readiness.not_running(readiness.names(config), {"default": running()}) == ""


class TestWaiting:
    def test_for_serve_and_then_for_each_application(self) -> None:
        assert readiness.not_running(["a", "b"], {}) == "Ray Serve"
        one = {"a": running(), "b": {"status": "DEPLOYING", "message": "", "replicas": {}}}
        assert readiness.not_running(["a", "b"], one) == "application b"
        assert readiness.not_running(["a", "b", "c"], one) == "applications b, c"
        assert readiness.not_running(["a"], one) == ""

    def test_what_failed_ends_it(self) -> None:
        failed = {"a": running(), "b": {"status": "DEPLOY_FAILED", "message": "no GPU\n", "replicas": {}}}
        assert readiness.why_failed({"a": running()}) == ""
        assert readiness.why_failed(failed) == "application 'b' cannot be deployed: no GPU"

    @pytest.mark.parametrize(
        ("running_now", "live", "expected"),
        [
            (2, ["r1"], "vLLM replicas to join the index (1 of 2)"),
            (2, ["r1", "r1", "r2"], ""),  # ranks of one replica are one
            (0, [], ""),  # scaled to zero
            (1, ["r1", "r2"], ""),  # scaled down meanwhile
        ],
    )
    def test_for_as_many_replicas_as_serve_runs(self, running_now: int, live: list[str], expected: str) -> None:
        """However the config says how many: a number, `auto`, an autoscaling range."""
        pods = [{"replica": name, "live": True} for name in live] + [{"replica": "gone", "live": False}]
        status = {"llm": running(running_now, 1, 5)}
        assert readiness.not_joined(status, {"model": "org/m-1.5", "pods": pods}) == expected
