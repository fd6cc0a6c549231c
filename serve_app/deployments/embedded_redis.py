"""`redis_url: embedded`: a Valkey that lives and dies with the Ray session, at a path that all its processes know."""

from pathlib import Path

import ray

from serve_app.config import EMBEDDED
from serve_app.errors import ConfigError, StoreError
from serve_app.index.valkey import ValkeyProcess, check_private

_SCHEME = "unix://"


def resolve_redis_url(url: str) -> str:
    """The URL itself, or for `embedded` the URL of this Ray session's Valkey.

    Raises:
        ConfigError: `embedded` on a cluster of several nodes, which do not share a Unix socket; or the folder of the
            socket is open to others.
    """
    if url != EMBEDDED:
        return url
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    if nodes > 1:
        raise ConfigError(
            f"redis_url: embedded works on one node, and this Ray cluster has {nodes}; "
            "set redis_url: redis://HOST:6379 to a Redis or Valkey that all of them reach"
        )
    folder = session_folder() / "kvcache-valkey"
    if folder.exists():
        check_private(folder)
    return f"{_SCHEME}{folder}/socket"


def session_folder() -> Path:
    """Of this Ray session, on this node. Ray has no public call for it."""
    node = ray._private.worker.global_worker.node
    assert node is not None
    return Path(node.get_session_dir_path())


class EmbeddedRedis:
    """The deployment around it. Serve restarts it when it no longer answers; publishers then publish again.

    Every application that needs it has one: the first starts the server, and the others look after it.
    """

    def __init__(self) -> None:
        self._server = ValkeyProcess(Path(resolve_redis_url(EMBEDDED).removeprefix(_SCHEME)))

    def check_health(self) -> None:
        if not self._server.is_up():
            raise StoreError("the embedded Valkey does not answer")

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.stop()
