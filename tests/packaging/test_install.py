"""pip installs the base of the package: how much it is, and that its command starts."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from serve_app.commands.configs import QUICKSTART

ROOT = Path(__file__).parents[2]
MOST_MB = 560  # 490 when this was written: llvmlite 162, transformers 122, numpy 73, numba 34


@pytest.mark.integration
@pytest.mark.timeout(1200)  # pip, and what it downloads
def test_the_base_installation_is_small_and_starts(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    pip = (tmp_path / "bin" / "pip", "--disable-pip-version-check", "--quiet")
    subprocess.run([*pip, "install", "-c", ROOT / "constraints.txt", wheel], check=True)
    made = subprocess.check_output([tmp_path / "bin" / "kvcache", "key", "scheduler"], text=True)
    assert "name: scheduler" in made
    shown = subprocess.check_output([tmp_path / "bin" / "kvcache", "config", "show", "quickstart"], text=True)
    assert shown == QUICKSTART.read_text()
    used = sum(file.lstat().st_blocks for file in (tmp_path / "lib").rglob("*")) * 512 / 2**20
    assert used < MOST_MB


def test_dashboards_and_alerts_are_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {Path(name).name for name in archive.namelist() if name.startswith("serve_app/dashboards/")}
    assert inside == {path.name for path in (ROOT / "serve_app/dashboards").iterdir()}
