"""Where Serve's HTTP proxy listens: only there is it known who can reach an endpoint."""

import ray
from ray.serve.context import _get_global_client

from serve_app.ports import is_loopback


def reachable_host() -> str:
    """The proxy's address, if others than this node's processes can reach it; "" if not, or if there is no Serve."""
    if not ray.is_initialized():
        return ""
    client = _get_global_client()
    host = "" if client is None else str(client.http_config.host or "")
    return "" if is_loopback(host) else host
