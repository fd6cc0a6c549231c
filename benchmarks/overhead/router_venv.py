"""vllm-router from PyPI, in a virtual environment of its own: its dependencies are not ours.

In: a folder. Out: the path of the command and its version, or the reason why there is none.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PACKAGE: Final = "vllm-router"
_INSTALL_TIMEOUT_S: Final = 600


@dataclass(frozen=True, slots=True)
class RouterInstall:
    command: Path
    version: str


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
