"""A publisher as a child process: `python -m serve_app.events`, told its settings and the engine's load through a pipe.

It leaves Redis and ends when its stdin ends, so also when this process is killed. Nothing here waits for a child that
does not read: what its pipe does not take is left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time

import msgspec

from serve_app.events.publisher import Feed, PublisherConfig, Report
from serve_app.supervision import Backoff

logger = logging.getLogger("ray.serve")

LEAVE_S = 10.0  # for Redis to hear that the domain leaves
_READ_BYTES = 65536

_decode_report = msgspec.json.Decoder(Report).decode


class PublisherChild:
    """Args:
    config: what it publishes.
    reports: whether it is to say how it is doing.

    Raises:
        OSError: no process can be made.
    """

    def __init__(self, config: PublisherConfig, *, reports: bool = False) -> None:
        self.config = config
        self.report: Report | None = None  # the last one
        self.heard_at_s = time.monotonic()  # when that was; else when it was started
        command = [sys.executable, "-m", "serve_app.events", *(["--report"] if reports else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE if reports else None)
        assert self._process.stdin is not None
        self._untold = b""
        self._unread = b""
        with contextlib.suppress(BrokenPipeError):  # it has ended already: seen at the next `poll`
            self._process.stdin.write(msgspec.json.encode(config) + b"\n")
            self._process.stdin.flush()
        os.set_blocking(self._process.stdin.fileno(), False)
        if self._process.stdout is not None:
            os.set_blocking(self._process.stdout.fileno(), False)

    def poll(self) -> int | None:
        """Its exit status; None: it runs."""
        return self._process.poll()

    def feed(self, feed: Feed) -> bool:
        """Tell it of the engine's requests. False: left out, for it has not read what it was told before."""
        assert self._process.stdin is not None
        taken = not self._untold
        self._untold = self._untold or msgspec.json.encode(feed) + b"\n"
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self._untold = self._untold[os.write(self._process.stdin.fileno(), self._untold) :]
        return taken

    def read_reports(self) -> None:
        """Take in what it has said since the last call."""
        assert self._process.stdout is not None
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._process.stdout.fileno(), _READ_BYTES):
                *lines, self._unread = (self._unread + data).split(b"\n")
                for line in lines:
                    with contextlib.suppress(msgspec.DecodeError):  # what a library prints
                        self.report, self.heard_at_s = _decode_report(line), time.monotonic()

    def close(self) -> None:
        """Tell it to end: its domain leaves."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait(self, timeout_s: float = LEAVE_S) -> None:
        """Until it has ended, after `close`; one that does not in time is killed."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class KeptPublisher:
    """A publisher's process, started again when it ends."""

    def __init__(self, config: PublisherConfig, *, reports: bool = False) -> None:
        self.config = config
        self.child: PublisherChild | None = None
        self._reports = reports
        self._backoff = Backoff()
        self._started_s = self._start_at_s = 0.0
        self._seen_at_s = time.monotonic()

    @property
    def heard_at_s(self) -> float:
        """When it last said something, was started, or was seen to have ended."""
        return self.child.heard_at_s if self.child is not None else self._seen_at_s

    def keep(self) -> bool:
        """Start it if it does not run and it is time to. Returns whether it has been started now."""
        now_s = time.monotonic()
        if self.child is not None:
            if (status := self.child.poll()) is None:
                return False
            logger.error("the publisher of %s ended with %s", self.config.pod, status)
            self.end()
            self._seen_at_s = now_s
            self._start_at_s = now_s + self._backoff.after(now_s - self._started_s)
        return now_s >= self._start_at_s and self._start(now_s)

    def _start(self, now_s: float) -> bool:
        self._started_s = now_s
        try:
            self.child = PublisherChild(self.config, reports=self._reports)
        except OSError as error:  # no memory, or too many processes
            self._start_at_s = now_s + self._backoff.after(0.0)
            logger.error("the publisher of %s cannot be started: %s", self.config.pod, error)
            return False
        return True

    def end(self, timeout_s: float = LEAVE_S) -> None:
        """Its domain leaves."""
        child, self.child = self.child, None
        if child is not None:
            child.close()
            child.wait(timeout_s)
