"""The chart, rendered by Helm's own engine: `cluster/helm/kvcache` with the values of `cluster/helm/examples`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "cluster/helm/kvcache"
EXAMPLES = sorted(path.stem for path in (ROOT / "cluster/helm/examples").glob("*.yaml"))
RELEASE, NAMESPACE = "kvcache", "serving"

_RANDOM = re.compile(r"^(\s+(?:writer|reader)-password:) \S+$", re.MULTILINE)
_BOARD = re.compile(r"^(  kvcache-[\w-]+\.json: \|\n)(?:    .*\n)+", re.MULTILINE)  # of serve_app/dashboards, as it is
_NOTES = "NOTES.txt"


@cache
def loaded() -> helm_python.Chart:
    helm_python.disable_logging()  # it says of every link that it follows it
    return helm_python.Chart.load(CHART)


def values(example: str) -> dict[str, Any]:
    given: dict[str, Any] = yaml.safe_load((ROOT / f"cluster/helm/examples/{example}.yaml").read_text())
    return given


def render(given: dict[str, Any]) -> dict[str, str]:
    """Template -> its text, without empty lines and random passwords. Raises HelmError where the schema refuses."""
    rendered = loaded().render(given, name=RELEASE, namespace=NAMESPACE)
    texts = {name.partition("templates/")[2]: _plain(text) for name, text in sorted(rendered.items())}
    return {name: text for name, text in texts.items() if text}


def manifest(example: str) -> str:
    """All of an example as one text: what its golden file holds."""
    whole = "\n".join(f"# {name}\n{text}" for name, text in render(values(example)).items())
    return _BOARD.sub(r"\1    ...\n", whole)


@cache
def example(name: str) -> list[dict[str, Any]]:
    """What `kubectl` would be given."""
    texts = (text for template, text in render(values(name)).items() if template != _NOTES)
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def one(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = (each for each in documents if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def _plain(text: str) -> str:
    lines = (line.rstrip() for line in _RANDOM.sub(r"\1 RANDOM", text).splitlines())
    kept = [line for line in lines if line]
    while kept and kept[0] == "---":
        kept.pop(0)
    while kept and kept[-1] == "---":
        kept.pop()
    return "".join(f"{line}\n" for line in kept)
