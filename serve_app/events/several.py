"""Several publishers, one process each, that live and end together: for the ranks of one engine.

In: their configs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from serve_app.events.child import PublisherChild
from serve_app.events.publisher import PublisherConfig

logger = logging.getLogger(__name__)

_LOOK_S = 0.2


def run_several(configs: Sequence[PublisherConfig], stop: threading.Event) -> int:
    """Run a publisher for each, until `stop` is set or one of them ends.

    Returns:
        0, or the exit status of the one that has ended: then whoever started this starts all of them again.
    """
    children: list[PublisherChild] = []
    try:
        for config in configs:
            children.append(PublisherChild(config))
        while not stop.wait(_LOOK_S):
            for child in children:
                if (status := child.poll()) is not None:
                    logger.error("the publisher of %s has ended with %d; the others end too", child.config.pod, status)
                    return status or 1
        return 0
    finally:
        for child in children:
            child.close()
        for child in children:
            child.wait()
