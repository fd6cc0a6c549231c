"""Several publishers, one process each, that live and end together: for the ranks of one engine.

In: their configs. Each child is `python -m serve_app.events`, which leaves Redis when its stdin ends, so also when this
process is killed.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence

import msgspec

from serve_app.events.publisher import PublisherConfig

logger = logging.getLogger(__name__)

_LOOK_S = 0.2
_LEAVE_S = 10.0  # for Redis to hear that the domains leave


def run_several(configs: Sequence[PublisherConfig], stop: threading.Event) -> int:
    """Run a publisher for each, until `stop` is set or one of them ends.

    Returns:
        0, or the exit status of the one that has ended: then whoever started this starts all of them again.
    """
    children: list[subprocess.Popen[bytes]] = []
    try:
        for config in configs:
            child = subprocess.Popen([sys.executable, "-m", "serve_app.events"], stdin=subprocess.PIPE)
            children.append(child)
            _tell(child, config)
        while not stop.wait(_LOOK_S):
            for child, config in zip(children, configs, strict=True):
                if (status := child.poll()) is not None:
                    logger.error("the publisher of %s has ended with %d; the others end too", config.pod, status)
                    return status or 1
        return 0
    finally:
        for child in children:
            assert child.stdin is not None
            child.stdin.close()
        for child in children:
            try:
                child.wait(_LEAVE_S)
            except subprocess.TimeoutExpired:
                child.kill()


def _tell(child: subprocess.Popen[bytes], config: PublisherConfig) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already
        child.stdin.write(msgspec.json.encode(config) + b"\n")
        child.stdin.flush()
