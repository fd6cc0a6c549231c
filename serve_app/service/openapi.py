"""The OpenAPI document of the HTTP service, made of its types."""

from __future__ import annotations

from typing import Any

import msgspec

from serve_app.service import answers, questions, views

_PROMPT = "Beside these: the body of an OpenAI request (chat, completions, responses, messages) as the engine takes it."
_CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}]}
_EXAMPLES = {
    "/v1/score": {**_CHAT, "pods": ["a", "b"]},
    "/v1/score/batch": {"requests": [_CHAT, {"model": "smollm2", "prompt": [1, 2, 3]}]},
    "/v1/choose": {**_CHAT, "session": "user-1"},
    "/v1/explain": _CHAT,
    "/v1/done": {"request_id": "4f1c", "event": "ended", "prompt_tokens": 900, "cached_tokens": 896},
}
_QUESTIONS: dict[str, tuple[str, type, type]] = {
    "/v1/score": ("Score pods for a prompt", questions.ScoreFields, answers.ScoreAnswer),
    "/v1/score/batch": ("Score pods for several prompts", dict[str, list[Any]], answers.BatchAnswer),
    "/v1/choose": ("Choose a pod, by load too, and book it", questions.ChooseFields, answers.ChooseAnswer),
    "/v1/explain": ("What a choice would rest on", questions.ScoreFields, answers.Explanation),
    "/v1/done": ("What has become of a choice", questions.DoneFields, answers.Done),
}
_SHOWN: dict[str, tuple[str, type]] = {
    "/v1/pods": ("What the index knows of every pod", dict[str, Any]),
    "/v1/receipts": ("The last decisions, each with what came of it", list[dict[str, Any]]),
    "/v1/overview": ("The fleet at a glance: replicas, traffic, hot beginnings, health", views.Overview),
    "/v1/decisions": ("The last decisions with their conversations; for who polls", views.Decisions),
    "/healthz": ("The process is alive", answers.Health),
    "/readyz": ("Scores can be asked for: the index is loaded and fresh, the tokenizer is there", answers.Health),
}
_MODEL = {"name": "model", "in": "query", "description": "Empty: the first.", "schema": {"type": "string"}}
_LIMIT = {"name": "limit", "in": "query", "description": "How many at most.", "schema": {"type": "integer"}}
_AFTER = {"name": "after", "in": "query", "description": "`last` of an answer.", "schema": {"type": "string"}}
_PARAMETERS = {
    "/v1/pods": [_MODEL],
    "/v1/receipts": [_MODEL, _LIMIT],
    "/v1/overview": [_MODEL],
    "/v1/decisions": [_MODEL, _LIMIT, _AFTER],
}
_ERRORS = {
    "400": "No JSON object, or a prompt that cannot be scored",
    "401": "No key, or an unknown one",
    "403": "The key may not ask this",
    "404": "No such model; the known ones are named",
    "413": "The body is too long",
    "422": "A field is wrong; `param` is its path",
    "429": "Too many questions; see Retry-After",
    "503": "Not ready, with the reason",
}


def document(*, choices: bool) -> bytes:
    """OpenAPI 3.1. Args: choices: whether /v1/choose and its like are there."""
    shown = {path: entry for path, entry in _QUESTIONS.items() if choices or path.startswith("/v1/score")}
    types = [one for _, question, answer in shown.values() for one in (question, answer)]
    types += [answer for _, answer in _SHOWN.values()]
    schemas, components = msgspec.json.schema_components(
        [*types, answers.ErrorBody], ref_template="#/components/schemas/{name}"
    )
    error = {"application/json": {"schema": {"type": "object", "properties": {"error": schemas[-1]}}}}
    errors = {status: {"description": text, "content": error} for status, text in _ERRORS.items()}
    paths: dict[str, Any] = {}
    for i, (path, (text, _, _)) in enumerate(shown.items()):
        asked = {"schema": schemas[2 * i], "example": _EXAMPLES[path]}
        answer = {"description": "The answer", "content": {"application/json": {"schema": schemas[2 * i + 1]}}}
        paths[path] = {
            "post": {
                "summary": text,
                "description": "" if path in ("/v1/done", "/v1/score/batch") else _PROMPT,
                "requestBody": {"required": True, "content": {"application/json": asked}},
                "responses": {"200": answer, **errors},
            }
        }
    for schema, (path, (text, _)) in zip(schemas[2 * len(shown) :], _SHOWN.items(), strict=False):
        answer = {"description": text, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"get": {"summary": text, "parameters": _PARAMETERS.get(path, []), "responses": {"200": answer}}}
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "KVCache Manager: scores and choices", "version": "1"},
            "paths": paths,
            "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        }
    )
