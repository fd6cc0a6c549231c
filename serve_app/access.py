"""Who may ask the Score API what: keys in a file, compared in constant time, read again when the file changes.

The file is YAML, and holds no key, only its SHA-256 (a key is 32 random bytes, so nothing slower is needed):

    keys:
      - name: scheduler
        sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
        salts: ["", team-a]   # "" = prompts without a cache_salt; "*" instead of the list = every salt
        admin: true           # may read /v1/pods and /v1/receipts too, and see the page
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from serve_app.errors import ConfigError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "KVCACHE_API_KEY"
CHECK_EVERY_S = 1.0
KEYS_FILE_MAX_BYTES = 1 << 20
_SCHEME = "bearer "

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class Caller(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key's holder. The default for `salts` is what a client without a salt can see anyway."""

    name: Name
    sha256: Digest
    salts: list[str] | Literal["*"] = msgspec.field(default_factory=lambda: [""])
    admin: bool = False

    def may_ask(self, salt: object) -> bool:
        """Args: salt: `cache_salt` as it stands in the body; None where there is none."""
        return self.salts == "*" or ("" if salt is None else salt) in self.salts


class _KeysFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[Caller]


class AccessDenied(Exception):
    """`status` is 401 (no key, or an unknown one) or 403 (a known one that may not)."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


OPEN = Caller("anybody", "0" * 64, "*", True)
"""Everybody, where no keys are set."""


def read_keys(path: Path) -> list[Caller]:
    """The keys of a file.

    Raises:
        ConfigError: it cannot be read, or is not of the form above. The message holds nothing of its content but names.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(KEYS_FILE_MAX_BYTES + 1)
        if len(raw) > KEYS_FILE_MAX_BYTES:
            raise ConfigError(f"auth.keys_file {path} is longer than {KEYS_FILE_MAX_BYTES} bytes")
        keys = msgspec.convert(yaml.safe_load(raw), _KeysFile).keys
    except OSError as error:
        raise ConfigError(f"auth.keys_file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError) as error:  # its text would quote the file
        raise ConfigError(f"auth.keys_file {path} is not YAML ({type(error).__name__})") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"auth.keys_file {path}: {error}; see serve_app/access.py for its form") from error
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        if twice := next((key for key in keys if values.count(getattr(key, field)) > 1), None):
            raise ConfigError(f"auth.keys_file {path}: two keys have the {field} of {twice.name!r}")
    return keys


class Access:
    """The keys as the file has them now. A file that has become bad, or is gone, leaves the former keys in force.

    Args:
        keys_file: its path; "" means that everybody may ask everything.

    Raises:
        ConfigError: the file is bad at start.
    """

    def __init__(self, keys_file: str) -> None:
        self._path = Path(keys_file) if keys_file else None
        self._keys: list[Caller] = []
        self._version: tuple[int, ...] | None = None
        self._check_at_s = float("-inf")
        if self._path is not None:
            self._version = _version(self._path)
            self._keys = read_keys(self._path)

    @property
    def is_open(self) -> bool:
        return self._path is None

    def caller(self, headers: Mapping[str, str], now_s: float) -> Caller:
        """Who asks.

        Args:
            headers: of the request, with lower-case names.
            now_s: monotonic time.

        Raises:
            AccessDenied: keys are set, and the request has none of them.
        """
        if self._path is None:
            return OPEN
        self._refresh(self._path, now_s)
        given = headers.get("authorization", "")
        if not given.lower().startswith(_SCHEME):
            raise AccessDenied(401, "no_api_key", "this endpoint wants a key: Authorization: Bearer KEY")
        digest = hash_key(given[len(_SCHEME) :].strip())
        found = None
        for key in self._keys:  # all of them, so that the time does not tell which one is near
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None:
            raise AccessDenied(401, "invalid_api_key", "the key is not known here")
        return found

    def _refresh(self, path: Path, now_s: float) -> None:
        if now_s < self._check_at_s:
            return
        self._check_at_s = now_s + CHECK_EVERY_S
        version = _version(path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = read_keys(path)
        except ConfigError as error:
            logger.error("kvcache: %s; the keys that were read before stay in force", error)
        else:
            logger.info("kvcache: %d keys read from %s", len(self._keys), path)


def check_salt(caller: Caller, body: Mapping[str, Any]) -> None:
    """That the caller's key may ask about the salt in `body`.

    Raises:
        AccessDenied: it may not.
    """
    if not caller.may_ask(body.get("cache_salt")):
        raise AccessDenied(403, "salt_not_allowed", "this key may not ask about prompts with that cache_salt")


def check_admin(caller: Caller) -> None:
    """That the caller's key may see every pod and everybody's receipts.

    Raises:
        AccessDenied: it may not.
    """
    if not caller.admin:
        raise AccessDenied(403, "not_admin", "this key may ask for scores only; `admin: true` is missing")


def own_key_header() -> dict[str, str]:
    """The header of a client of ours. Its key stands in KVCACHE_API_KEY, not in an option, which `ps` would show."""
    key = os.environ.get(KEY_VARIABLE, "")
    return {"authorization": f"Bearer {key}"} if key else {}


def new_key() -> str:
    """A random key: 32 bytes in URL-safe base64."""
    return secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """SHA-256 in hexadecimal, as the file has it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _version(path: Path) -> tuple[int, ...] | None:
    """Changes whenever the file does; a mounted Kubernetes secret changes by a link."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
