"""What a Serve config must have before it serves. Plain: facts in, a sentence out.

Serve says of each application    RUNNING; how many replicas each of its deployments has
the graph says of each pod        whether it is live
the OpenAI API                    lists its models
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from serve_app.serve_config import applications

Status = Mapping[str, Mapping[str, Any]]
"""Application -> `status`, `message`, `replicas`, as serve_run.py writes it."""

_REPLICAS = ("VLLMReplica", "DPReplica")  # deployments whose replicas join the index, `NAME:MODEL`
_DEFAULT_NAME = "default"


def names(config: Mapping[str, Any]) -> list[str]:
    """Of the applications, as Serve calls them."""
    return [str(app.get("name") or _DEFAULT_NAME) for app in applications(config)]


def why_failed(status: Status) -> str:
    """What Serve has given up; empty: nothing."""
    for name, one in status.items():
        if one["status"] == "DEPLOY_FAILED":
            return f"application {name!r} cannot be deployed: {one['message'].strip()}"
    return ""


def not_running(wanted: Collection[str], status: Status) -> str:
    """What Serve has not ready yet; empty: all of it is running."""
    if not status:
        return "Ray Serve"
    waiting = [name for name in wanted if status.get(name, {}).get("status") != "RUNNING"]
    if not waiting:
        return ""
    return f"application{'s' if len(waiting) > 1 else ''} {', '.join(waiting)}"


def not_joined(status: Status, described: Mapping[str, Any]) -> str:
    """Replicas that run and are not in the graph's index; empty: all are."""
    model = str(described["model"]).replace("/", "--").replace(".", "_")  # as Ray names the deployment
    running = sum(
        count
        for one in status.values()
        for deployment, count in one["replicas"].items()
        if deployment in {f"{kind}:{model}" for kind in _REPLICAS}
    )
    live = len({pod["replica"] for pod in described["pods"] if pod["live"]})
    return f"vLLM replicas to join the index ({live} of {running})" if live < running else ""
