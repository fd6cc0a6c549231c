"""Prometheus' text format -> the samples that are wanted, out of the hundreds that an engine gives.

    vllm:num_requests_running{engine="0",model_name="m"} 2.0   ->   Sample({engine: 0, model_name: m}, 2.0)

Source: prometheus.io/docs/instrumenting/exposition_formats.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import NamedTuple

_LABEL = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_LINE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)(?:\s+-?\d+)?\s*')
_ESCAPE = re.compile(r'\\([\\n"])')


class Sample(NamedTuple):
    """One value of a metric, and its labels."""

    labels: Mapping[str, str]
    value: float


def samples(text: str, wanted: Container[str]) -> dict[str, list[Sample]]:
    """Samples by name, of the names that are `wanted`.

    Raises:
        ValueError: a wanted line is not in the format.
    """
    found: dict[str, list[Sample]] = {}
    for line in text.split("\n"):
        if line.startswith("#") or line.partition("{")[0].partition(" ")[0] not in wanted:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"no sample: {line[:80]!r}")
        name, labels, value = match.groups()
        found.setdefault(name, []).append(Sample(_labels(labels or ""), float(value)))
    return found


def _labels(text: str) -> dict[str, str]:
    labels, at = dict[str, str](), 0
    while at < len(text.rstrip()):
        match = _LABEL.match(text, at)
        if match is None:
            raise ValueError(f"no labels: {text[:80]!r}")
        labels[match[1]] = _ESCAPE.sub(lambda escaped: "\n" if escaped[1] == "n" else escaped[1], match[2])
        at = match.end()
    return labels
