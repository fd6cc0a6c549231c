"""What the write path's tests share. No publisher outlives its test: it would publish into the next one's Valkey."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serve_app.index.mirror import Mirror
from tests.engine import MODEL, PublisherProcess
from tests.helpers import following


@pytest.fixture
def mirror(redis_url: str) -> Iterator[Mirror]:
    with following(redis_url, MODEL) as mirror:
        yield mirror


@pytest.fixture(autouse=True)
def publishers_end_with_their_test() -> Iterator[None]:
    yield
    while PublisherProcess.started:
        PublisherProcess.started.pop().kill()
