"""No publisher outlives its test: one that did would publish into the next test's Valkey."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine import PublisherProcess


@pytest.fixture(autouse=True)
def publishers_end_with_their_test() -> Iterator[None]:
    yield
    while PublisherProcess.started:
        PublisherProcess.started.pop().kill()
