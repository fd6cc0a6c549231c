"""Requests for an audit: conversations that grow under shared system prompts, or the lines of a file.

A source is a generator that yields a `Request` and is sent the text of its answer (None if there was none), so that
the next turn of a conversation can hold what the model really said: blocks of answers are cached like any others.

Generated traffic is what makes caches hard to predict: several conversations share each system prompt, their turns come
in random order, requests are sent again unchanged (a prompt that is cached whole) or with another last question (a
branch), and finished conversations give way to new ones, so that old blocks are evicted. The same seed and the same
answers give the same requests.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from serve_app.errors import ConfigError

Body = dict[str, Any]
Source = Generator["Request", str | None, None]

CHARS_PER_TOKEN = 4.0  # of English text; only sizes depend on it
SHARE_SYSTEM = 3  # conversations per system prompt
ANSWER_TOKENS = (1, 4, 24, 72)  # from less than a block to several
STAY = 0.3  # chance that the conversation of the last request goes on: its blocks are the newest
CHANCES = {"next": 60, "repeat": 12, "branch": 12, "salted": 4, "completion": 12}  # what a conversation does next

QUESTIONS = (
    "What is this text about?",
    "Which terms does it define, and where?",
    "Give one example from it, with a short explanation.",
    "What does it say about errors?",
    "Sum it up in one sentence.",
    "Which part is the most important, and why?",
)


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send, and the conversation it is of."""

    body: Body
    kind: str  # what is special about it, for the report
    conversation: str = ""  # requests with the same name share a prefix; "": nothing is known


@dataclass(frozen=True, slots=True)
class Plan:
    """Size of the generated traffic."""

    count: int = 200  # requests
    conversations: int = 24  # alive at the same time
    tokens: int = 900  # about; of a conversation at its beginning
    turns: int = 6  # then another one takes its place
    seed: int = 0


def generate(model: str, plan: Plan) -> Source:
    """Conversations, as described above."""
    dice = random.Random(plan.seed)
    openings = _openings(plan, dice)
    alive = [next(openings) for _ in range(plan.conversations)]
    place = 0
    for _ in range(plan.count):
        if dice.random() >= STAY:
            place = dice.randrange(len(alive))
        conversation = alive[place]
        limits = {"max_tokens": dice.choice(ANSWER_TOKENS), "temperature": 0}
        request = conversation.ask(dice)
        answer = yield replace(request, body={"model": model, **request.body, **limits})
        conversation.hear(answer)
        if answer is None or conversation.turns == plan.turns:
            alive[place] = next(openings)


def replay(bodies: Iterable[Body], model: str) -> Source:
    """Bodies as `read_bodies` gives them; `model` for those that name none."""
    for body in bodies:
        yield Request({"model": model} | body, "replayed")


def read_bodies(path: Path) -> list[Body]:
    """The lines of a JSONL file: OpenAI requests, or OpenAI's batch format, which has them under `body`.

    Raises:
        ConfigError: the file cannot be read, or a line is not a request.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    bodies: list[Body] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            parsed = json.loads(line)
            body = parsed.get("body", parsed)
            if not ("messages" in body or "prompt" in body):
                raise ValueError("it has neither `messages` nor `prompt`")
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} is not an OpenAI request: {error}") from error
        # Whole answers: only these have their usage in every version of the API.
        bodies.append({key: value for key, value in body.items() if key not in {"stream", "stream_options"}})
    return bodies


class _Conversation:
    """What was said so far; user and assistant always take turns, as some templates demand."""

    def __init__(self, name: str, system: str, document: str) -> None:
        self.turns = 0
        self._name = name
        self._messages = [_message("system", system), _message("user", document)]
        self._salt: Body = {}
        self._listening = False  # whether the next answer belongs to it

    def ask(self, dice: random.Random) -> Request:
        """The next request."""
        kind = dice.choices(list(CHANCES), list(CHANCES.values()))[0] if self.turns else "first"
        self.turns += 1
        self._listening = kind not in {"repeat", "completion"}
        if kind == "completion":
            text = "\n".join(message["content"] for message in self._messages)
            return Request({"prompt": text}, kind, f"{self._name}, as text")
        if kind == "repeat":
            return self._request(kind, self._messages[:-1])
        if kind == "branch":
            del self._messages[-2:]  # the last question and its answer
        if kind == "salted":
            self._salt = {"cache_salt": f"salt {dice.randrange(10**6)}"}
        if kind != "first":
            self._messages.append(_message("user", f"{dice.choice(QUESTIONS)} ({dice.randrange(1000)})"))
        return self._request(kind, self._messages)

    def hear(self, answer: str | None) -> None:
        if self._listening and answer is not None:
            self._messages.append(_message("assistant", answer))

    def _request(self, kind: str, messages: list[dict[str, str]]) -> Request:
        body = {"messages": list(messages), **self._salt}
        return Request(body, kind, " ".join([self._name, *self._salt.values()]))


def _openings(plan: Plan, dice: random.Random) -> Iterator[_Conversation]:
    """New conversations for ever: a system prompt that some share, and a document of their own."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))  # English that is on every machine
    half = int(plan.tokens * CHARS_PER_TOKEN / 2)
    for number in itertools.count():
        group = number // SHARE_SYSTEM
        system = f"You are helper {group} of audit {plan.seed}. Answer from these rules. {_excerpt(text, group, half)}"
        pages = dice.randrange(10**6)
        document = f"Document {number}, of {pages} pages. {_excerpt(text, number, half)} {dice.choice(QUESTIONS)}"
        yield _Conversation(f"conversation {number}", system, document)


def _excerpt(text: str, number: int, length: int) -> str:
    start = number * length % max(len(text) - length, 1)
    return text[start : start + length]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
