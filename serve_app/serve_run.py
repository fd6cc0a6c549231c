"""The process that `kvcache up` starts: `serve run CONFIG`, which also writes down what Serve says of its applications.

    python -m serve_app.serve_run CONFIG STATUS

STATUS is JSON, written anew twice a second: application -> {"status", "message", "replicas"}, the last one being
deployment -> replicas that run. So who waits needs no port and no key of Ray's dashboard.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve

_PERIOD_S = 0.5
_RUNNING = "RUNNING"

logger = logging.getLogger(__name__)


def main() -> None:
    config, status = sys.argv[1:]
    # It stops on SIGINT: a background shell hands on an ignored one, so it is set again.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_tell, args=(Path(status),), daemon=True).start()
    from ray.serve.scripts import cli

    cli(["run", config])


def _tell(path: Path) -> None:
    """Until the process ends."""
    while True:
        time.sleep(_PERIOD_S)
        if not ray.is_initialized():
            continue
        try:
            told = {name: _application(one) for name, one in serve.status().applications.items()}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(told))
            partial.replace(path)
        except Exception as error:  # Serve is starting, or ending
            logger.debug("Serve does not tell its status: %r", error)


def _application(one: Any) -> dict[str, Any]:
    replicas = {name: int(each.replica_states.get(_RUNNING, 0)) for name, each in one.deployments.items()}
    return {"status": str(one.status.value), "message": one.message, "replicas": replicas}


if __name__ == "__main__":
    main()
