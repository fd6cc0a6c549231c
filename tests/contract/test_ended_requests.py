"""vLLM's own figures of ended requests -> what the replica keeps of them for its publisher."""

from __future__ import annotations

import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

from serve_app.deployments.engine_cores import _CoreStats
from serve_app.events.publisher import SERVED_MAX
from serve_app.routing.receipts import Receipt, Receipts
from serve_app.types import PodId, short_id


def test_while_nobody_takes_them_only_the_latest_are_kept() -> None:
    ended = _CoreStats(1)
    for number in range(SERVED_MAX + 5):
        stats = IterationStats()
        stats.finished_requests.append(FinishedRequestStats(FinishReason.STOP, str(number), num_prompt_tokens=7))
        ended.record(None, stats)
    taken = ended.take(0)
    assert [served.request_id for served in taken] == [str(number) for number in range(5, SERVED_MAX + 5)]
    assert taken[0].prompt_tokens == 7
    assert ended.take(0) == []


@pytest.mark.parametrize("form", ["chatcmpl-{}", "cmpl-{}-0"])
def test_the_id_of_a_request_is_cut_as_the_router_cuts_it(form: str) -> None:
    """A client may send an x-request-id of any length: it is kept in receipts, in the log, in Redis."""
    given = "x" * 60_000
    receipts, ended, stats = Receipts(), _CoreStats(1), IterationStats()
    assert len(short_id(given)) == 128
    assert short_id(short_id(given)) == short_id(given) != short_id(given + "x")
    receipts.open(Receipt(short_id(given), 0.0, "r", "hit", "prefix", "pod", 0.0))
    stats.finished_requests.append(FinishedRequestStats(FinishReason.STOP, form.format(given), num_prompt_tokens=7))
    ended.record(None, stats)
    (served,) = ended.take(0)
    assert len(served.request_id) < 160
    closed = receipts.close(PodId("pod"), served)
    assert closed is not None
    assert closed.receipt.actual is not None


def test_each_core_of_an_engine_has_its_own() -> None:
    ended = _CoreStats(2)
    for rank, name in ((1, "b"), (0, "a")):
        stats = IterationStats()
        stats.finished_requests.append(FinishedRequestStats(FinishReason.STOP, name, num_prompt_tokens=7))
        ended.record(None, stats, engine_idx=rank)
    assert [[served.request_id for served in ended.take(place)] for place in range(2)] == [["a"], ["b"]]
