"""Where the engine of one replica publishes its KV events: sockets that nobody else on the node has.

    no ranks        Unix sockets in a folder of the replica's own: no port can be taken, replicas never meet
    with ranks      TCP on loopback, rank n on the port of rank 0 plus n: vLLM refuses Unix sockets for rank > 0

Ports are free when they are picked. If one is taken before the engine binds it, the engine does not start, and the
replica that Serve then starts in its place picks others.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from serve_app.events.endpoint import endpoint_of_rank
from serve_app.ports import free_ports

# vLLM binds its event socket only to an address with `*` or `::` in it, and connects to any other. This is 127.0.0.1,
# written so that it binds; `tcp://*` would show the prompts' token ids to the network.
_BIND_LOOPBACK = "[::ffff:127.0.0.1]"


class Endpoints(NamedTuple):
    """The sockets of one engine core, as its publisher connects to them."""

    events: str
    replay: str


class EventSockets:
    """Args: ranks: data parallel ranks of the engine's cores in this replica; None: it has no ranks."""

    def __init__(self, ranks: range | None) -> None:
        self._folder: Path | None = None
        if ranks is None:
            self._folder = Path(tempfile.mkdtemp(prefix="kvcache-"))
            self._bind = self._connect = Endpoints(f"ipc://{self._folder}/events", f"ipc://{self._folder}/replay")
            return
        ports = free_ports(2 * len(ranks))
        rank_0 = ports.start - ranks.start  # a gang's rank 3 alone has two ports, three above what its config names
        self._bind, self._connect = (
            Endpoints(f"tcp://{host}:{rank_0}", f"tcp://{host}:{rank_0 + len(ranks)}")
            for host in (_BIND_LOOPBACK, "127.0.0.1")
        )

    def kv_events_config(self) -> dict[str, Any]:
        """vLLM's `kv_events_config` for the engine."""
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self._bind.events,
            "replay_endpoint": self._bind.replay,
        }

    def of_rank(self, rank: int | None) -> Endpoints:
        """Where to hear one of the engine's cores."""
        return Endpoints(*(endpoint_of_rank(endpoint, rank or 0) for endpoint in self._connect))

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
