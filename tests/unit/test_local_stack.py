"""Stopping a stack whose processes end by themselves meanwhile."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serve_app import local_stack

# A server and two children in a session of their own; on SIGINT it ends and leaves them.
_SERVER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(2):
    print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    pass
"""


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path))


Stack = tuple[subprocess.Popen[bytes], local_stack.Running, list[psutil.Process]]


@pytest.fixture
def stack() -> Iterator[Stack]:
    """The server, what was written down of it, and its children."""
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout is not None
        children = [psutil.Process(int(server.stdout.readline())) for _ in range(2)]
        created_s = psutil.Process(server.pid).create_time()
        yield server, local_stack.Running(server.pid, created_s, "", "", os.devnull, 0, None), children
        server.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@pytest.mark.parametrize("when", ["asking", "ending"])
def test_a_process_that_ends_by_itself_meanwhile_keeps_no_other_running(stack: Stack, when: str) -> None:
    server, running, children = stack

    def on_progress(message: str) -> None:
        """The last moment before signals are sent: the server, or a child, is no more."""
        if message.startswith(when):
            victim = psutil.Process(server.pid) if when == "asking" else children[0]
            victim.kill()
            (server if when == "asking" else victim).wait()

    local_stack.stop(running, on_progress=on_progress)
    assert not any(local_stack._is_there(child) for child in children)
    server.wait(5)


def test_what_is_gone_has_no_family_and_is_not_there(stack: Stack) -> None:
    server, _, _ = stack
    process = psutil.Process(server.pid)
    assert local_stack._is_there(process)
    server.kill()
    server.wait()
    assert local_stack._family(process) == [process]
    assert not local_stack._is_there(process)
