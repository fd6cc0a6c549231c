"""Long load: does anything grow, and does the mirror still say what the engines hold?

In: nothing but the package. Out: benchmarks/results/soak.json; exit status 1 if a claim does not hold.

    simulated engines (vLLM's KVCacheManager and event sender) --ZMQ--> publishers (`python -m serve_app.events`, a
    process each) --> Valkey with a maxmemory --> mirror, in a process of its own
    real vLLM engines, small caches, clients that converse --ZMQ--> `kvcache publish` --> the same Valkey and mirror

Truth: every few seconds one simulated engine pauses. Within a bounded time the mirror must say of all blocks of its
pool that it holds them, and of those that it lately removed that it does not. At the end all engines stop, and the
number of blocks in the mirror must be theirs too. A real engine's clients pause, and it is asked one of the
conversations: it must reuse just as many tokens as the mirror says.

Ctrl-C ends it early, at any time: the result is written all the same and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import redis

from benchmarks.overhead.environment import environment
from benchmarks.soak.children import Children
from benchmarks.soak.real import RealEngine, start_real_engines
from benchmarks.soak.report import Seen, report
from benchmarks.soak.truth import Truth
from benchmarks.soak.verdict import WARM_UP_S
from benchmarks.soak.wire import Asker, EnginesConfig, FollowerConfig, control, events, replay
from serve_app.events.publisher import PublisherConfig
from serve_app.index.keyspace import Keyspace
from serve_app.index.valkey import _binary as valkey_binary
from serve_app.types import ModelId

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelId("smol")  # of all engines, so that one mirror follows 64 pods
BLOCK_SIZE = 32  # tokens; vLLM's CPU attention takes no less
CLEAR_ALL_FROM, CLEAR_ALL_UNTIL = 0.2, 0.3  # of the warm-up: the pools are full, and fill up again
SAMPLE_S, TRUTH_S, SAY_S = 1.0, 2.0, 10.0
START_S = 600.0  # everything imports at once, on a small machine


class Soak:
    """Args: folder: sockets and logs."""

    def __init__(self, args: argparse.Namespace, folder: Path, stop: threading.Event) -> None:
        self._args, self._folder, self._stop = args, folder, stop
        self._children = Children(folder)
        self._url = f"unix://{folder}/valkey.sock"
        self._pods = [f"sim-{i}" for i in range(args.publishers)]
        self._askers: dict[str, Asker] = {}
        self._real: list[RealEngine] = []
        self._seen = Seen()
        self._failure = ""
        self._state: dict[str, Any] = {}

    # -- start ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        args, children = self._args, self._children
        engine_of: dict[str, Asker] = {}
        server = [str(valkey_binary()), "--port", "0", "--unixsocket", f"{self._folder}/valkey.sock", "--save", ""]
        children.start("valkey", "valkey", [*server, "--maxmemory", f"{args.maxmemory_mb}mb"])
        self._redis: Any = redis.Redis.from_url(self._url)
        self._wait(self._pings, "Valkey")
        children.python(
            "follower", "mirror", "benchmarks.soak.follower", FollowerConfig(str(self._folder), self._url, MODEL)
        )
        self._askers["follower"] = Asker(control(self._folder, "follower"))
        self._real = start_real_engines(args.engines, children, self._url, MODEL, BLOCK_SIZE)
        warm_up_s = min(WARM_UP_S, args.minutes * 60 / 2)
        for i in range(args.engine_processes):
            name, pods = f"engines-{i}", self._pods[i :: args.engine_processes]
            config = EnginesConfig(
                name,
                str(self._folder),
                MODEL,
                BLOCK_SIZE,
                args.blocks // args.publishers,
                pods,
                args.rate * len(pods) / args.publishers,
                args.clear_every,
                (CLEAR_ALL_FROM * warm_up_s, CLEAR_ALL_UNTIL * warm_up_s),
            )
            children.python(name, "simulated engines", "benchmarks.soak.engines", config)
            self._askers[name] = Asker(control(self._folder, name))
            engine_of |= dict.fromkeys(pods, self._askers[name])
        for pod in self._pods:
            publisher = PublisherConfig(
                self._url,
                MODEL,
                pod,
                events(self._folder, pod),
                replay(self._folder, pod),
                block_size=BLOCK_SIZE,
                capacity=args.blocks // args.publishers + 1,
            )
            children.python(f"publisher-{pod}", "publisher", "serve_app.events", publisher)
        self._wait(lambda: all(engine.is_up() for engine in self._real), "vLLM")
        for engine in self._real:
            engine.step_back(children)
        self._truth = Truth(control(self._folder, "follower"), engine_of, self._real)
        expected = {*self._pods, *(engine.pod for engine in self._real)}
        self._wait(lambda: self._ask_state()["pods"] and set(self._state["pods"]) == expected, "all publishers")

    def _wait(self, check: Any, what: str) -> None:
        deadline_s = time.monotonic() + START_S
        while not check():
            self._children.sample(0.0)
            if self._children.died:
                raise RuntimeError(f"{self._children.died} ended at the start: see {self._folder}")
            if self._stop.wait(1.0):
                raise KeyboardInterrupt
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{what}: not there after {START_S:.0f} s")

    def _pings(self) -> bool:
        try:
            return bool(self._redis.ping())
        except redis.RedisError:
            return False

    # -- run ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        children = self._children
        for samples in children.samples.values():  # what was looked at while it started
            samples.rss_mb.clear()
            samples.fds.clear()
        simulated = [self._askers[name] for name in self._askers if name != "follower"]
        cpu_before = children.cpu_s()
        started = time.monotonic()
        counts: list[dict[str, int]] = []
        left = None
        try:
            self._sample(0.0)
            for asker in simulated:
                asker.ask(what="run")
            for engine in self._real:
                engine.start_clients()
            self._truth.start()
            self._watch(started)
        except (TimeoutError, redis.RedisError) as error:
            self._failure = str(error)
        lasted_s = time.monotonic() - started
        cpu = {kind: (s - cpu_before.get(kind, 0)) / lasted_s for kind, s in children.cpu_s().items()}
        for engine in self._real:
            engine.stop_clients()
        if not self._failure and not children.died:
            counts = [asker.ask(what="stop") for asker in simulated]
        self._truth.stop()
        if counts:
            left = self._truth.compare_all()
        load = {
            "publishers": self._args.publishers,
            "real_engines": self._args.engines,
            "events_per_s_asked": self._args.rate,
            "blocks_of_all_pools": self._args.blocks,
            "requests_of_real_engines": sum(engine.served for engine in self._real),
            "cores_used": {kind: round(value, 3) for kind, value in cpu.items()},
        }
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["-m benchmarks.soak", *sys.argv[1:]]),
            "duration_s": round(lasted_s, 1),
            "stopped_early": self._stop.is_set(),
            "failure": self._failure,
            "environment": environment(ROOT),
            **report(
                seen=self._seen,
                children=children,
                truth=self._truth,
                lasted_s=lasted_s,
                load=load,
                counts=counts,
                left=left,
                failure=self._failure,
                maxmemory_mb=self._args.maxmemory_mb,
            ),
        }

    def _watch(self, started_s: float) -> None:
        sample_at = truth_at = say_at = 0.0
        said = (0.0, 0)
        while (now := time.monotonic() - started_s) < self._args.minutes * 60 and not self._stop.is_set():
            if self._children.died:
                break
            if now >= sample_at:
                sample_at = now + SAMPLE_S
                self._children.sample(now)
                self._sample(now)
            if now >= truth_at:
                truth_at = now + TRUTH_S
                self._truth.compare_one()
            if now >= say_at:
                say_at = now + SAY_S
                events_now = self._state["publishers"]["events_applied"]
                self._say(now, (events_now - said[1]) / max(1e-9, now - said[0]))
                said = (now, events_now)
            self._stop.wait(0.1)

    def _ask_state(self) -> dict[str, Any]:
        self._state = self._askers["follower"].ask(what="state")
        return self._state

    def _sample(self, now_s: float) -> None:
        state = self._ask_state()
        self._seen.delays_ms += state["delays_ms"]
        self._seen.state = state
        self._seen.lags_ms.append(state["lag_s"] * 1e3)
        info = self._redis.info()
        self._seen.redis.append(
            {
                "at_s": round(now_s, 1),
                "used_mb": info["used_memory"] / 1e6,
                "rss_mb": info["used_memory_rss"] / 1e6,
                "log": self._redis.xlen(Keyspace(MODEL).log),
                "evicted_keys": info["evicted_keys"],
                "clients": info["connected_clients"],
                "blocks": state["blocks"],
                "events": state["publishers"]["events_applied"],
            }
        )

    def _say(self, now_s: float, rate: float) -> None:
        redis_now, state = self._seen.redis[-1], self._state
        recent = self._seen.delays_ms[-100:]
        print(
            f"{now_s / 60:5.1f} min  {rate:6.0f} events/s  {state['blocks']:8d} blocks  "
            f"delay {statistics.median(recent) if recent else 0:.1f} ms  lag {self._seen.lags_ms[-1]:.0f} ms  "
            f"truth {self._truth.summary}  redis {redis_now['used_mb']:.0f} MB, log {redis_now['log']:.0f}  skipped "
            f"{sum(state['publishers']['skipped'].values())}  MB: "
            + ", ".join(f"{kind} {mb:.1f}" for kind, mb in self._children.rss_mb().items()),
            flush=True,
        )

    def close(self) -> None:
        for engine in self._real:
            engine.stop_clients()
        for asker in self._askers.values():
            asker.close()
        self._children.stop()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long, after everything has started")
    parser.add_argument("--publishers", type=int, default=62, help="simulated engines, each with a publisher process")
    parser.add_argument("--engines", type=int, default=2, help="real vLLM engines")
    parser.add_argument("--rate", type=float, default=6000.0, help="KV events a second of all simulated engines")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks of all simulated pools together")
    parser.add_argument("--maxmemory-mb", type=int, default=256, help="of Valkey, which evicts nothing")
    parser.add_argument("--engine-processes", type=int, default=2, help="that the simulated engines are spread over")
    parser.add_argument("--clear-every", type=float, default=300.0, help="seconds until one pool in each is cleared")
    parser.add_argument("--quick", action="store_true", help="3 minutes, 8 publishers, no real engine, no slopes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/soak.json", help="JSON to write")
    args = parser.parse_args()
    if args.quick:
        args.minutes, args.publishers, args.engines = 3.0, 8, 0
        args.rate, args.blocks, args.clear_every = 1000.0, 40_000, 30.0
    return args


def main() -> int:
    args = parse()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"logs: {folder}", flush=True)
    soak = Soak(args, folder, stop)
    result = None
    try:
        soak.start()
        result = soak.run()
    except KeyboardInterrupt:
        print("stopped while it started: nothing was measured")
    finally:
        soak.close()
    if result is None:
        return 1
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    shown = {name: value for name, value in result.items() if name not in {"processes", "redis_by_minute"}}
    print(json.dumps(shown, indent=2))
    print(f"written: {args.output}")
    if result["holds"]:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
