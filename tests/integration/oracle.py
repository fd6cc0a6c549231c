"""What vLLM makes of a request: its own protocol classes, converters and renderer, on CPU and without an engine.

In: a model folder, a body. Out: token ids, by the code that serves the endpoint. Takes some seconds to import.
"""

from __future__ import annotations

import asyncio
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.utils import construct_input_messages, construct_tool_dicts
from vllm.renderers import renderer_from_config
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.renderers.online_renderer import OnlineRenderer


class Refused(Exception):
    """vLLM answers with an error."""


class Oracle:
    def __init__(
        self,
        model: str,
        template: str | None = None,
        *,
        content_format: Any = "auto",
        excludes_tools: bool = False,
        max_model_len: int = 8192,
    ) -> None:
        config: VllmConfig = EngineArgs(model=model, max_model_len=max_model_len).create_engine_config()
        self._config = config.model_config
        self._template = template
        self._format = content_format
        self._renderer = OnlineRenderer(
            config.model_config,
            renderer_from_config(config),
            request_logger=None,
            chat_template=template,
            chat_template_content_format=content_format,
            enable_auto_tools=True,
            tool_parser="hermes",
            exclude_tools_when_tool_choice_none=excludes_tools,
        )
        self._merges = AnthropicServingMessages._detect_merge_inline_system(template)

    def chat(self, body: dict[str, Any]) -> list[int]:
        return self._run(lambda: self._chat(ChatCompletionRequest.model_validate(body)))

    def messages(self, body: dict[str, Any]) -> list[int]:
        def render() -> Any:
            request = AnthropicMessagesRequest.model_validate(body)
            return self._chat(
                AnthropicServingMessages.to_chat_completion_request(request, merge_inline_system=self._merges)
            )

        return self._run(render)

    def responses(self, body: dict[str, Any]) -> list[int]:
        return self._run(lambda: self._responses(ResponsesRequest.model_validate(body)))

    async def _chat(self, request: ChatCompletionRequest) -> Any:
        return await self._renderer.render_chat(request)

    async def _responses(self, request: ResponsesRequest) -> Any:
        """As `OpenAIServingResponses._make_request`."""
        tools = construct_tool_dicts(
            request.tools, request.tool_choice, self._renderer.exclude_tools_when_tool_choice_none
        )
        messages = construct_input_messages(request_instructions=request.instructions, request_input=request.input)
        kwargs = request.build_chat_params(self._template, self._format).chat_template_kwargs
        return await self._renderer.preprocess_chat(
            request, messages, self._template, self._format, kwargs, tool_dicts=tools, parser=None
        )

    def _run(self, render: Any) -> list[int]:
        try:
            result = asyncio.run(render())
        except Exception as error:  # each kind has its own status, none has a prompt
            raise Refused(str(error)) from error
        if not isinstance(result, tuple):
            raise Refused(result.error.message)
        ids = extract_prompt_components(self._config, result[1][0]).token_ids
        assert ids is not None
        return list(ids)
