"""The example of a sidecar says what the command, vLLM and our own endpoints take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from vllm.config.kv_events import KVEventsConfig

from serve_app.cli import app
from serve_app.events import plan

FILE = Path(__file__).parents[2] / "cluster/kubernetes/vllm-sidecar.yaml"
DOCUMENTS = {document["kind"]: document for document in yaml.safe_load_all(FILE.read_text())}
POD: dict[str, Any] = DOCUMENTS["Deployment"]["spec"]["template"]
(SIDECAR,) = POD["spec"]["initContainers"]
(VLLM,) = POD["spec"]["containers"]


def options() -> dict[str, Any]:
    """As the command understands them."""
    publish = typer.main.get_command(app).commands["publish"]  # type: ignore[attr-defined]
    context = publish.make_context("publish", list(SIDECAR["args"]))
    return dict(context.params)


def test_it_is_a_native_sidecar_that_waits_for_vllm() -> None:
    assert SIDECAR["restartPolicy"] == "Always"
    # vLLM is started when the startup probe has succeeded: it cannot be what waits for vLLM.
    assert SIDECAR["startupProbe"]["httpGet"]["path"] == "/healthz"
    assert "readinessProbe" not in SIDECAR


def test_the_command_takes_its_options() -> None:
    assert SIDECAR["command"] == ["kvcache", "publish"]
    given = options()
    vllm_port = next(port["containerPort"] for port in VLLM["ports"] if port["name"] == "http")
    assert given["server"] == f"http://127.0.0.1:{vllm_port}"
    assert f"--port={vllm_port}" in VLLM["args"]
    (port,) = SIDECAR["ports"]
    assert given["listen"] == f"0.0.0.0:{port['containerPort']}"
    variables = {variable["name"]: variable["valueFrom"]["fieldRef"]["fieldPath"] for variable in SIDECAR["env"]}
    assert variables == {plan.IP_VARIABLE: "status.podIP"}


def test_the_engine_publishes_where_the_sidecar_looks() -> None:
    (text,) = (argument.partition("=")[2] for argument in VLLM["args"] if argument.startswith("--kv-events-config="))
    config = KVEventsConfig(**json.loads(text))
    assert config.enable_kv_cache_events
    assert config.endpoint == f"tcp://*:{plan.EVENTS_PORT}"
    assert config.replay_endpoint == f"tcp://*:{plan.REPLAY_PORT}"
    assert KVEventsConfig().endpoint == config.endpoint  # vLLM's own default


@pytest.mark.parametrize("container", [SIDECAR, VLLM], ids=lambda container: container["name"])
def test_probes_ask_ports_that_are_there(container: dict[str, Any]) -> None:
    ports = {port["name"] for port in container["ports"]}
    probes = [container[name]["httpGet"] for name in container if name.endswith("Probe")]
    assert len(probes) >= 2
    for probe in probes:
        assert probe["port"] in ports
        assert probe["path"] in ({"/health"} if container is VLLM else {"/healthz"})
    for document in (DOCUMENTS["Service"], DOCUMENTS["NetworkPolicy"]):
        assert document["spec"].get("selector", POD["metadata"]["labels"]) == POD["metadata"]["labels"]
    assert DOCUMENTS["Service"]["spec"]["clusterIP"] == "None"


def test_volumes_are_those_that_are_mounted() -> None:
    mounted = {mount["name"] for container in (SIDECAR, VLLM) for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in POD["spec"]["volumes"]}
    ((redis),) = (mount for mount in SIDECAR["volumeMounts"])
    assert f"password_file={redis['mountPath']}/password" in options()["redis"]
