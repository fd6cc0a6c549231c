"""Samples of Prometheus' text format, against the parser of Prometheus' own client."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.events.exposition import samples
from tests.vllm_api import captured


@pytest.mark.parametrize("name", ["metrics-idle.txt", "metrics-used.txt"])
def test_all_that_vllm_says(name: str) -> None:
    text = captured(name)
    expected: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            expected.setdefault(sample.name, []).append((sample.labels, sample.value))
    assert len(expected) > 40
    assert samples(text, expected) == expected


@given(st.dictionaries(st.from_regex(r"[a-zA-Z][a-zA-Z0-9_]*", fullmatch=True), st.text(), max_size=4), st.floats())
def test_any_labels(labels: dict[str, str], value: float) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("g", "", list(labels), registry=registry)
    (gauge.labels(**labels) if labels else gauge).set(value)
    text = generate_latest(registry).decode("utf-8", "surrogatepass")
    ((found, got),) = samples(text, {"g"})["g"]
    assert found == labels
    assert repr(got) == repr(float(value))


def test_what_is_not_wanted_is_not_looked_at() -> None:
    assert samples('other{broken 1\nwanted 1\nwanted_too 2\nwanted{a="b"} 3 1700000000000', {"wanted"}) == {
        "wanted": [({}, 1.0), ({"a": "b"}, 3.0)]
    }


@pytest.mark.parametrize("line", ["x", "x{} ", "x{a=b} 1", 'x{a="b} 1', "x one", 'x{a="b" c="d"} 1', "x 1 2 3"])
def test_a_wanted_line_that_is_none(line: str) -> None:
    with pytest.raises(ValueError, match=r"no sample|no labels|could not convert"):
        samples(line, {"x"})
