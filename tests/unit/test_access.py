"""Keys of the Score API: who has none gets nothing, who has one gets what it names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.access import Access, AccessDenied, check_admin, check_salt, hash_key, new_key, read_keys
from serve_app.errors import ConfigError

KEY = "of team a"


def write(path: Path, *entries: dict[str, Any]) -> str:
    """The keys file; a later one differs in time even where the clock is coarse."""
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump({"keys": list(entries)}))
    new.replace(path)
    return str(path)


def entry(name: str = "a", key: str = KEY, **more: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hash_key(key), **more}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [{}, bearer(""), bearer("other"), {"authorization": KEY}, {"authorization": "Basic " + KEY}, bearer("\xff")],
)
def test_no_known_key_is_401(tmp_path: Path, headers: dict[str, str]) -> None:
    access = Access(write(tmp_path / "keys", entry()))
    with pytest.raises(AccessDenied) as denied:
        access.caller(headers, 0)
    assert denied.value.status == 401
    assert access.caller(bearer(KEY), 0).name == "a"


def test_the_hash_of_a_key_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(AccessDenied):
        Access(write(tmp_path / "keys", entry())).caller(bearer(hash_key(KEY)), 0)


@pytest.mark.parametrize(
    ("salts", "body", "allowed"),
    [
        (["team-a"], {"cache_salt": "team-a"}, True),
        (["team-a"], {"cache_salt": "team-b"}, False),
        (["team-a"], {}, False),
        (["team-a"], {"cache_salt": ["team-a"]}, False),
        (["", "team-a"], {}, True),
        (None, {}, True),
        (None, {"cache_salt": "team-a"}, False),
        ("*", {"cache_salt": "any"}, True),
        (["*"], {"cache_salt": "any"}, False),
    ],
)
def test_only_the_salts_of_the_key(tmp_path: Path, salts: Any, body: dict[str, Any], allowed: bool) -> None:
    more = {} if salts is None else {"salts": salts}
    caller = Access(write(tmp_path / "keys", entry(**more))).caller(bearer(KEY), 0)
    if allowed:
        check_salt(caller, body)
        return
    with pytest.raises(AccessDenied) as denied:
        check_salt(caller, body)
    assert denied.value.status == 403


def test_pods_and_receipts_are_for_admins(tmp_path: Path) -> None:
    access = Access(write(tmp_path / "keys", entry(), entry("b", "admins", admin=True)))
    check_admin(access.caller(bearer("admins"), 0))
    with pytest.raises(AccessDenied) as denied:
        check_admin(access.caller(bearer(KEY), 0))
    assert denied.value.status == 403


def test_a_changed_file_counts_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    access = Access(write(path, entry()))
    assert access.caller(bearer(KEY), 0).name == "a"
    write(path, entry("b", "new"))
    assert access.caller(bearer("new"), 2).name == "b"
    with pytest.raises(AccessDenied):
        access.caller(bearer(KEY), 2)
    spoilers: tuple[Callable[[], object], ...] = (lambda: path.write_text("keys: ["), path.unlink)
    for number, spoil in enumerate(spoilers):
        spoil()
        with caplog.at_level(logging.ERROR):
            assert access.caller(bearer("new"), 4 + 2 * number).name == "b"  # neither open nor shut
        with pytest.raises(AccessDenied):
            access.caller({}, 4 + 2 * number)
    assert caplog.text.count("stay in force") == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "keys: [",
        "keys: [{name: a}]",
        "keys: [{name: a, sha256: short}]",
        f"keys: [{{name: a, sha256: {hash_key(KEY)}, salt: x}}]",
        f"keys: [{{name: a, sha256: {hash_key(KEY)}}}, {{name: a, sha256: {hash_key('b')}}}]",
        f"keys: [{{name: a, sha256: {hash_key(KEY)}}}, {{name: b, sha256: {hash_key(KEY)}}}]",
        "keys: !!python/object/apply:os.system ['true']",
        "[" * 20_000,
    ],
)
def test_a_bad_file_is_named_at_start(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"auth\.keys_file"):
        Access(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "missing")


def test_new_keys_are_long_and_differ() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert min(map(len, made)) >= 43  # 32 bytes


def test_without_a_file_everybody_may() -> None:
    access = Access("")
    assert access.is_open
    check_admin(access.caller({}, 0))
