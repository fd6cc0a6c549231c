"""What a chat template tells of itself: its content format and its variables."""

from __future__ import annotations

import pytest

from serve_app.prompts.template import content_format, template_variables


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "string"),
        ("{% for m in messages %}{% for part in m['content'] %}{{ part }}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% for part in m.content %}{{ part }}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% for part in m.content | list %}x{% endfor %}{% endfor %}", "openai"),
        ("{% set l = messages[1:] %}{% for m in l %}{% for p in m['content'] %}x{% endfor %}{% endfor %}", "openai"),
        (
            "{% set l = messages %}{% set k = l %}{% for m in k %}{% for p in m.content %}{% endfor %}{% endfor %}",
            "openai",
        ),
        ("{% macro r(content) %}{% for p in content %}x{% endfor %}{% endmacro %}", "openai"),
        ("{% for m in messages %}{% for call in m.tool_calls %}x{% endfor %}{% endfor %}", "string"),
        ("{% for m in others %}{% for p in m.content %}x{% endfor %}{% endfor %}", "string"),
        ("{% set messages = messages %}{{ messages }}", "string"),
        ("{% set a, b = messages, 1 %}{% set ns.m = messages %}{% for p in content %}x{% endfor %}", "string"),
        ("{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}", "string"),
        ("{% for", "string"),
    ],
)
def test_content_format(source: str, expected: str) -> None:
    assert content_format(source) == expected


def test_variables() -> None:
    source = "{% set own = 1 %}{% for m in messages %}{{ m }}{{ own }}{% endfor %}{% if thinking %}x{% endif %}"
    assert template_variables(source) == {"messages", "thinking"}
