"""The locks: a hash for everything, at the versions that are tested."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement, maxsplit=1)[0].lower().replace("_", "-").replace(".", "-")


@pytest.mark.parametrize(
    ("file", "of_extras"), [("requirements.lock", ["serve", "service"]), ("requirements-service.lock", ["service"])]
)
def test_everything_has_a_hash_and_is_what_is_tested(file: str, of_extras: list[str]) -> None:
    tested = dict(
        (_name(line), line.partition("==")[2])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    locked = {}
    for line in (ROOT / file).read_text().splitlines():
        if not line.startswith("#"):
            found = re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
            assert found is not None, line
            locked[_name(found[1])] = found[2]
    assert {name: version for name, version in locked.items() if tested.get(name) != version} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(each for extra in of_extras for each in extras[extra])]
    assert {_name(each) for each in needed} <= locked.keys()
