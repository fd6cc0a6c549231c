"""Runs the steps of cluster/docker/Dockerfile up to an image, in a clean folder and without a container runtime.

    python scripts/image_steps.py [TARGET, default service]

COPY copies, RUN runs with an empty environment and this Python; every absolute path of the image is below the folder.
The base image itself is not there: what is shown is that the steps work and that what they have made runs.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "cluster/docker/Dockerfile"
_PATH_OF_IMAGE = re.compile(r"(?<![\w./])/(?=(?:src|dist|opt)\b)")


def steps(target: str) -> Iterator[tuple[str, str]]:
    """(instruction, arguments) of the stages up to this one."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, arguments = line.partition(" ")
        yield instruction, arguments
        if instruction == "FROM" and arguments.endswith(f" AS {target}"):
            return
    raise SystemExit(f"{DOCKERFILE} has no target {target}")


def copy(arguments: str, image: Path) -> None:
    """From the repository; between stages there is one folder, so nothing has to be done."""
    if arguments.startswith("--from="):
        return
    *sources, target = arguments.split()
    place = image / target.lstrip("/")
    for source in sources:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, place)


def run(command: str, image: Path, base: Path) -> None:
    inside = _PATH_OF_IMAGE.sub(f"{shlex.quote(str(image))}/", command)
    print(f"RUN {command}", flush=True)
    quick = {"PIP_NO_COMPILE": "1", "PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # bytecode takes minutes
    environment = {"PATH": f"{base}/bin:/usr/bin:/bin", "HOME": str(image), **quick}
    subprocess.run(["sh", "-ec", inside], cwd=image, env=environment, check=True)


def main(target: str) -> None:
    with tempfile.TemporaryDirectory(prefix="kvcache-image-") as folder:
        image, base = Path(folder) / "image", Path(folder) / "base"
        image.mkdir()
        venv.EnvBuilder(symlinks=True, with_pip=True).create(base)  # what the base image has: Python and pip
        for instruction, arguments in steps(target):
            if instruction == "COPY":
                copy(arguments, image)
            elif instruction == "RUN":
                run(arguments, image, base)
        for command in (["publish", "--help"], ["serve-scores", "--help"]):
            environment = {"PATH": "/usr/bin:/bin", "HOME": str(image), "COLUMNS": "120"}
            subprocess.run(
                [image / "opt/kvcache/bin/kvcache", *command], env=environment, check=True, stdout=subprocess.DEVNULL
            )
        size = subprocess.run(["du", "-sh", image / "opt/kvcache"], capture_output=True, text=True, check=True).stdout
        print(f"{target}: every step works, and what it has made runs ({size.split()[0]})")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["service"])
