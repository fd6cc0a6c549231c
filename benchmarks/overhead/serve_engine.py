"""The simulated engine inside a Ray Serve LLM replica: the project's VLLMReplica is used as it is shipped.

Ray Serve LLM takes another engine class from the environment (`RAYLLM_VLLM_ENGINE_CLS`). In: requests, over HTTP with
direct streaming, through Serve handles without. Out: the same answers as `engine_server.py`. For the direct-call
baseline the engine also listens on a port of its own, with the same app on plain uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import serve
from ray.llm._internal.serve.core.engine.protocol import LLMEngine
from ray.serve.llm import LLMConfig
from ray.serve.llm.openai_api_models import ChatCompletionResponse, CompletionResponse

from benchmarks.overhead.engine_app import Answers, Core, build_app, core_config
from benchmarks.overhead.engine_server import serve_app, write_port

FOLDER_VARIABLE = "KVCACHE_OVERHEAD_FOLDER"


class SimulatedEngine(LLMEngine):
    """What VLLMReplica and Ray Serve LLM need of an engine, and nothing else."""

    def __init__(self, llm_config: LLMConfig) -> None:
        self._llm_config = llm_config
        self._folder = Path(os.environ[FOLDER_VARIABLE])
        self._name = serve.get_replica_context().replica_id.unique_id
        self._answers = Answers(llm_config.model_id, self._name)
        self._chat = ChatCompletionResponse.model_validate(self._answers.chat)
        self._text = CompletionResponse.model_validate(self._answers.text)
        self._block_size = int(llm_config.engine_kwargs["block_size"])
        engine_config: Any = llm_config.get_engine_config()
        self._model_path: str = engine_config.actual_hf_model_id
        # What VLLMReplica reads of vLLM's AsyncLLM: for the publisher's settings, the load, what was served.
        self._engine_client = SimpleNamespace(
            vllm_config=SimpleNamespace(
                cache_config=SimpleNamespace(
                    block_size=self._block_size, num_gpu_blocks=0, prefix_caching_hash_algo="sha256"
                ),
                model_config=SimpleNamespace(
                    tokenizer=self._model_path,
                    model=self._model_path,
                    runner_type="generate",
                    revision=None,
                    tokenizer_revision=None,
                    tokenizer_mode="auto",
                ),
                parallel_config=SimpleNamespace(data_parallel_size_local=1),
                kv_transfer_config=None,
            ),
            renderer=SimpleNamespace(tokenizer=None),
            output_processor=SimpleNamespace(get_num_unfinished_requests=lambda: 0, request_states={}),
            logger_manager=None,  # as with `disable_log_stats`
        )

    async def start(self) -> None:
        self._llm_config.apply_checkpoint_info(self._model_path)
        sockets = self._llm_config.engine_kwargs["kv_events_config"]
        self._core = Core(
            core_config(
                self._folder,
                self._name,
                self._model_path,
                self._llm_config.model_id,
                self._block_size,
                sockets["endpoint"],
                sockets["replay_endpoint"],
            )
        )
        server, listener, port = serve_app(await self.build_asgi_app())
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]  # the process is Serve's
        self._baseline = asyncio.create_task(server.serve(sockets=[listener]))
        write_port(self._folder, self._name, port)

    async def build_asgi_app(self) -> Any:
        return await build_app(self._model_path, self._llm_config.model_id, self._answers, self._core)

    async def chat(  # type: ignore[override]  # the base class means a generator
        self, request: Any, raw_request_info: Any = None
    ) -> AsyncGenerator[Any, None]:
        for answer in self._answers.chat_events if request.stream else [self._chat]:
            yield answer
        self._learn(request, "messages")

    async def completions(  # type: ignore[override]  # the base class means a generator
        self, request: Any, raw_request_info: Any = None
    ) -> AsyncGenerator[Any, None]:
        for answer in self._answers.text_events if request.stream else [self._text]:
            yield answer
        self._learn(request, "prompt")

    def _learn(self, request: Any, field: str) -> None:
        self._core.send(request.model_dump_json(include={field}, exclude_unset=True).encode())

    def routing_stats(self) -> dict[str, Any]:
        return {}

    async def check_health(self) -> None:
        pass

    async def shutdown(self) -> None:
        self._core.close()

    async def reset_prefix_cache(self) -> None:
        raise NotImplementedError

    async def resolve_lora(self, lora_model: Any) -> None:
        raise NotImplementedError

    async def embeddings(self, request: Any, raw_request_info: Any = None) -> Any:
        raise NotImplementedError

    async def transcriptions(self, request: Any, raw_request_info: Any = None) -> Any:
        raise NotImplementedError
