"""What vLLM reads off a chat template's syntax tree before it renders.

In: Jinja source. Out: the content format that the template expects, and the names of its variables. Follows
`_detect_content_format` and `_resolve_chat_template_kwargs` in vLLM 0.29, `renderers/hf.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache

import jinja2.ext
import jinja2.meta
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes

from serve_app.prompts.messages import ContentFormat

logger = logging.getLogger(__name__)


class _Generation(jinja2.ext.Extension):
    """Parses `{% generation %}` blocks, which mark what the assistant wrote; only parsing is needed here."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generation_support"), [], [], body).set_lineno(line)


@lru_cache(maxsize=32)
def _parse(source: str) -> nodes.Template:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    return env.parse(source)


@lru_cache(maxsize=32)
def template_variables(source: str) -> frozenset[str]:
    """Variables that the template reads and does not set itself."""
    return frozenset(jinja2.meta.find_undeclared_variables(_parse(source)))


@lru_cache(maxsize=32)
def content_format(source: str) -> ContentFormat:
    """`openai` when the template loops over the parts of a message's content, else `string`."""
    try:
        root = _parse(source)
        return "openai" if any(_content_loops(root)) else "string"
    except (jinja2.TemplateError, _UnknownTarget):
        logger.warning("content format of the chat template not found, taking 'string'", exc_info=True)
        return "string"


class _UnknownTarget(Exception):
    """An alias or loop variable is not a plain name; vLLM gives up on such a template too."""


def _content_loops(root: nodes.Template) -> Iterator[bool]:
    message_names = list(_message_names(root))
    for loop in root.find_all(nodes.For):
        over_parts = any(_refers(loop.iter, name, "content") for name in message_names)
        if over_parts or (isinstance(loop.iter, nodes.Name) and loop.iter.name == "content"):
            _target_name(loop.target)
            yield True


def _message_names(root: nodes.Template) -> Iterator[str]:
    aliases = _aliases_of_messages(root)
    for loop in root.find_all(nodes.For):
        if any(_refers(loop.iter, alias) for alias in aliases):
            yield _target_name(loop.target)


def _aliases_of_messages(root: nodes.Template) -> list[str]:
    """`messages` and every name that is set from it: `set loop_messages = messages[1:]`."""
    names = ["messages"]
    for name in names:  # grows while it is walked
        for assign in root.find_all(nodes.Assign):
            if _refers(assign.node, name) and (target := _target_name(assign.target)) not in names:
                names.append(target)
    return names


def _target_name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _UnknownTarget(type(target).__name__)
    return target.name


def _refers(node: nodes.Node | None, name: str, key: str | None = None) -> bool:
    """Whether `node` is the variable `name` (or its item `key`), also through filters, tests and slices."""
    while True:
        if isinstance(node, nodes.Filter | nodes.Test) or (
            isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        ):
            node = node.node
        elif key is None:
            return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
        elif isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == key and _refers_plain(node.node, name)
        else:
            return isinstance(node, nodes.Getattr) and node.attr == key and _refers_plain(node.node, name)


def _refers_plain(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
