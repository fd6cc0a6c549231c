"""One worker of several: `python -m serve_app.service`, with its configuration as the first line of stdin."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import msgspec

from serve_app.service.config import ServiceConfig
from serve_app.service.server import ScoreServer
from serve_app.service.workers import WorkerConfig, leave, run_one


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(process)d %(message)s")
    given = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerConfig)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run_one(ScoreServer(ServiceConfig.model_validate_json(given.config), given.embedded_url))
    leave()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
