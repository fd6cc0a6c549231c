"""What small HTTP servers of tests have in common."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import Any


class Answering(BaseHTTPRequestHandler):
    """Reads JSON, answers with a length, and logs nothing."""

    def asked(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["content-length"])))

    def say(self, status: int, body: Any) -> None:
        self.answer(json.dumps(body).encode(), status)

    def answer(self, content: bytes, status: int = 200, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass
