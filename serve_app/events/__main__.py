"""`python -m serve_app.events`: the publisher as a child of an engine's process.

The first line of stdin is the PublisherConfig as JSON, every other line a Feed: the engine's requests. The end of
stdin means that the parent is gone, however it went: then the domain leaves Redis and the process ends. With `--report`
it says how it is doing on stdout, a `Report` a second.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import msgspec

from serve_app.errors import ConfigError
from serve_app.events.heap import give_back
from serve_app.events.publisher import Publisher, PublisherConfig


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s kvcache-publisher %(levelname)s %(message)s")
    give_back()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    first_line = bytearray()
    while not first_line.endswith(b"\n"):  # byte by byte and unbuffered: what follows belongs to the feed
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            sys.exit("no configuration on stdin")
        first_line += byte
    config = msgspec.json.decode(bytes(first_line), type=PublisherConfig)
    try:
        reports = sys.stdout.fileno() if "--report" in sys.argv[1:] else None
        publisher = Publisher(config, feed=sys.stdin.fileno(), reports=reports)
    except ConfigError as error:
        sys.exit(f"kvcache-publisher: {error}")
    publisher.run(stop)


if __name__ == "__main__":
    main()
