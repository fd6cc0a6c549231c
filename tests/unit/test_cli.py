"""What a wrong option or a wrong server ends the `kvcache` command with: one sentence that names it, no traceback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import pytest
import typer
from typer.testing import CliRunner

from serve_app import cli
from serve_app.commands import configs
from tests.unit.conftest import Run

PUBLISH = ("publish", "--redis", "redis://127.0.0.1:1", "--pod", "p", "--model", "m")
ENGINE = ("--engine", "tcp://127.0.0.1:5557")


class _Gateway(BaseHTTPRequestHandler):
    """A web server without the graph: 404 in JSON as FastAPI's, a page, or an error of the graph's kind."""

    def do_GET(self) -> None:
        status, body = {
            "/page": (200, b"<html>hello</html>"),
            "/refused": (503, b'{"error": {"code": "no_index"}}'),
        }.get(self.path.partition("/v1/")[0], (404, b'{"detail": "Not Found"}'))
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def gateway() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Gateway)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--engine", "localhost:5557"), "--engine 'localhost:5557' is no address"),
        (("--engine", "tcp://*:5557"), "--engine 'tcp://*:5557' is no address"),
        ((*ENGINE, "--replay", "tcp://*:5558"), "--replay 'tcp://*:5558' is no address"),
        ((*ENGINE, "--chat-template", "/missing.jinja"), "--chat-template /missing.jinja cannot be read"),
        (
            (*ENGINE, "--data-parallel-size", "4", "--rank", "4"),
            "--rank 4: with --data-parallel-size 4 the last one is 3",
        ),
        (
            ("--engine", "ipc:///tmp/events", "--data-parallel-size", "2"),
            "data parallel ranks publish on tcp://HOST:PORT",
        ),
        ((), "--engine must be given, or --server URL, which tells them"),
        ((*ENGINE, "--listen", "127.0.0.1:0"), "--listen needs --server"),
        (("--server", "127.0.0.1:8000"), "--server '127.0.0.1:8000' is no URL"),
        (("--server", "http://127.0.0.1:1", "--listen", "9411"), "--listen '9411' is no address to listen on"),
        (("--server", "http://127.0.0.1:1", "--redis", "nowhere://x"), "redis url 'nowhere://x'"),
        (("--server", "http://127.0.0.1:1", "--hash-algorithm", "md5"), "hash algorithm 'md5' is none of vLLM's"),
    ],
)
def test_publish_names_the_option_that_is_wrong(run: Run, options: tuple[str, ...], expected: str) -> None:
    status, said = run(*PUBLISH, *options)
    assert status == 1
    assert said.startswith("error: " + expected)


def test_publish_lmcache_wants_a_port(run: Run) -> None:
    options = ("--redis", "redis://127.0.0.1:1", "--model", "m", "--block-size", "16")
    status, said = run("publish-lmcache", "--server", "localhost", *options)
    assert status == 1
    assert said.startswith("error: --server 'tcp://localhost' is no address")
    assert said.endswith("write HOST:PORT")


def test_a_template_that_is_no_text(run: Run, tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_bytes(b"\xff\xfe\xff")
    status, said = run(*PUBLISH, *ENGINE, "--chat-template", str(template))
    assert status == 1
    assert "cannot be read" in said


@pytest.mark.parametrize("command", ["score", "receipts"])
def test_a_gateway_without_the_graph(run: Run, gateway: str, command: str) -> None:
    for path, expected in (("/kvcache/v1/score", "(404)"), ("/page", "answers 200, and not in JSON")):
        status, said = run(command, "--url", gateway + path)
        assert status == 1
        assert said.startswith("error: ")
        assert expected in said
        assert "does the kvcache application (build_kvcache) run there?" in said


@pytest.mark.parametrize("command", ["score", "receipts"])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "localhost:8000/", "http://127.0.0.1:http/"])
def test_nobody_is_there(run: Run, command: str, url: str) -> None:
    status, said = run(command, "--url", url)
    assert status == 1
    assert said.startswith(f"error: {url}v1/{command} does not answer")
    assert "`kvcache up` starts a gateway" in said


@pytest.mark.parametrize("command", ["score", "receipts"])
def test_an_error_of_the_graph_itself_is_shown(run: Run, gateway: str, command: str) -> None:
    status, said = run(command, "--url", f"{gateway}/refused")
    assert status == 1
    assert "no_index" in said
    assert "build_kvcache" not in said


@pytest.mark.parametrize("stdin", [b"", b"not JSON", b"[1]", b"\xff"])
def test_tokenize_wants_a_request(run: Run, stdin: bytes) -> None:
    status, said = run("tokenize", "--model", "none", stdin=stdin)
    assert status == 1
    assert said.startswith("error: stdin is not an OpenAI request as JSON")


class Command(Protocol):
    epilog: str | None


def help_of(command: Command, name: str = "kvcache") -> Iterator[tuple[str, str]]:
    """Each command's whole name, and the end of its help."""
    for each, sub in getattr(command, "commands", {}).items():
        yield from help_of(sub, f"{name} {each}")
    if not hasattr(command, "commands"):
        yield name, command.epilog or ""


def test_each_command_has_an_example() -> None:
    examples = dict(help_of(typer.main.get_command(cli.app)))
    assert len(examples) > 15
    assert [name for name, end in examples.items() if not end.startswith(f"Example: {name}")] == []


class TestConfigs:
    def test_each_is_listed_shown_and_copied(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # from any folder
        for name, path in configs.shipped().items():
            assert configs.description(path).endswith("."), name
            copied = tmp_path / path.name
            assert run("config", "copy", name) == (0, f"kvcache wrote {path.name}")
            assert copied.read_text() == path.read_text()
        assert {"quickstart", "gpu", "graph", "service/score", "direct.env"} <= configs.shipped().keys()
        _, listed = run("config", "list", "--json")
        assert [each["name"] for each in json.loads(listed)] == list(configs.shipped())
        assert run("config", "show", "gpu")[1] == " ".join(configs.shipped()["gpu"].read_text().split())

    def test_a_file_is_not_replaced_unasked(self, run: Run, tmp_path: Path) -> None:
        mine = tmp_path / "mine.yaml"
        mine.write_text("mine")
        status, said = run("config", "copy", "gpu", str(mine))
        assert (status, said) == (1, f"error: {mine} is there already: give another name, or --force")
        assert mine.read_text() == "mine"
        assert run("config", "copy", "gpu", str(mine), "--force")[0] == 0
        assert mine.read_text() != "mine"

    @pytest.mark.parametrize("command", [("config", "show"), ("config", "copy"), ("up",)])
    def test_a_name_that_is_none_lists_those_that_are(
        self, run: Run, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KVCACHE_HOME", str(tmp_path))  # where nothing runs
        status, said = run(*command, "quick-start")
        assert status == 1
        assert "'quick-start'" in said
        assert "quickstart, " in said

    def test_a_path_still_works(self, tmp_path: Path) -> None:
        mine = tmp_path / "mine.yaml"
        mine.write_text("applications: []\nhttp_options:")
        assert configs.find(str(mine)) == mine
        assert configs.load_config(mine, 8123)["http_options"] == {"port": 8123}
        assert configs.find("quickstart") == configs.QUICKSTART


def test_a_shell_completes_commands() -> None:
    asked = {"_KVCACHE_COMPLETE": "complete_bash", "COMP_WORDS": "kvcache con", "COMP_CWORD": "1"}
    assert CliRunner().invoke(cli.app, prog_name="kvcache", env=asked).output.split() == ["config"]


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"kvcache-manager {version('kvcache-manager')}")
