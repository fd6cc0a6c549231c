"""The stack that things are broken in, and its parts by name."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil

from serve_app import local_stack
from tests.proxy import Proxy
from tests.servers import Server

# A word of the command line of each part; Ray titles its actors by deployment.
_WORDS = {"publisher": "serve_app.events", "lmcache": "lmcache.cli.main"}


@dataclass(frozen=True, slots=True)
class Target:
    running: local_stack.Running
    server: Server  # Valkey
    proxy: Proxy  # in front of it: all of the stack goes through

    def first(self, part: str) -> psutil.Process:
        """The oldest process of a part."""
        return min(self.all(part), key=lambda process: process.create_time())

    def all(self, part: str) -> list[psutil.Process]:
        """Every process of a part: publisher, lmcache, or a deployment's name."""
        word = _WORDS.get(part, f":{part}")
        found = []
        for process in psutil.Process(self.running.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if any(word in argument for argument in command) and command[0] not in ("setpriv", "sh"):
                    found.append(process)
        assert found, f"no process of {part} in the stack"
        return found
