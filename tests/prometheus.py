"""A real Prometheus: `prometheus` and `promtool` of the machine, or of Debian's package, unpacked and not installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from serve_app.model import cache_home

_PACKAGE = "prometheus"


@cache
def folder() -> Path:
    """Where both programs are. The package is fetched once, and kept with what else this project keeps."""
    if (found := shutil.which("promtool")) and shutil.which("prometheus"):
        return Path(found).parent
    programs = cache_home() / "prometheus/usr/bin"
    if not programs.exists():
        if shutil.which("apt-get") is None:
            pytest.skip("prometheus is neither on PATH nor in reach (apt-get): install it to run this")
        _unpack(programs.parents[1])
    return programs


def _unpack(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        Path(work).chmod(0o755)
        for command in (["apt-get", "update"], ["apt-get", "download", _PACKAGE]):
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300, check=False)
        if not (packages := list(Path(work).glob("*.deb"))):
            pytest.skip(f"apt-get cannot fetch {_PACKAGE}: {done.stderr.strip()[-200:]}")
        subprocess.run(["dpkg", "-x", packages[0], Path(work) / "all"], check=True)
        (Path(work) / "all").rename(target)


def promtool(*arguments: str | Path) -> str:
    """Its output. Raises AssertionError where it finds something wrong."""
    done = subprocess.run([folder() / "promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
