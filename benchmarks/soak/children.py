"""The processes that a soak starts, what the system says of them, and their end."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from benchmarks.soak.verdict import ProcessSamples

ROOT: Final = Path(__file__).resolve().parents[2]
_PAGE_MB: Final = os.sysconf("SC_PAGE_SIZE") / 1e6
_STOP_S: Final = 20.0
_WITH_US: Final = ("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()  # who does not read stdin


class Children:
    """Ctrl-C reaches none of them (a session each): they end when this process says so, or is gone."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._listening: set[int] = set()  # pids whose stdin is read
        self._watched: dict[str, int] = {}  # name -> pid
        self.samples: dict[str, ProcessSamples] = {}
        self.died: list[str] = []

    def start(
        self, name: str, kind: str, command: Sequence[str], *, config: Any = None, env: Any = None
    ) -> subprocess.Popen[bytes]:
        """`config` is the first line of its stdin, which stays open."""
        with (self._logs / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(
                [*_WITH_US, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,  # `-m` looks there first
                env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
                start_new_session=True,
            )
        self._processes[name] = child
        self.watch(name, kind, child.pid)
        if config is not None:
            self._listening.add(child.pid)
            assert child.stdin
            child.stdin.write(msgspec.json.encode(config) + b"\n")
            child.stdin.flush()
        return child

    def python(self, name: str, kind: str, module: str, config: Any) -> None:
        self.start(name, kind, [sys.executable, "-m", module], config=config)

    def watch(self, name: str, kind: str, pid: int) -> None:
        self._watched[name] = pid
        self.samples[name] = ProcessSamples(kind)

    def sample(self, at_s: float) -> None:
        """Memory and file descriptors of everything watched."""
        for name, pid in list(self._watched.items()):
            try:
                rss = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MB
                fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            except OSError:
                rss, fds = 0.0, 0
            child = self._processes.get(name)
            if not rss or (child is not None and child.poll() is not None):
                self.died.append(name)
                del self._watched[name]
                continue
            self.samples[name].rss_mb.append((at_s, rss))
            self.samples[name].fds.append((at_s, fds))

    def rss_mb(self) -> dict[str, float]:
        """Of each kind of process together, as sampled last."""
        rss: dict[str, float] = {}
        for samples in self.samples.values():
            if samples.rss_mb:
                rss[samples.kind] = rss.get(samples.kind, 0.0) + samples.rss_mb[-1][1]
        return rss

    def cpu_s(self) -> dict[str, float]:
        """User and system time that each kind of process has used."""
        used: dict[str, float] = {}
        for name, pid in self._watched.items():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks = int(fields[11]) + int(fields[12])
                kind = self.samples[name].kind
                used[kind] = used.get(kind, 0.0) + ticks / os.sysconf("SC_CLK_TCK")
        return used

    def stop(self) -> None:
        """All of them, each by its pid, in the reverse order of their start."""
        family: list[psutil.Process] = []
        for child in self._processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                family += psutil.Process(child.pid).children(recursive=True)
        several = list(self._processes.values())[::-1]
        for child in several:
            assert child.stdin
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        deadline_s = time.monotonic() + _STOP_S
        for child in several:
            if child.pid in self._listening:  # it ends by itself; the others know nothing of their stdin
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.1, deadline_s - time.monotonic()))
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        for member in family:  # an engine core that has outlived its server
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
