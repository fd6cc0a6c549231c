"""Load from vLLM's metrics: answers of vLLM 0.29, with other figures in them."""

from __future__ import annotations

import pytest

from serve_app.events.publisher import Feed
from serve_app.events.scraping import Scraper
from serve_app.routing.receipts import Receipts
from serve_app.types import PodId, Served
from tests.vllm_api import captured, with_labels, with_values

IDLE, USED = captured("metrics-idle.txt"), captured("metrics-used.txt")


def same_life(text: str) -> str:
    """As the other one's next scrape: only figures are others."""
    return with_values(text, process_start_time_seconds=1.0)


def test_requests_and_usage() -> None:
    busy = with_values(IDLE, num_requests_running=3.0, num_requests_waiting=2.0, kv_cache_usage_perc=0.25)
    assert Scraper((0,)).read(busy) == {0: Feed(5, usage=0.25, momentary=True)}


def test_what_a_connector_loads_into_is_not_compared() -> None:
    busy = with_values(IDLE, kv_cache_usage_perc=0.25, external_prefix_cache_queries_total=100.0)
    assert Scraper((0,)).read(busy) == {0: Feed(0, momentary=True)}


def test_requests_that_have_ended_since() -> None:
    scraper = Scraper((0,))
    assert scraper.read(same_life(USED)) == {0: Feed(0, momentary=True)}  # nobody knows since when
    fresh = Scraper((0,))
    fresh.read(same_life(IDLE))
    feeds = fresh.read(same_life(USED))
    assert feeds is not None
    # Three prompts of 634 tokens; of the third 608 were cached. 27.67 s of prefill.
    (served,) = feeds[0].served
    assert served[:3] == ("", 634, 634 - round(1294 / 3))
    assert served.queued_s == pytest.approx(3.36087e-5, rel=1e-4)
    assert served.prefill_s == pytest.approx(9.22334)
    assert fresh.read(same_life(USED)) == {0: Feed(0, momentary=True)}


def test_a_mean_of_several_closes_no_receipt() -> None:
    receipts = Receipts()
    receipts._open[""] = None  # type: ignore[assignment]  # a request without an id
    assert receipts.close(PodId("p"), Served("", 634, 0, 0.0, 1.0)) is None
    assert "" in receipts._open


def test_ranks_are_told_apart() -> None:
    text = with_values(IDLE, num_requests_running=1.0) + with_values(IDLE, num_requests_running=7.0).replace(
        'engine="0"', 'engine="1"'
    )
    scraper = Scraper((1, 0, 2))
    feeds = scraper.read(text)
    assert feeds is not None
    assert {rank: feed.in_flight for rank, feed in feeds.items()} == {0: 1, 1: 7}


@pytest.mark.parametrize(
    "changed",
    [
        with_values(IDLE, process_start_time_seconds=2.0),
        with_labels(IDLE, num_gpu_blocks=161),
        with_labels(IDLE, block_size=16),
    ],
)
def test_another_life(changed: str) -> None:
    scraper = Scraper((0,))
    assert scraper.read(IDLE) is not None
    assert scraper.read(IDLE) is not None
    assert scraper.read(changed) is None


def test_counters_that_fall_are_no_requests() -> None:
    scraper = Scraper((0,))
    scraper.read(same_life(USED))
    assert scraper.read(same_life(IDLE)) == {0: Feed(0, momentary=True)}


@pytest.mark.parametrize("text", ["", "<html>", "sglang:num_running_reqs 3", "vllm:num_requests_running{ 1"])
def test_garbage_is_no_life(text: str) -> None:
    scraper = Scraper((0,))
    with pytest.raises(ValueError, match="no "):
        scraper.read(text)
    assert scraper.read(IDLE) is not None
    with pytest.raises(ValueError, match="no "):
        scraper.read(text)
    assert scraper.read(IDLE) is not None


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1.0"])
def test_figures_that_cannot_be(value: str) -> None:
    text = IDLE.replace('perc{engine="0",model_name="smol"} 0.0', f'perc{{engine="0",model_name="smol"}} {value}')
    assert text != IDLE
    assert Scraper((0,)).read(text) == {0: Feed(0, momentary=True)}


def test_a_server_without_metrics_of_vllm() -> None:
    assert Scraper(()).read("process_start_time_seconds 1\n") == {}
