"""Replay of Mooncake's traces: requests come at the trace's times, whatever is still unanswered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.fleet.requests import BLOCK_SIZE_TOKENS, Record, Request
from benchmarks.fleet.traces import MooncakeLine, Part, half, read_lines
from benchmarks.fleet.workloads import NEVER_S, Stage, numbered_keys
from serve_app.types import BlockKey

TRACE_BLOCK_TOKENS = 512  # Mooncake's block
_ANSWERS = 1 << 40  # numbers of answers' blocks begin here


class MooncakeTrace:
    """Workload: one request for each line.

    Equal ids mean equal prefixes, so each stands for as many of the replicas' blocks as fit. The last id may cover
    fewer than 512 tokens; the blocks inside it are taken as equal too where the id is equal. Sessions are not in the
    trace: the first id stands for one.

    Args:
        speedup: timestamps are divided by it.
        block_size: of the replicas, in tokens.
    """

    def __init__(
        self, path: Path, speedup: float = 1.0, part: Part = Part.ALL, block_size: int = BLOCK_SIZE_TOKENS
    ) -> None:
        self.stages = [Stage(speedup, 0.0)]
        self.min_think_s = NEVER_S
        self._lines = half(list(read_lines(path, MooncakeLine)), part)
        self._speedup = speedup
        self._size = block_size

    def initial(self) -> Iterator[Request]:
        blocks_of: dict[int, tuple[BlockKey, ...]] = {}
        size, highest = self._size, _ANSWERS
        per_id = TRACE_BLOCK_TOKENS // size
        start_ms = self._lines[0].timestamp if self._lines else 0.0
        for number, line in enumerate(self._lines):
            prompt: list[BlockKey] = []
            for trace_id in line.hash_ids:
                if trace_id not in blocks_of:
                    first = trace_id * per_id + 1
                    blocks_of[trace_id] = numbered_keys(np.arange(first, first + per_id, dtype=np.uint64))
                prompt += blocks_of[trace_id]
            tokens, output = max(line.input_length, 1), max(line.output_length, 1)
            prompt_keys = tuple(prompt[: tokens // size])
            answers = (tokens + output - 1) // size - len(prompt_keys)
            yield Request(
                number,
                (line.timestamp - start_ms) / 1e3 / self._speedup,
                prompt_keys,
                b"".join(prompt_keys),
                numbered_keys(np.arange(highest, highest + answers, dtype=np.uint64)),
                tokens,
                output,
                line.hash_ids[0] if line.hash_ids else number,
            )
            highest += answers

    def after(self, record: Record) -> Iterable[Request]:
        return ()
