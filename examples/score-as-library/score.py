"""Which pods hold how much of a chat: asked in a scheduler's own process, without a service and without Ray.

    python score.py redis://127.0.0.1:6379 smollm2-135m-instruct "You are a librarian. ..." "What is a shelf?"

Publishers (`kvcache publish`) write to that Redis. The mirror follows it in a thread; a score then asks nobody.
"""

import asyncio
import sys

from serve_app.index.mirror import Mirror
from serve_app.indexer import Indexer, LocalIndex
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.service import PromptService
from serve_app.types import ModelId


async def main(redis_url: str, model: str, system: str, question: str) -> None:
    mirror = Mirror(redis_url, ModelId(model))
    mirror.start()
    if not mirror.wait_ready(10):
        sys.exit(f"the index was not loaded from {redis_url} within 10 s")
    indexer = Indexer(PromptService(PrefixStore(64 << 20)), LocalIndex(mirror))

    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    scored = await indexer.score({"model": model, "messages": messages})  # pods=[...] asks of these only

    print(f"{scored.found.prompt_tokens} prompt tokens, block size {scored.found.block_size}")
    for pod, score in sorted(scored.scores.items(), key=lambda item: -item[1]):
        print(f"{pod}  score {score:g}  matched {scored.found.matched_tokens(pod)}  {scored.found.trust(pod)}")
    mirror.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
