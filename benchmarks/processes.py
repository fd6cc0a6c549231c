"""What benchmarks need to start things of their own: variables, free ports, processes, the wait until they are up."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx
import psutil

from serve_app.ports import free_port

_POLL_S: Final = 0.2
_STOP_S: Final = 15.0


@contextmanager
def inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Put into the environment that every process started inside inherits."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def process(
    command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs inside; at the end it is ended with all that it has started."""
    with log.open("ab") as output:
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(variables or {})},
        )
    family = []
    try:
        yield started
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(_STOP_S)
        for member in family:  # an engine core that has outlived its server
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        started.wait()


def free_pair() -> int:
    """A port that is free together with the next one."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.socket() as next_one:
            next_one.bind(("127.0.0.1", port + 1))
            return port


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def until(check: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Raises TimeoutError: `check` was not true in time."""
    deadline_s = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what}: nothing after {timeout_s:.0f} s")
        time.sleep(_POLL_S)
