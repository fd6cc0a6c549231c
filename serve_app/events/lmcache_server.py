"""An `lmcache server` as a child process: ports of its own, asked whether it is well, stopped with its parent.

LMCache keeps KV blocks in this host's memory, in chunks of tokens, for every engine of the host that is attached to it.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from serve_app.errors import StoreError
from serve_app.events.lmcache_source import chunk_size_of
from serve_app.extras import require_module
from serve_app.ports import free_port

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
_ATTEMPTS = 5  # a free port may be taken between our look and the server's
_POLL_S = 0.2


class LMCacheProcess:
    """A server on 127.0.0.1.

    Args:
        size_gb: host memory for KV blocks, in GB.
        chunk_size: tokens per chunk.
        eviction_policy: LMCache's name of it.
        instance: name of the server, for LMCache's own metrics.
        log: file that its output is added to.
        port: where to listen; None takes one that is free, and keeps it.

    Raises:
        ConfigError: LMCache is not installed.
        StoreError: the server did not come up.
    """

    def __init__(
        self,
        *,
        size_gb: float,
        chunk_size: int,
        eviction_policy: str,
        instance: str,
        log: Path,
        port: int | None = None,
    ) -> None:
        require_module("lmcache", "an LMCache server", "lmcache")
        self._arguments = [
            *("--chunk-size", str(chunk_size), "--l1-size-gb", str(size_gb)),
            *("--eviction-policy", eviction_policy, "--supported-transfer-mode", "auto", "--instance-id", instance),
            *("--server-module", json.dumps({"module_path": "serve_app.events.lmcache_module"})),
        ]
        self._log = log
        self.process: subprocess.Popen[bytes]
        for _ in range(1 if port else _ATTEMPTS):
            self.port = port or free_port()
            if self._start():
                return
        raise StoreError(f"lmcache server did not start on port {self.port}, see {log}")

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def is_running(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _start(self) -> bool:
        """Whether it came up."""
        command = [
            # the server goes when this thread goes, however it goes
            *(("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()),
            *(sys.executable, "-m", "lmcache.cli.main", "server", *self._arguments),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--http-port", str(free_port()), "--prometheus-port", str(free_port())),
        ]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while self.is_running() and time.monotonic() < deadline_s:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)):
                    time.sleep(_POLL_S)
                    continue
            try:
                chunk_size_of(self.endpoint)
            except StoreError:
                continue
            if self.is_running():  # or it was somebody else who answered
                return True
        self.stop()
        return False
