"""What somebody writes who has the score library and no Ray: publish a pod's blocks, score a request, print it.

Arguments: URL of a Valkey, folder of a tokenizer.
"""

import asyncio
import json
import sys

from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.indexer import Indexer, LocalIndex
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.service import PromptService
from serve_app.types import GPU, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId

MODEL = ModelId("m")
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "the quick brown fox jumps over the lazy dog"}]}


async def main(url: str, tokenizer: str) -> None:
    prompts = PromptService(PrefixStore(1 << 20))
    pod = Domain(DomainId("a"), Epoch(1), EngineSpec(MODEL, 4, tokenizer), PodId("a"))
    (prompt,) = await prompts.encode(BODY, pod.spec)

    writer = RedisWriter(url, MODEL)
    writer.join(pod)
    writer.add(pod.id, pod.epoch, GPU, prompt.keys)
    writer.flush()
    writer.heartbeat(pod.id, HeartbeatRecord(pod.epoch))

    mirror = Mirror(url, MODEL)
    mirror.start()
    assert mirror.wait_ready(30)
    scored = await Indexer(prompts, LocalIndex(mirror)).score(BODY)
    mirror.close()
    writer.close()
    print(json.dumps({"tokens": prompt.token_count, "scores": scored.scores}))


asyncio.run(main(*sys.argv[1:]))
