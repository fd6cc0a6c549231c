"""vLLM's own figures of ended requests -> what the replica keeps of them for its publisher."""

from __future__ import annotations

from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

from serve_app.deployments.vllm_replica import _EndedRequests
from serve_app.events.publisher import SERVED_MAX


def test_while_nobody_takes_them_only_the_latest_are_kept() -> None:
    ended = _EndedRequests()
    for number in range(SERVED_MAX + 5):
        stats = IterationStats()
        stats.finished_requests.append(FinishedRequestStats(FinishReason.STOP, str(number), num_prompt_tokens=7))
        ended.record(None, stats)
    taken = ended.take()
    assert [served.request_id for served in taken] == [str(number) for number in range(5, SERVED_MAX + 5)]
    assert taken[0].prompt_tokens == 7
    assert ended.take() == []
