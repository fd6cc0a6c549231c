"""Fetch the public traces that the fleet simulator replays, in the form in which it reads them.

In: a network. Out: three files in ../shared/traces beside the repository, or in the folder that is named; about 1.3 MB
from some hundred MB of downloads. What is there already is left alone. Origins, both Apache-2.0:

- kvcache-ai/Mooncake, FAST25-release/traces: lines as they are;
- callanjfox/kv-cache-tester, traces: 160 of its sessions, one line each. Block ids are numbered anew, by first use.

    python scripts/download_traces.py [FOLDER]
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the script runs from anywhere

from benchmarks.fleet.traces import AGENTS_FILE, CONVERSATION_FILE, SYNTHETIC_FILE, TRACES

MOONCAKE = "https://github.com/kvcache-ai/Mooncake/raw/3b5a594/FAST25-release/traces"
KV_CACHE_TESTER = "https://github.com/callanjfox/kv-cache-tester/raw/94f6046/traces"
TIMEOUT_S = 60

SESSIONS = """
0054 0730 0568 0015 0541 0111 0477 0661 0436 0280 0678 0376 0645 0009 0627 0721 0007 0314 0675 0226 0386 0236 0603
0445 0632 0728 0276 0564 0459 0254 0176 0053 0051 0170 0727 0132 0670 0581 0137 0388 0188 0457 0430 0432 0206 0251
0461 0639 0636 0628 0411 0720 0091 0446 0471 0221 0731 0202 0736 0027 0325 0216 0022 0135 0303 0709 0523 0695 0154
0019 0359 0218 0316 0310 0331 0712 0614 0037 0085 0649 0123 0130 0551 0243 0256 0529 0090 0228 0334 0290 0715 0531
0536 0209 0070 0036 0616 0528 0042 0469 0055 0490 0108 0409 0698 0041 0066 0159 0539 0121 0102 0277 0708 0410 0567
0659 0287 0063 0098 0602 0351 0491 0116 0576 0046 0637 0329 0305 0512 0590 0738 0099 0313 0208 0631 0146 0343 0072
0660 0346 0014 0231 0250 0617 0213 0190 0633 0010 0725 0696 0330 0138 0079 0338 0077 0538 0352 0322 0583 0273
"""

# Of the unpacked files that the figures in docs/benchmarks.md are from.
SHA256 = {
    AGENTS_FILE: "950a622658cf4d2fab73dd02d4f75c613eca5661355f0c8fc7bb4b2075fda928",
    CONVERSATION_FILE: "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
    SYNTHETIC_FILE: "bd070915a98fc0ed264d7cfef2ce746002eb3076a695ec31ba2674c0111ec131",
}


def fetch(url: str) -> bytes:
    answer = httpx.get(url, timeout=TIMEOUT_S, follow_redirects=True)
    return answer.raise_for_status().content


def agent_session(name: str, raw: dict[str, Any]) -> dict[str, Any]:
    """One of kv-cache-tester's files -> a line of ours."""
    numbers, fresh = dict[int, int](), count(1)

    def request(each: dict[str, Any]) -> dict[str, Any]:
        ids = [
            numbers[block] if block in numbers else numbers.setdefault(block, next(fresh)) for block in each["hash_ids"]
        ]
        return {
            "t": each["t"],
            "think_s": each.get("think_time", 0.0),
            "in": each["in"],
            "out": each["out"],
            "ids": runs(ids[: each["in"] // raw["block_size"]]),
        }

    main = [request(each) for each in raw["requests"] if each["type"] != "subagent"]
    return {
        "session": name,
        "block_tokens": raw["block_size"],
        "system_tokens": raw["system_tokens"],
        "tool_tokens": raw["tool_tokens"],
        "requests": main,
        "subagents": [
            {"t": agent["t"], "requests": [request(each) for each in agent["requests"]]}
            for agent in raw["requests"]
            if agent["type"] == "subagent"
        ],
    }


def runs(ids: list[int]) -> list[list[int]]:
    """1 2 3 7 8 -> [1, 3] [7, 2]"""
    found: list[list[int]] = []
    for block in ids:
        if found and block == sum(found[-1]):
            found[-1][1] += 1
        else:
            found.append([block, 1])
    return found


def agent_lines() -> Iterator[bytes]:
    for number in SESSIONS.split():
        name = f"trace_{number}"
        raw = json.loads(fetch(f"{KV_CACHE_TESTER}/{name}.json"))
        yield json.dumps(agent_session(name, raw), separators=(",", ":")).encode() + b"\n"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else TRACES
    makers: dict[str, Callable[[], bytes]] = {
        CONVERSATION_FILE: lambda: fetch(f"{MOONCAKE}/conversation_trace.jsonl"),
        SYNTHETIC_FILE: lambda: fetch(f"{MOONCAKE}/synthetic_trace.jsonl"),
        AGENTS_FILE: lambda: b"".join(agent_lines()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in makers.items():
        path = folder / name
        if path.exists():
            print(f"{path} is there already")
            continue
        try:
            data = make()
        except httpx.HTTPError as error:
            sys.exit(f"{name} could not be fetched ({error}); try again where there is a network")
        unfinished = path.with_suffix(".tmp")
        unfinished.write_bytes(gzip.compress(data))
        unfinished.rename(path)
        same = hashlib.sha256(data).hexdigest() == SHA256[name]
        print(f"{path} written" + ("" if same else "; it is not the file that docs/benchmarks.md was made with"))


if __name__ == "__main__":
    main()
