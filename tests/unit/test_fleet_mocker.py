"""The simulator gives what Dynamo's offline mocker gives for the same trace: hits within 1 point, times within 10%."""

from __future__ import annotations

import pytest

from benchmarks.fleet.compare_mocker import CASES, POLICIES, Case, compare


@pytest.mark.parametrize("mode", POLICIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_mocker(case: Case, mode: str) -> None:
    pytest.importorskip("dynamo._core", reason="pip install --no-deps ai-dynamo-runtime")
    theirs, ours = compare(case, [1], mode)
    assert ours.hit_rate == pytest.approx(theirs.hit_rate, abs=0.01)
    assert ours.ttft_mean_s == pytest.approx(theirs.ttft_mean_s, rel=0.1)
    assert ours.ttft_p90_s == pytest.approx(theirs.ttft_p90_s, rel=0.1)
