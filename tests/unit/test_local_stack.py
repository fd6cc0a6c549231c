"""Stopping a stack whose processes end by themselves meanwhile; what is left when it has crashed, or did not start."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer

from serve_app import local_stack
from serve_app.commands import stack as commands
from serve_app.errors import ConfigError
from serve_app.ports import free_port

# A server and two children in a session of their own; on SIGINT it ends and leaves them.
_SERVER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(2):
    print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    pass
"""


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path))


Stack = tuple[subprocess.Popen[bytes], local_stack.Running, list[psutil.Process]]


@pytest.fixture
def stack() -> Iterator[Stack]:
    """The server, what was written down of it, and its children."""
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout is not None
        children = [psutil.Process(int(server.stdout.readline())) for _ in range(2)]
        created_s = psutil.Process(server.pid).create_time()
        yield server, local_stack.Running(server.pid, created_s, "", "", os.devnull, None), children
        server.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@pytest.mark.parametrize("when", ["asking", "ending"])
def test_a_process_that_ends_by_itself_meanwhile_keeps_no_other_running(stack: Stack, when: str) -> None:
    server, running, children = stack

    def on_progress(message: str) -> None:
        """The last moment before signals are sent: the server, or a child, is no more."""
        if message.startswith(when):
            victim = psutil.Process(server.pid) if when == "asking" else children[0]
            victim.kill()
            (server if when == "asking" else victim).wait()

    local_stack.stop(running, on_progress=on_progress)
    assert not any(local_stack._is_there(child) for child in children)
    server.wait(5)


def test_what_is_gone_has_no_family_and_is_not_there(stack: Stack) -> None:
    server, _, _ = stack
    process = psutil.Process(server.pid)
    assert local_stack._is_there(process)
    server.kill()
    server.wait()
    assert local_stack._family(process) == [process]
    assert not local_stack._is_there(process)


@pytest.fixture
def crashed() -> Iterator[tuple[local_stack.Running, list[psutil.Process]]]:
    """A stack whose server was killed, and has left two processes."""
    mark = f"{local_stack._state_file()}:1"
    environment = {**os.environ, local_stack.STACK_VARIABLE: mark}
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, start_new_session=True, env=environment
    ) as server:
        assert server.stdout is not None
        left = [psutil.Process(int(server.stdout.readline())) for _ in range(2)]
        created_s = psutil.Process(server.pid).create_time()
        server.kill()
    running = local_stack.Running(server.pid, created_s, "", "quickstart", os.devnull, None, ("",), mark)
    local_stack._state_file().parent.mkdir(parents=True)
    local_stack._state_file().write_text(json.dumps(asdict(running)))
    yield running, left
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


Crashed = tuple[local_stack.Running, list[psutil.Process]]


class TestAfterACrash:
    def test_status_says_what_is_left(self, crashed: Crashed, capsys: pytest.CaptureFixture[str]) -> None:
        running, left = crashed
        assert local_stack.current() is None
        assert local_stack.last() == running
        assert {one.pid for one in local_stack.orphans(None)} == {process.pid for process in left}
        with pytest.raises(typer.Exit) as ended:
            commands.status()
        assert ended.value.exit_code == 1
        said = capsys.readouterr().err
        assert f"the server (pid {running.pid}) has ended by itself" in said
        assert "2 of its processes are left: `kvcache down` ends them" in said
        with pytest.raises(typer.Exit):
            commands.status(as_json=True)
        told = json.loads(capsys.readouterr().out)
        assert (told["running"], sorted(told["left"])) == (False, sorted(process.pid for process in left))

    def test_down_ends_what_is_left(self, crashed: Crashed, capsys: pytest.CaptureFixture[str]) -> None:
        _, left = crashed
        commands.down()
        assert not any(local_stack._is_there(process) for process in left)
        assert local_stack.last() is None
        assert "stopped" in capsys.readouterr().err
        commands.down()
        assert "nothing is running" in capsys.readouterr().err

    def test_down_needs_no_record_of_it(self, crashed: Crashed) -> None:
        _, left = crashed
        local_stack._state_file().unlink()
        commands.down()
        assert not any(local_stack._is_there(process) for process in left)

    def test_it_is_not_mixed_with_a_new_one(self, crashed: Crashed) -> None:
        with pytest.raises(ConfigError, match="2 processes of an earlier `kvcache up` are left: `kvcache down`"):
            local_stack.start(graph_only(free_port()), direct=False, on_progress=print)

    def test_a_stack_of_another_folder_is_nobodys(
        self, crashed: Crashed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("KVCACHE_HOME", str(tmp_path / "other"))
        assert local_stack.orphans(None) == []


def graph_only(port: int) -> dict[str, Any]:
    app = {"import_path": "serve_app.app:build_kvcache", "route_prefix": "/kvcache", "args": {"model": "m"}}
    return {"http_options": {"port": port}, "applications": [app]}


class TestAStartThatFails:
    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"http_options": {"port": "http"}, "applications": []}, "http_options.port is 'http'"),
            ({"applications": {}}, "`applications` must be a list of mappings"),
            ({"applications": [{"name": "x"}]}, "each with an `import_path`"),
        ],
    )
    def test_before_anything_was_started(self, config: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            local_stack.start(config, direct=False, on_progress=print)
        assert local_stack.last() is None

    @pytest.mark.parametrize("host", ["127.0.0.1", "::1", "no.such.host.invalid"])
    def test_where_it_cannot_listen(self, host: str) -> None:
        with socket.create_server(("::1" if host == "::1" else "127.0.0.1", 0), family=_family_of(host)) as taken:
            config = graph_only(taken.getsockname()[1])
            config["http_options"]["host"] = host
            with pytest.raises(ConfigError, match=f"port .* on {host} is taken"):
                local_stack.start(config, direct=False, on_progress=print)

    def test_leaves_nothing_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The server's own process is the real one; it gives up because Serve refuses the config."""
        monkeypatch.setenv("PYTHONPATH", str(Path(local_stack.__file__).parents[1]))
        config = graph_only(free_port())
        config["applications"] *= 2  # of one name
        with pytest.raises(
            local_stack.StackError, match=r"(?s)the server ended with status .*multiple configs for app"
        ):
            local_stack.start(config, direct=False, on_progress=print)
        assert local_stack.last() is None
        assert local_stack.orphans(None) == []


def _family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
