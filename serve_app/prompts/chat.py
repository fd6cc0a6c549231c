"""ChatPrompt -> the text that vLLM would render.

In: a conversation. Out: prompt text. Follows vLLM 0.29: `OnlineRenderer.preprocess_chat` (which variables reach the
template), `renderers/hf.py` `safe_apply_chat_template`. The template itself is run by transformers, as vLLM does it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from serve_app.errors import ConfigError, PromptError
from serve_app.prompts.hf import load_tokenizer, own_renderer, processor_template, source_of
from serve_app.prompts.messages import ContentFormat, developer_to_system, to_conversation
from serve_app.prompts.request import ChatPrompt
from serve_app.prompts.resumable import Mark, Rendering, ResumableTemplate
from serve_app.prompts.template import content_format as detect_content_format
from serve_app.prompts.template import template_variables
from serve_app.prompts.watched import Unwatched
from serve_app.types import TokenizerSource

logger = logging.getLogger(__name__)

# Of apply_chat_template's own parameters, those that `ChatRenderer.resume` knows how to do without it.
_PLAIN_PARAMETERS = frozenset({"add_generation_prompt", "continue_final_message", "return_dict"})


class ChatRenderer:
    """Renders conversations of one model. Safe to call from several threads."""

    def __init__(
        self,
        tokenizer_source: str | TokenizerSource,
        chat_template: str | None = None,
        content_format: str = "auto",
        default_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            tokenizer_source: path or Hugging Face id.
            chat_template: Jinja source that overrides the tokenizer's own.
            content_format: vLLM's `--chat-template-content-format`: auto, string or openai.
            default_kwargs: vLLM's `--default-chat-template-kwargs`.
        """
        if content_format not in ("auto", "string", "openai"):
            raise ConfigError(f"content_format is {content_format!r}; write auto, string or openai")
        source = source_of(tokenizer_source)
        self._tokenizer = load_tokenizer(source)
        self._chat_template = chat_template
        self._content_format = content_format
        self._default_kwargs = dict(default_kwargs or {})
        self._own_renderer = own_renderer(source)
        self._whole_only: set[str] = set()  # templates that turned out not to be resumable
        self._compared: set[str] = set()  # templates of which transformers has rendered one conversation too
        self._special_tokens = dict(self._tokenizer.special_tokens_map)
        self._processor_template: str | None = None
        self._processor_error: str | None = None
        if chat_template is None:
            try:
                self._processor_template = processor_template(source)
            except PromptError as error:  # of requests without tools only
                self._processor_error = str(error)

    def render(self, prompt: ChatPrompt, media_as: str | None = None) -> str:
        """The prompt's text, with the template's placeholders for images and the like, not yet expanded.

        Args:
            prompt: the conversation.
            media_as: text to have in place of each image, audio or video, instead of the template's placeholder.

        Raises:
            PromptError: the template is the request's own, or fails, or the engine alone knows where media go.
        """
        if self._own_renderer is not None:
            raise PromptError("unsupported_model", f"vLLM renders {self._own_renderer} without a chat template")
        if prompt.chat_template is not None or prompt.chat_template_kwargs.get("chat_template") is not None:
            raise PromptError("untrusted_template", "the request brings its own chat template")
        kwargs = self._template_kwargs(prompt)
        tools = kwargs.pop("tools", None)
        template = self.template(tools)
        conversation = to_conversation(prompt.messages, self._format(template), media_as, prompt.ordered)
        if any(m["role"] == "developer" for m in conversation) and not _knows_developer(template):
            conversation = developer_to_system(conversation)
        try:
            accepted = _accepted_parameters() | template_variables(template)
            kwargs = {k: v for k, v in kwargs.items() if k in accepted}
            _flatten_globals(template)
            text = self._tokenizer.apply_chat_template(
                conversation=conversation, tools=tools, chat_template=template, tokenize=False, **kwargs
            )
        except Exception as error:  # a template is a program: whatever it raises, this request has no prompt
            raise PromptError("template_error", f"chat template: {error}") from error
        assert isinstance(text, str)
        return text

    def resume(self, prompt: ChatPrompt, known: Mark | None = None) -> Rendering | None:
        """The same text as `render` makes of it, from a mark on, at a cost in proportion to what is behind it.

        Args:
            prompt: without media.
            known: a mark of a rendering of the same request but for its last messages.

        Returns:
            None: nothing is proven of this template or request, or it fails. `render` does it, or says why not.
        """
        if self._own_renderer is not None or prompt.chat_template is not None:
            return None
        kwargs = self._template_kwargs(prompt)
        tools = kwargs.pop("tools", None)
        if tools is not prompt.tools or prompt.documents is not None or prompt.continue_final_message:
            return None
        try:
            template = self.template(tools)
        except PromptError:
            return None
        program = None if template in self._whole_only else _resumable(template)
        names = kwargs.keys() & (_accepted_parameters() | template_variables(template))
        if program is None or not names.isdisjoint((_accepted_parameters() | program.reserved) - _PLAIN_PARAMETERS):
            return None
        messages = _Messages(prompt, known.count if known else 0, self._format(template))
        if not _knows_developer(template) and any(m["role"] == "developer" for m in messages.new):
            return None
        variables = self._special_tokens | {name: kwargs[name] for name in names & template_variables(template)}
        variables |= {"tools": tools, "documents": None, "add_generation_prompt": kwargs["add_generation_prompt"]}
        try:
            rendering = program.render(variables, messages, len(prompt.messages), known)
        except Exception as error:  # a template is a program
            self._leave_whole(template, prompt, error)
            return None
        return rendering if rendering.resumed or self._is_the_same(template, prompt, rendering) else None

    def _is_the_same(self, template: str, prompt: ChatPrompt, rendering: Rendering) -> bool:
        """Whether transformers renders it alike: asked once of each template, for it may be another version of it."""
        if template not in self._compared:
            self._compared.add(template)
            if self.render(prompt) != rendering.text:
                self._whole_only.add(template)
                logger.warning("kvcache: this transformers renders otherwise; long conversations are rendered whole")
        return template not in self._whole_only

    def _leave_whole(self, template: str, prompt: ChatPrompt, error: Exception) -> None:
        """What only the watched rendering cannot do costs every request twice: do it no more."""
        try:
            self.render(prompt)
        except PromptError:
            return
        self._whole_only.add(template)
        logger.info("kvcache: the chat template is rendered whole for every turn: %s", error)

    def _template_kwargs(self, prompt: ChatPrompt) -> dict[str, Any]:
        """What the template gets, later ones win: tools, the server's defaults, the request's kwargs, its fields."""
        kwargs: dict[str, Any] = {"tools": prompt.tools} if prompt.tools is not None else {}
        kwargs = self._default_kwargs | kwargs | _set(prompt.chat_template_kwargs)
        kwargs |= {
            "add_generation_prompt": prompt.add_generation_prompt,
            "continue_final_message": prompt.continue_final_message,
        }
        if prompt.documents is not None:
            kwargs["documents"] = prompt.documents
        kwargs["return_dict"] = False
        kwargs.pop("tokenize", None)  # see `_add_special_tokens` in request.py
        return kwargs

    def template(self, tools: Any) -> str:
        """Jinja source for a request with these tools.

        Raises:
            PromptError: the model has none.
        """
        if tools is None and self._processor_error is not None:
            raise PromptError("no_processor", self._processor_error)
        if tools is None and self._processor_template is not None:
            return self._processor_template
        try:
            return str(self._tokenizer.get_chat_template(self._chat_template, tools=tools))
        except ValueError as error:
            raise PromptError("no_template", str(error)) from error

    def _format(self, template: str) -> ContentFormat:
        if self._content_format == "auto":
            return detect_content_format(template)
        return "openai" if self._content_format == "openai" else "string"


class _Messages:
    """A request's messages as the template gets them, those before `known` only when it asks for them."""

    def __init__(self, prompt: ChatPrompt, known: int, content_format: ContentFormat) -> None:
        self._raw = prompt.messages
        self._known = known
        self._format: ContentFormat = content_format
        self._ordered = prompt.ordered
        self.new = self._converted(prompt.messages[known:])
        self._old: dict[int, Any] = {}

    def __call__(self, number: int) -> Any:
        if number >= self._known:
            return self.new[number - self._known]
        if number not in self._old:
            (self._old[number],) = self._converted(self._raw[number : number + 1])
        return self._old[number]

    def _converted(self, messages: Sequence[Mapping[str, Any]]) -> list[Any]:
        """What `render` does to them, and transformers behind it: nulls dropped, reasoning under all of its names."""
        from transformers.utils.chat_template_utils import _alias_reasoning_fields

        conversation = to_conversation(messages, self._format, None, self._ordered)
        return list(_alias_reasoning_fields([{k: v for k, v in m.items() if v is not None} for m in conversation]))


def _set(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Without the values that vLLM takes for "not given" (`merge_kwargs`)."""
    return {k: v for k, v in kwargs.items() if v is not None and v != "auto"}


def _knows_developer(template: str) -> bool:
    return '"developer"' in template or "'developer'" in template


@lru_cache(maxsize=32)
def _flatten_globals(template: str) -> None:
    """Jinja copies a template's globals for every rendering, and they are in a ChainMap, whose copy takes 50 us.

    The compiled template is the one that transformers keeps; a plain dict of the same names takes its globals' place.
    """
    compiled = _compiled(template)
    compiled.globals = dict(compiled.globals)


def _compiled(template: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


@lru_cache(maxsize=32)
def _resumable(template: str) -> ResumableTemplate | None:
    """None: nothing can be proven of it."""
    try:
        from transformers.utils.chat_template_utils import _alias_reasoning_fields  # noqa: F401  not in every 5.x

        return ResumableTemplate(_compiled(template).environment, template)
    except (ImportError, Unwatched, TemplateError) as error:
        logger.info("kvcache: the chat template is rendered whole for every turn: %s", error)
        return None


@lru_cache(maxsize=1)
def _accepted_parameters() -> frozenset[str]:
    """Names that apply_chat_template takes itself, in transformers' base class.

    vLLM's pool of tokenizers hides the parameters that a subclass adds.
    """
    from transformers import PythonBackend  # takes 3 s to import

    parameters = inspect.signature(PythonBackend.apply_chat_template).parameters.values()
    names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return frozenset(names - {"self", "chat_template", "tokenize"})
