"""vllm-router from PyPI, in a virtual environment of its own: its dependencies are not ours.

In: a folder. Out: the path of the command and its version, or the reason why there is none.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from serve_app.ports import free_port

PACKAGE: Final = "vllm-router"
_INSTALL_TIMEOUT_S: Final = 600


@dataclass(frozen=True, slots=True)
class RouterInstall:
    command: Path
    version: str

    def serving(self, port: int, policy: str, workers: Mapping[str, int], model: str, block_size: int) -> list[str]:
        """The command that routes by `policy` on 127.0.0.1.

        Args:
            workers: URL of each engine, and the port of its KV events; the replay socket's is the next one.
        """
        command = [str(self.command), "--host", "127.0.0.1", "--port", str(port), "--policy", policy]
        command += ["--prometheus-port", str(free_port()), "--log-level", "error", "--worker-urls", *workers]
        if policy == "kv_aware":
            command += ["--kv-event-model", model, "--kv-event-block-size", str(block_size)]
            for url, events in workers.items():
                command += ["--kv-event-source", f"{url}=tcp://127.0.0.1:{events}"]
                command += ["--kv-event-replay-source", f"{url}=tcp://127.0.0.1:{events + 1}"]
        return command


class NotInstallable(Exception):
    """The message says why."""


def install_router(folder: Path, say: Callable[[str], None]) -> RouterInstall:
    """The command in `folder`; installed there unless it is there already."""
    command, python = folder / "bin" / PACKAGE, folder / "bin" / "python"
    try:
        if not command.exists():
            say(f"installing {PACKAGE} into {folder}")
            _run([sys.executable, "-m", "venv", str(folder)])
            _run([str(python), "-m", "pip", "install", "--quiet", PACKAGE])
        found = _run([str(python), "-m", "pip", "show", PACKAGE])
    except (OSError, subprocess.SubprocessError) as error:
        details = getattr(error, "stderr", "") or str(error)
        raise NotInstallable(f"{PACKAGE} cannot be installed: {details.strip()[-400:]}") from error
    version = re.search(r"^Version: (.+)$", found, re.MULTILINE)
    return RouterInstall(command, version[1] if version else "unknown")


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S).stdout
