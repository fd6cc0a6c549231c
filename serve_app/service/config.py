"""Settings of `kvcache serve-scores`, as they stand in its YAML. Unknown names are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from serve_app.config import EMBEDDED, AuthSettings, DecisionSettings
from serve_app.errors import ConfigError
from serve_app.limits import Limits
from serve_app.scoring import Strategy
from serve_app.service.discovery import DiscoverySettings

Address = Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):[0-9]{1,5}$")]
"""`host:port`; port 0: any that is free."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TLSSettings(_Settings):
    """Certificate of the HTTP and gRPC servers: PEM files, read at the start and at SIGHUP."""

    certificate: Path
    key: Path


class ServiceConfig(_Settings):
    """All of it. What a model's section does not say, it has from here."""

    models: Annotated[
        tuple[DecisionSettings, ...],
        Field(min_length=1, description="Each with its own index; `model` is the name that clients send."),
    ]
    http: Annotated[Address, Field(description="Where HTTP is served.")] = "127.0.0.1:8100"
    grpc: Annotated[Address | None, Field(description="Where gRPC is served; null: it is not.")] = "127.0.0.1:8101"
    picker: Annotated[
        Address | None,
        Field(description="Where Envoy asks for endpoints (ext_proc); null: it does not. One model only."),
    ] = None
    discovery: Annotated[
        DiscoverySettings | None, Field(description="Where replicas are; null: who publishes is there. One model only.")
    ] = None
    score_strategy: Annotated[Strategy, Field(description="Of a score whose question does not say.")] = (
        Strategy.LONGEST_PREFIX
    )
    lease_s: Annotated[
        PositiveFloat, Field(le=3600, description="How long a choice counts at its pod, if nobody says that it ended.")
    ] = 120.0
    auth: Annotated[AuthSettings, Field(description="Keys; without, everybody may ask everything.")] = AuthSettings()
    tls: TLSSettings | None = None
    limits: Annotated[Limits, Field(description="How much of a question is looked at, and how many.")] = Limits(
        scores_per_s=10_000.0
    )
    workers: Annotated[PositiveInt, Field(le=64, description="Processes, each with its own copy of the index.")] = 1
    drain_s: Annotated[
        NonNegativeFloat, Field(description="After SIGTERM: how long questions that are there may take.")
    ] = 10.0

    @property
    def is_embedded(self) -> bool:
        return any(model.redis_url == EMBEDDED for model in self.models)


def parse_config(given: dict[str, object], name: str) -> ServiceConfig:
    """Args: name: where it comes from, for the message.

    Raises:
        ConfigError: it is not a configuration; says which field is wrong.
    """
    rest = dict(given)
    shared = {"redis_url": rest.pop("redis_url")} if "redis_url" in rest else {}
    if isinstance(models := rest.get("models"), list):
        rest["models"] = [{**shared, **one} if isinstance(one, dict) else one for one in models]
    try:
        config = ServiceConfig.model_validate(rest)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"{name}: {wrong}") from error
    names = [model.model for model in config.models]
    if twice := next((one for one in names if names.count(one) > 1), None):
        raise ConfigError(f"{name}: models: {twice!r} is there twice")
    for field in ("picker", "discovery"):
        if getattr(config, field) and len(names) > 1:
            raise ConfigError(f"{name}: {field}: its pods are of one model, and there are {len(names)}")
    return config


def read_mapping(path: Path) -> dict[str, object]:
    """Raises:
    ConfigError: it cannot be read, or is no mapping.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path} is no mapping: it needs `models:` at least (see configs/service/score.yaml)")
    return given
