"""The manifests in cluster/: names and ports that must agree do, and what the picker's protocol fixes is so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"


def inference_pool() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for document in yaml.safe_load_all((CLUSTER / "kubernetes/inference-pool.yaml").read_text()):
        found.setdefault(document["kind"], []).append(document)
    return found


def test_the_pool_names_the_picker_and_fails_open() -> None:
    found = inference_pool()
    (pool,), (service,), (deployment,) = found["InferencePool"], found["Service"], found["Deployment"]
    picker = pool["spec"]["endpointPickerRef"]
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert picker["name"] == service["metadata"]["name"]
    assert picker["failureMode"] == "FailOpen"
    (port,) = service["spec"]["ports"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert picker["port"]["number"] == port["port"]
    assert port["targetPort"] in [one["containerPort"] for one in container["ports"]]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]


def test_routes_and_objectives_are_of_the_pool() -> None:
    found = inference_pool()
    name, group = found["InferencePool"][0]["metadata"]["name"], "inference.networking.k8s.io"
    (route,) = found["HTTPRoute"]
    references = [one["spec"]["poolRef"] for one in found["InferenceObjective"]] + route["spec"]["rules"][0][
        "backendRefs"
    ]
    assert references == [{"group": group, "kind": "InferencePool", "name": name}] * 3
    assert {one["apiVersion"] for one in found["InferenceObjective"]} == {"inference.networking.x-k8s.io/v1alpha2"}
    assert len({one["spec"]["priority"] for one in found["InferenceObjective"]}) == 2
