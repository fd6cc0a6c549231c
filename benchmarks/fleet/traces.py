"""Public request traces: where they lie, their lines as checked records, and which part of them is for what.

In: a folder with the files that scripts/download_traces.py fetches. Out: msgspec structs. A line that does not fit ends
the run with one sentence: a benchmark that leaves some requests out measures something else.

Tuning and reporting use different requests, so that a weight is not praised for what it was fitted to:

- `agents-claude-code`: sessions in the file's order, first, third, ... for tuning; second, fourth, ... for reporting;
- Mooncake's: the first half of the lines for tuning, the second for reporting (its lines have no sessions).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
AGENTS_FILE = "claude-code-sessions.jsonl.gz"
CONVERSATION_FILE = "mooncake-conversation.jsonl.gz"
SYNTHETIC_FILE = "mooncake-synthetic.jsonl.gz"
REMEDY = "`python scripts/download_traces.py` fetches it"

Tokens = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Line = TypeVar("Line")
Item = TypeVar("Item")


class TraceError(ValueError):
    """A trace cannot be used. The message is one sentence for the user."""


class Part(StrEnum):
    TUNING = "tuning"
    REPORTING = "reporting"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class TraceSource:
    """Where the files are, and which part of them to replay."""

    folder: Path = TRACES
    part: Part = Part.REPORTING


class MooncakeLine(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]  # ms
    input_length: Tokens
    output_length: Tokens
    hash_ids: list[Tokens]  # one for each 512 tokens, the same in all lines


class AgentRequest(msgspec.Struct, frozen=True, rename={"tokens": "in", "output_tokens": "out"}):
    t: Seconds  # since the session, or the subagent, began
    tokens: Tokens
    output_tokens: Tokens
    ids: list[tuple[Tokens, Tokens]]  # the prompt's full blocks as runs [first, count]
    think_s: Seconds = 0.0  # from the end of the answer before


class Subagent(msgspec.Struct, frozen=True):
    t: Seconds  # since the session began
    requests: list[AgentRequest]


class AgentSession(msgspec.Struct, frozen=True):
    """One coding-agent session. Ids are the session's own; the first `shared_blocks` of them its client's."""

    session: str
    block_tokens: Annotated[int, msgspec.Meta(gt=0)]
    system_tokens: Tokens
    tool_tokens: Tokens
    requests: Annotated[list[AgentRequest], msgspec.Meta(min_length=1)]
    subagents: list[Subagent] = []

    @property
    def shared_blocks(self) -> int:
        return (self.system_tokens + self.tool_tokens) // self.block_tokens


def read_lines(path: Path, kind: type[Line]) -> Iterator[Line]:
    """The file's lines, plain or gzip, as records of this kind.

    Raises:
        TraceError: the file is missing or broken, or a line is no such record.
    """
    if not path.exists():
        raise TraceError(f"no trace file {path}: {REMEDY}, or name its folder with --traces")
    decoder = msgspec.json.Decoder(kind)
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for line in lines:
                number += 1
                yield decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}, line {number}: {error}; {REMEDY} again") from None
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path} cannot be read after line {number} ({error}); {REMEDY} again") from None


def read_sessions(source: TraceSource) -> list[AgentSession]:
    """The part's sessions, in the file's order."""
    path = source.folder / AGENTS_FILE
    sessions = list(read_lines(path, AgentSession))
    for number, session in enumerate(sessions, 1):
        for request in (*session.requests, *(each for agent in session.subagents for each in agent.requests)):
            blocks = sum(count for _, count in request.ids)
            if blocks != request.tokens // session.block_tokens:
                raise TraceError(
                    f"{path}, line {number}: a prompt of {request.tokens} tokens has {blocks} block ids, "
                    f"not {request.tokens // session.block_tokens}; {REMEDY} again"
                )
    match source.part:
        case Part.TUNING:
            return sessions[::2]
        case Part.REPORTING:
            return sessions[1::2]
    return sessions


def half(items: Sequence[Item], part: Part) -> Sequence[Item]:
    """The part's half of what is in order of time."""
    middle = len(items) // 2
    match part:
        case Part.TUNING:
            return items[:middle]
        case Part.REPORTING:
            return items[middle:]
    return items
