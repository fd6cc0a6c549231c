"""The `kvcache` command, run in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from serve_app import cli

Run = Callable[..., tuple[object, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, with its standard input -> its exit status, and what it said, as one line."""

    def run(*arguments: str, stdin: bytes = b"{}") -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["kvcache", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code, " ".join((said.out + said.err).split())

    return run
