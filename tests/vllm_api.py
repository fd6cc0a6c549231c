"""The HTTP endpoints of a vLLM server, played from what vLLM 0.29 has answered: for rare failures.

The answers were captured of a server with SmolLM2 on CPU (tests/vllm_server.py), without histograms' buckets.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from serve_app.ports import free_port

CAPTURED = Path(__file__).parent / "captured" / "vllm-0.29"
Answer = tuple[int, bytes]


def captured(name: str) -> str:
    return (CAPTURED / name).read_text()


def with_labels(text: str, **labels: object) -> str:
    """Another `vllm:cache_config_info`."""
    for name, value in labels.items():
        text, count = re.subn(rf'([{{,]){name}="[^"]*"', rf'\g<1>{name}="{value}"', text)
        assert count
    return text


def with_values(text: str, **values: float) -> str:
    """Other values of metrics, named without `vllm:`."""
    for name, value in values.items():
        text, count = re.subn(rf"(?m)^((?:vllm:)?{name}(?:{{[^}}]*}})?) \S+$", rf"\g<1> {value}", text)
        assert count
    return text


def model_list(*names: str, root: str = "org/model", adapters: tuple[str, ...] = (), owned_by: str = "vllm") -> bytes:
    card = json.loads(captured("models.json"))["data"][0] | {"owned_by": owned_by}
    base = [card | {"id": name, "root": root} for name in names]
    loaded = [card | {"id": name, "root": f"/{name}", "parent": names[0], "max_model_len": None} for name in adapters]
    return json.dumps({"object": "list", "data": base + loaded}).encode()


class Api:
    """One server, on the same port however often it is started.

    `answers` may be changed while it runs: path -> what it answers now.
    """

    def __init__(self, *names: str, **labels: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.metrics = with_labels(captured("metrics-idle.txt"), **labels)
        self.models = model_list(*names)
        self.key = ""  # that it wants
        self.vocabulary = 0  # another tokenizer makes other ids
        self.answers: dict[str, Callable[[Any], Answer]] = {
            "/health": lambda _: (200, b""),
            "/version": lambda _: (200, b'{"version": "0.29.0"}'),
            "/v1/models": lambda _: (200, self.models),
            "/metrics": lambda _: (200, self.metrics.encode()),
            "/tokenize": self._tokenize,
        }
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if api._server is not self.server:  # it is stopped: nobody answers on connections that are left
                    self.close_connection = True
                    return
                path = self.path.partition("?")[0]
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                given = self.headers.get("authorization")
                refused = api.key and path.startswith("/v1") and given != f"Bearer {api.key}"
                answer = (lambda _: (401, b"{}")) if refused else api.answers.get(path)
                status, told = (
                    answer(json.loads(body) if body else None) if answer else (404, b'{"detail": "Not Found"}')
                )
                self.send_response(status)
                self.send_header("content-length", str(len(told)))
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has given up waiting
                    self.wfile.write(told)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Nobody listens on its port any more; connections that are open end with their next request."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def restart(self) -> None:
        """Another process: it says that it has started at another time."""
        self.stop()
        self.metrics = with_values(self.metrics, process_start_time_seconds=time.time())
        self.start()

    def _tokenize(self, body: Any) -> Answer:
        if body["model"] not in {card["id"] for card in json.loads(self.models)["data"]}:
            return 404, b"{}"
        text = body.get("prompt") or json.dumps(body["messages"])
        tokens = [self.vocabulary + byte for byte in text.encode()]
        return 200, json.dumps({"count": len(tokens), "max_model_len": 4096, "tokens": tokens}).encode()
