"""NVIDIA Dynamo's standalone KV indexer (`dynamo.indexer` of ai-dynamo-runtime): what its users ask instead of us.

It takes vLLM's KV events over ZMQ and answers POST /query {model_name, token_ids} with the tokens that each instance
holds. It neither renders nor tokenizes, so it is compared with questions of token ids.
"""

from __future__ import annotations

import contextlib
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks.processes import answers, process, until
from benchmarks.score.fleet import BLOCK_SIZE, MODEL, Fleet
from serve_app.ports import free_ports

PACKAGE: Final = "ai-dynamo-runtime"
SUBSCRIBED_S: Final = 1.0  # ZMQ does not say when a subscriber is there
START_S: Final = 30.0
EVENT_BLOCKS: Final = 500


def installed() -> str:
    """Its version; empty: it is not here."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return ""


@contextlib.contextmanager
def dynamo_indexer(fleet: Fleet, folder: Path, expected: Mapping[str, Mapping[str, int]]) -> Iterator[int]:
    """The port of an indexer that has heard of all that the fleet's pods hold.

    Args:
        expected: matched tokens by pod, of each prompt. It must say the same.
    """
    from vllm.distributed.kv_events import ZmqEventPublisher

    port, *event_ports = free_ports(1 + len(fleet.held))
    url, ids = f"http://127.0.0.1:{port}", fleet.token_ids()
    command = [sys.executable, "-m", "dynamo.indexer", "--port", str(port)]
    publishers = [ZmqEventPublisher(0, endpoint=f"tcp://*:{event_port}") for event_port in event_ports]
    try:
        with process(command, folder / "dynamo.log"), httpx.Client(base_url=url, timeout=30) as client:
            until(lambda: answers(f"{url}/health"), "Dynamo's indexer", START_S)
            for i, event_port in enumerate(event_ports):
                instance = {"instance_id": i, "endpoint": f"tcp://127.0.0.1:{event_port}"}
                client.post("/register", json={**instance, "model_name": MODEL, "block_size": BLOCK_SIZE})
            time.sleep(SUBSCRIBED_S)
            for publisher, held in zip(publishers, fleet.held.values(), strict=True):
                _publish(publisher, fleet, held)
            for name, of_pods in expected.items():
                of_instances = {str(i): of_pods[pod] for i, pod in enumerate(fleet.held) if of_pods[pod]}
                until(partial(_says, client, ids[name], of_instances), "the events of its engines", START_S)
            yield port
    finally:
        for publisher in publishers:
            publisher.shutdown()


def asked(token_ids: list[int]) -> dict[str, Any]:
    return {"model_name": MODEL, "token_ids": token_ids}


def _says(client: httpx.Client, token_ids: list[int], expected: Mapping[str, int]) -> bool:
    """Whether it answers with so many tokens by instance; each has one rank."""
    scores: dict[str, dict[str, int]] = client.post("/query", json=asked(token_ids)).json()["scores"]
    return {instance: ranks["0"] for instance, ranks in scores.items() if ranks["0"]} == expected


def _publish(publisher: Any, fleet: Fleet, held: Mapping[str, int]) -> None:
    """The events of a pod that has computed so many blocks of each prompt. What two of them share is stored once."""
    from vllm.distributed.kv_events import BlockStored, KVEventBatch

    known: set[int] = set()
    for name, blocks in held.items():
        encoded = fleet.encoded(fleet.bodies[name])
        hashes, tokens = array("Q", encoded.block_keys).tolist()[:blocks], encoded.token_ids()
        first = next((i for i, one in enumerate(hashes) if one not in known), blocks)
        for start in range(first, blocks, EVENT_BLOCKS):
            end = min(start + EVENT_BLOCKS, blocks)
            parent = hashes[start - 1] if start else None
            ids = tokens[start * BLOCK_SIZE : end * BLOCK_SIZE]
            stored = BlockStored(hashes[start:end], parent, ids, BLOCK_SIZE, None, "GPU", None)
            publisher.publish(KVEventBatch(time.time(), [stored], data_parallel_rank=0))
        known.update(hashes)
