"""What the index match costs where engines have several KV cache groups, beside plain engines, in one run.

In: nothing but the package. Out: benchmarks/results/hybrid.json, and a summary on the terminal.

The fleet of bench_read_path.py is put into an index for each layout: full attention has what a plain engine would have;
a sliding window has the end of every prompt, as vLLM keeps it by default; Mamba has its last state. All layouts are
asked for the same prompts, in random order. Times are medians; bytes are those of the tables, by blocks really held.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere

from benchmarks.bench_read_path import (  # noqa: E402
    BLOCK_SIZE,
    MODEL,
    PROMPT_BLOCKS,
    Fleet,
    expected_match,
    machine,
    make_fleet,
    median,
    rounded,
    say,
    timed,
)
from serve_app.blocks import KEY_BYTES  # noqa: E402
from serve_app.index.memory import MemoryIndex  # noqa: E402
from serve_app.types import (  # noqa: E402
    GPU,
    Attention,
    CacheLayout,
    Domain,
    DomainId,
    EngineSpec,
    Epoch,
    KVGroup,
    PodId,
    group_tier,
)

PROMPT_TOKENS = PROMPT_BLOCKS * BLOCK_SIZE + 1
_FULL = KVGroup(Attention.FULL, BLOCK_SIZE)
LAYOUTS: Mapping[str, CacheLayout | None] = {
    "plain": None,
    "full + sliding window 1024": CacheLayout((_FULL, KVGroup(Attention.SLIDING_WINDOW, BLOCK_SIZE, 1024)), BLOCK_SIZE),
    "full + sliding window 128": CacheLayout((_FULL, KVGroup(Attention.SLIDING_WINDOW, BLOCK_SIZE, 128)), BLOCK_SIZE),
    "full + mamba": CacheLayout((_FULL, KVGroup(Attention.MAMBA, BLOCK_SIZE)), BLOCK_SIZE),
}


def fill(index: MemoryIndex, fleet: Fleet, replicas: int, layout: CacheLayout | None) -> None:
    spec = EngineSpec(MODEL, BLOCK_SIZE, "none")
    for r in range(replicas):
        index.join(Domain(DomainId(f"d{r}"), Epoch(1), spec, PodId(f"p{r}"), layout=layout))
    for keys, holders in zip(fleet.keys, fleet.holders[replicas], strict=True):
        for r, count in holders:
            held = keys[: count * KEY_BYTES]
            index.add(DomainId(f"d{r}"), Epoch(1), GPU, held)
            for place, group in enumerate(layout.groups if layout is not None else ()):
                if place:
                    window = max(1, -(-(group.window - 1) // BLOCK_SIZE))
                    index.add(DomainId(f"d{r}"), Epoch(1), group_tier(GPU, place), held[-window * KEY_BYTES :])


def bench(fleet: Fleet, replicas: int, repeats: int) -> dict[str, Any]:
    indexes = {name: MemoryIndex() for name in LAYOUTS}
    for name, index in indexes.items():
        fill(index, fleet, replicas, LAYOUTS[name])
    rng = random.Random(3)
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        at = rng.randrange(len(fleet.keys))
        most = max(expected_match(fleet, replicas, at).values())
        for name in rng.sample(list(LAYOUTS), len(LAYOUTS)):
            us, match = timed(partial(indexes[name].match, fleet.keys[at], prompt_tokens=PROMPT_TOKENS))
            times.setdefault(name, []).append(us)
            longest = max(each.total_tokens for each in match.values()) // BLOCK_SIZE
            assert longest == most, f"{name}: {longest} blocks, not {most}"  # who was given the prompt whole has it
    plain = median(times["plain"])
    blocks = {name: sum(index.block_counts().values()) for name, index in indexes.items()}
    return {
        name: {
            "us": rounded(median(us)),
            "to_plain": rounded(median(us) / plain),
            "blocks_to_plain": rounded(blocks[name] / blocks["plain"]),
        }
        for name, us in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the blocks, few repeats: does it run at all?")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/hybrid.json", help="JSON to write")
    args = parser.parse_args()
    fleet = make_fleet(100_000 if args.quick else 1_000_000, (8, 64))
    report: dict[str, Any] = {"machine": machine(), "quick": args.quick, "indexed_blocks": fleet.blocks}
    for replicas in (8, 64):
        say(f"{replicas} replicas")
        report[f"{replicas} replicas"] = bench(fleet, replicas, 50 if args.quick else 1000)
        say(json.dumps(report[f"{replicas} replicas"], indent=2))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    say(f"written: {args.output}")


if __name__ == "__main__":
    main()
