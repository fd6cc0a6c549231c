"""`make chaos` sets KVCACHE_CHAOS; without it nothing here is collected: the faults take a quarter of an hour."""

from __future__ import annotations

import os

from tests.integration.conftest import start_stack

__all__ = ["start_stack"]  # the fixture

collect_ignore_glob = [] if os.environ.get("KVCACHE_CHAOS") else ["test_*.py"]
