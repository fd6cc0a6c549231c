"""Ten things and more, each broken on purpose, in a real Valkey and on this machine: doctor names each of them."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve_app import cli, local_stack
from serve_app.doctor import gather as gathering
from serve_app.doctor.checks import CHECKS, examine
from serve_app.doctor.facts import Facts, HostFacts, Level, Package
from serve_app.doctor.machine import DIRECT, OPEN_FILES
from serve_app.index.inspection import RedisFacts
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.redis_writer import RedisWriter
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import Attention, CacheLayout, Domain, DomainId, EngineSpec, Epoch, KVGroup, PodId
from tests.helpers import MODEL
from tests.servers import Server, free_port
from tests.unit.prompts.conftest import CHATML, write_model
from tests.vllm_api import Api, captured, with_labels

WELL = HeartbeatRecord(1, blocks=3, events_applied=5)
LMCACHE = DomainId("node:n1:5555")


@dataclass
class Fleet:
    """Pods in a Valkey of their own, as publishers write them."""

    server: Server
    tokenizer: str
    url: str = ""

    def __post_init__(self) -> None:
        self.url = self.server.url

    def spec(self, block_size: int = 4, tokenizer: str = "", **more: Any) -> EngineSpec:
        plain = EngineSpec(MODEL, block_size, tokenizer or self.tokenizer)
        assert len(PromptEncoder(plain, PrefixStore(1 << 20)).prepare({"model": MODEL, "prompt": "x"})) == 1
        return replace(plain, **more)

    def join(self, name: str, heartbeat: HeartbeatRecord | None = WELL, **more: Any) -> None:
        domain = Domain(DomainId(name), Epoch(1), more.pop("spec", self.spec()), PodId(name), **more)
        self.publish(domain, heartbeat)

    def publish(self, domain: Domain, heartbeat: HeartbeatRecord | None = WELL) -> None:
        writer = RedisWriter(self.url, MODEL)
        writer.join(domain)
        writer.flush()
        if heartbeat is not None:
            writer.heartbeat(domain.id, heartbeat)
        writer.close()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fleet(tmp_path: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path / "home"))
    server = Server(tmp_path / "valkey")
    yield Fleet(server, model_folder)
    server.kill()


def found(fleet: Fleet, config: dict[str, Any] | None = None) -> list[tuple[str, Level, str]]:
    """What is not ok, of a look at the real thing; each finding says what it means and what to do."""
    findings = examine(gathering.gather(config, fleet.url, "", watch_s=0))
    bad = [each for each in findings if each.level is not Level.OK]
    assert all(each.do for each in bad), bad
    return [(each.check, each.level, each.saw) for each in bad]


def serve(llm: dict[str, Any], graph_model: str = "m", port: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "http_options": {"port": port or free_port()},
        "applications": [
            {"import_path": "serve_app.app:build_kvcache", "args": {"model": graph_model}},
            {
                "import_path": "serve_app.app:build_llm",
                "args": {"llm": {"model_loading_config": {"model_id": "m"}, **llm}, **more},
            },
        ],
    }


def of(check: str, findings: list[tuple[str, Level, str]]) -> list[tuple[Level, str]]:
    return [(level, saw) for name, level, saw in findings if name == check]


def test_what_is_well_is_left_alone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = tuple((part, digest) for part, digest in _identity(fleet.spec()))
    for name in ("a", "b"):
        fleet.join(name, spec=fleet.spec(identity=identity))
    of_machine = {"open files", "haproxy", "vllm"}  # not of the fleet, or not asked for
    assert [each for each in found(fleet, serve({})) if each[0] not in of_machine] == []


def _identity(spec: EngineSpec) -> list[tuple[str, str]]:
    from serve_app.prompts.identity import TOKENIZER
    from serve_app.prompts.tokenizer import Tokenizer

    return [(TOKENIZER, Tokenizer(spec.source).digest())]


class TestRedis:
    def test_gone(self, fleet: Fleet) -> None:
        fleet.server.kill()
        ((level, saw),) = of("redis", found(fleet))
        assert level is Level.ERROR
        assert f"{fleet.url} does not answer" in saw

    def test_without_rights(self, fleet: Fleet) -> None:
        with fleet.server.client() as admin:
            admin.execute_command("ACL", "SETUSER", "few", "on", ">p", "~kv:*", "+@read", "+@connection", "+set")
        fleet.url = fleet.url.replace("redis://", "redis://few:p@")
        findings = found(fleet)
        ((level, saw),) = of("redis rights", findings)
        assert level is Level.ERROR
        assert "xadd" in saw
        assert "xrevrange" not in saw
        assert ":p@" not in str(findings)
        assert of("redis memory", findings)[0][0] is Level.UNKNOWN  # INFO is not allowed either

    def test_a_replica(self, fleet: Fleet, tmp_path: Path) -> None:
        replica = Server(tmp_path / "replica", "--replicaof", "127.0.0.1", str(fleet.server.port))
        fleet.url = replica.url
        assert of("redis rights", found(fleet)) == [
            (Level.ERROR, f"{replica.url} is a replica, which nobody can write to")
        ]
        replica.kill()

    def test_that_evicts_and_saves(self, fleet: Fleet) -> None:
        with fleet.server.client() as admin:
            admin.config_set("maxmemory-policy", "allkeys-lru")
            admin.config_set("save", "60 1")
        findings = found(fleet)
        assert of("redis memory", findings) == [(Level.ERROR, "maxmemory-policy allkeys-lru")]
        assert of("redis persistence", findings) == [(Level.WARNING, "it writes to disk (save '60 1')")]

    def test_that_is_nearly_full(self, fleet: Fleet) -> None:
        with fleet.server.client() as admin:
            admin.set("else", bytes(16 * 2**20))
        with fleet.server.client() as admin:
            admin.config_set("maxmemory", int(admin.memory_usage("else") * 1.08))
        ((level, saw),) = of("redis memory", found(fleet))
        assert level is Level.WARNING
        assert saw.endswith("MiB are used")

    def test_with_somebody_elses_key(self, fleet: Fleet) -> None:
        with fleet.server.client() as other:
            other.set(f"kv:{{{MODEL}}}:domains", "mine")
        ((level, saw),) = of("redis keys", found(fleet))
        assert level is Level.ERROR
        assert "WRONGTYPE" in saw

    def test_nothing_is_changed_by_looking(self, fleet: Fleet) -> None:
        fleet.join("a")
        with fleet.server.client() as client:
            before = client.dbsize(), client.xlen(f"kv:{{{MODEL}}}:log")
            found(fleet)
            assert (client.dbsize(), client.xlen(f"kv:{{{MODEL}}}:log")) == before


class TestPods:
    def test_nobody_publishes(self, fleet: Fleet) -> None:
        assert of("pods", found(fleet)) == [(Level.WARNING, f"nobody publishes to {fleet.url}")]

    def test_a_publisher_that_has_ended(self, fleet: Fleet) -> None:
        fleet.join("a", None)
        assert of("pods", found(fleet)) == [(Level.ERROR, f"a of {MODEL} has no lease")]

    def test_a_heartbeat_that_stands_still(self, fleet: Fleet) -> None:
        fleet.join("a")
        findings = examine(gathering.gather(None, fleet.url, MODEL, watch_s=0.01))
        assert (Level.ERROR, f"a of {MODEL} sends no heartbeat") in [(each.level, each.saw) for each in findings]

    def test_events_that_do_not_come_are_lost_or_not_understood(self, fleet: Fleet) -> None:
        fleet.join("a", HeartbeatRecord(1))
        fleet.join("b", HeartbeatRecord(1, events_applied=9, events_lost=2, events_skipped={"never_removed": 3}))
        assert of("events", found(fleet)) == [
            (Level.WARNING, f"no KV event of a of {MODEL} has arrived"),
            (Level.WARNING, f"2 batches of b of {MODEL} were lost"),
            (Level.WARNING, f"events of b of {MODEL} were skipped: never_removed 3"),
        ]

    def test_block_sizes_and_groups_that_differ(self, fleet: Fleet) -> None:
        fleet.join("a")
        fleet.join("b", spec=fleet.spec(8))
        fleet.join("c", layout=CacheLayout((KVGroup(Attention.FULL, 4), KVGroup(Attention.MAMBA, 4)), 4))
        findings = found(fleet)
        assert of("block size", findings) == [(Level.ERROR, f"{MODEL}: 4 on a, c; 8 on b")]
        assert of("groups", findings) == [(Level.ERROR, f"{MODEL}: KV cache groups differ: 0 on a, b; 2 on c")]

    def test_another_tokenizer_than_the_routers(self, fleet: Fleet, tmp_path: Path) -> None:
        fleet.join("a", spec=fleet.spec(identity=(("tokenizer", "another"),)))
        fleet.join("b", spec=fleet.spec(identity=tuple(_identity(fleet.spec()))))
        fleet.join("c", spec=replace(fleet.spec(), tokenizer=str(tmp_path / "gone")))
        findings = of("tokenizer", found(fleet))
        assert (Level.ERROR, f"a of {MODEL}: tokenizer differ from {fleet.tokenizer!r} here") in findings
        assert (Level.ERROR, f"{MODEL}: pods make prompts in 2 ways: a; b") in findings
        assert any(
            saw.startswith(f"{str(tmp_path / 'gone')!r} of c of {MODEL} cannot be loaded") for _, saw in findings
        )

    def test_another_template_than_the_routers(self, fleet: Fleet, tmp_path: Path) -> None:
        other = write_model(tmp_path, CHATML.replace("assistant", "model"))
        theirs = PromptEncoder(fleet.spec(tokenizer=other, identity=(("template", "?"),)), PrefixStore(1 << 20))
        assert theirs.differing() == ["template"]
        fleet.join("a", spec=fleet.spec(identity=(("template", "?"),)))
        assert of("tokenizer", found(fleet)) == [
            (Level.ERROR, f"a of {MODEL}: template differ from {fleet.tokenizer!r} here")
        ]

    def test_lmcache_with_other_chunks_and_with_adapters(self, fleet: Fleet) -> None:
        fleet.publish(Domain(LMCACHE, Epoch(1), fleet.spec(), chunk_size=6))
        fleet.join("a", attached=(LMCACHE,), adapters=("sql",))
        fleet.join("b", attached=(DomainId("node:n2:5555"),))
        findings = found(fleet)
        assert of("lmcache", findings) == [
            (Level.ERROR, f"chunk size 6 of {LMCACHE} is no multiple of the block size 4"),
            (Level.ERROR, "a has LoRA adapters behind LMCache"),
            (Level.WARNING, "b uses node:n2:5555, which nobody publishes"),
        ]
        assert of("adapters", findings) == [(Level.WARNING, f"b of {MODEL} has no sql")]


class TestVllm:
    """A server's endpoints, played from what vLLM has answered."""

    @pytest.fixture
    @staticmethod
    def api() -> Iterator[Api]:
        api = Api(MODEL, block_size=4)
        api.start()
        yield api
        api.stop()

    def of_vllm(self, *engines: str, redis_url: str = "") -> list[tuple[Level, str]]:
        findings = examine(gathering.gather(None, redis_url, "", engines, watch_s=0))
        return [(each.level, each.saw) for each in findings if each.check == "vllm" and each.level is not Level.OK]

    def test_well(self, api: Api, fleet: Fleet) -> None:
        fleet.join("a")
        assert self.of_vllm(api.url, redis_url=fleet.url) == []

    def test_no_prefix_caching_and_other_blocks(self, api: Api, fleet: Fleet) -> None:
        fleet.join("a", spec=fleet.spec(8))
        api.metrics = with_labels(api.metrics, enable_prefix_caching=False)
        assert self.of_vllm(api.url, redis_url=fleet.url) == [
            (Level.ERROR, f"{api.url} has prefix caching turned off"),
            (Level.ERROR, f"{api.url} has blocks of 4 tokens, its model is published with 8"),
        ]

    def test_no_events(self, api: Api) -> None:
        told = json.loads(captured("server_info.json"))
        assert told["vllm_config"]["kv_events_config"]["enable_kv_cache_events"]
        told["vllm_config"]["kv_events_config"]["enable_kv_cache_events"] = False
        api.answers["/server_info"] = lambda _: (200, json.dumps(told).encode())
        assert self.of_vllm(api.url) == [(Level.ERROR, f"{api.url} publishes no KV events")]

    def test_not_there_or_none(self, api: Api) -> None:
        api.answers["/health"] = lambda _: (404, b"")
        (away, other, wrong) = self.of_vllm("http://127.0.0.1:1", api.url, "localhost:8000")
        assert away[1].startswith("http://127.0.0.1:1: ")
        assert "/health answers 404" in other[1]
        assert "is no URL" in wrong[1]


class TestConfig:
    @pytest.mark.parametrize(
        ("config", "check", "saw"),
        [
            (serve({}, "n"), "config", "the graph follows model 'n', the engines serve m"),
            (
                serve({}, routing={"redis_url": "redis://elsewhere"}),
                "config",
                "model 'm' publishes to another redis_url than the graph reads",
            ),
            (
                serve({"engine_kwargs": {"enable_prefix_caching": False}}),
                "config",
                "model 'm' has enable_prefix_caching: false",
            ),
            (
                serve({"engine_kwargs": {"block_size": 32}}, lmcache={"chunk_size": 100}),
                "lmcache",
                "lmcache.chunk_size 100 of model 'm' is no multiple of the block size 32",
            ),
            (
                serve({"engine_kwargs": {"enable_lora": True}}, lmcache={}),
                "lmcache",
                "model 'm' has LoRA adapters behind LMCache",
            ),
        ],
    )
    def test_what_cannot_work(self, config: dict[str, Any], check: str, saw: str) -> None:
        findings = examine(Facts(WELL_HOST, config=config))
        bad = [each for each in findings if each.level is Level.ERROR]
        assert [(each.check, each.saw) for each in bad] == [(check, saw)]

    def test_a_port_that_is_taken(self, fleet: Fleet) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            ((level, saw),) = of("ports", found(fleet, serve({}, port=port)))
        assert level is Level.ERROR
        assert saw.startswith(f"Serve's HTTP proxy: port {port} on 127.0.0.1 is taken by ")
        assert of("ports", found(fleet, serve({}, port=port))) == []


WELL_HOST = HostFacts((3, 11), open_files=OPEN_FILES)


class TestMachine:
    def test_few_open_files(self, fleet: Fleet) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        try:
            assert of("open files", found(fleet)) == [(Level.WARNING, "at most 512 open files")]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_direct_streaming_by_halves(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in DIRECT:
            monkeypatch.delenv(name, raising=False)
        first, *rest = DIRECT
        monkeypatch.setenv(first, "1")
        assert of("direct streaming", found(fleet)) == [(Level.ERROR, f"{first} set, {', '.join(sorted(rest))} not")]
        for name in rest:
            monkeypatch.setenv(name, "1")
        monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
        assert of("direct streaming", found(fleet)) == [(Level.WARNING, "RAY_SERVE_HAPROXY_BINARY_PATH is not set")]

    def test_processes_of_a_stack_that_has_ended(self, fleet: Fleet) -> None:
        environment = {**os.environ, local_stack.STACK_VARIABLE: f"{local_stack._state_file()}:gone"}
        left = subprocess.Popen(["sleep", "600"], env=environment)
        try:
            ((level, saw),) = of("orphans", found(fleet))
            local_stack.end(local_stack.orphans(None), on_progress=lambda _: None)
            assert not psutil.pid_exists(left.pid)
        finally:
            left.kill()
            left.wait()
        assert level is Level.WARNING
        assert f"1 processes of a `kvcache up` that has ended: {left.pid} (sleep)" in saw
        assert of("orphans", found(fleet)) == []

    @pytest.mark.parametrize(
        ("facts", "check", "level"),
        [
            (Facts(replace(WELL_HOST, python=(3, 10))), "versions", Level.ERROR),
            (
                Facts(replace(WELL_HOST, packages=(Package("ray", "2.61.0", "==2.60.0", False),))),
                "versions",
                Level.ERROR,
            ),
            (Facts(replace(WELL_HOST, direct=True, haproxy_error="no HAProxy")), "haproxy", Level.ERROR),
            (Facts(WELL_HOST, redis=RedisFacts("u", ahead_s=-3.0)), "clock", Level.WARNING),
            (Facts(WELL_HOST), "redis", Level.UNKNOWN),
        ],
    )
    def test_what_cannot_be_broken_here(self, facts: Facts, check: str, level: Level) -> None:
        assert [each.level for each in examine(facts) if each.check == check] == [level]

    def test_what_is_installed_here_is_what_is_wanted(self) -> None:
        packages = {each.name: each for each in gathering.packages()}
        assert {"ray", "lmcache"} <= packages.keys()
        assert [each for each in packages.values() if each.installed and not each.fits] == []
        assert sys.version_info[:2] == gathering.host().python


def test_the_command(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.join("a", None)

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["kvcache", "doctor", "--redis", fleet.url, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().out

    status, said = run("--json")
    findings = json.loads(said)
    assert status == 1
    assert {"check", "level", "saw", "means", "do"} == findings[0].keys()
    assert len({each["check"] for each in findings}) >= len(CHECKS)
    status, said = run()
    assert status == 1
    assert f"a of {MODEL} has no lease" in said
    assert "do: look into the publisher's log" in said
    with fleet.server.client() as client:
        client.flushall()
    assert run("--json")[0] == 0
