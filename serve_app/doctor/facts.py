"""What the checks look at. All of it is data, so that a check needs no server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from serve_app.events.discovery import EngineFacts
from serve_app.index.inspection import RedisFacts


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    UNKNOWN = "unknown"  # it could not be looked at
    WARNING = "warning"  # it works, and worse than it could
    ERROR = "error"  # it does not work, or its answers cannot be relied on


class Finding(NamedTuple):
    """What a check saw, what it means, and what to do."""

    check: str
    level: Level
    saw: str
    means: str = ""
    do: str = ""


class Package(NamedTuple):
    """A distribution that this package names."""

    name: str
    installed: str  # version; empty: it is not there
    wanted: str  # as pyproject.toml has it: `==2.60.0`
    fits: bool


class Port(NamedTuple):
    """A port that the gateway needs, and who has it."""

    where: str  # what the port is for
    host: str
    number: int
    owner: str  # who has it; empty: it is free
    ours: bool = False


class Process(NamedTuple):
    """A process that a former `kvcache up` has left."""

    pid: int
    command: str
    stack: str  # which `kvcache up` it is of


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What is known of this machine."""

    python: tuple[int, int]
    packages: tuple[Package, ...] = ()
    open_files: int = 0  # soft limit
    environment: Mapping[str, str] = field(default_factory=dict)  # of Ray Serve
    haproxy: str = ""  # the real one's path
    haproxy_error: str = ""
    orphans: tuple[Process, ...] = ()
    direct: bool = False  # whether direct streaming is wanted: by the environment, or by what runs


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """What the router makes of a pod's tokenizer and templates."""

    model: str
    pods: tuple[str, ...]
    tokenizer: str
    said: bool = True  # whether the pods say what they make prompts with
    differing: tuple[str, ...] = ()
    error: str = ""  # why it cannot be loaded


class EngineSeen(NamedTuple):
    """A vLLM server that was asked."""

    url: str
    told: EngineFacts | None  # None: see `error`
    error: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the checks look at."""

    host: HostFacts
    ports: tuple[Port, ...] = ()
    config: Mapping[str, Any] | None = None  # a Serve config
    redis: RedisFacts | None = None
    prompts: tuple[PromptFacts, ...] = ()
    engines: tuple[EngineSeen, ...] = ()
