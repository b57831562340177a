"""Runs Lua for Argo CD as Argo CD does: the same globals, the same libraries, the same reading of what comes back.

Written after `util/lua` of Argo CD 3.5. It offers scripts of argocd-cm the libraries base, package and table, and of os
only times; there is no string library. Its interpreter and ours both speak Lua 5.1.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lupa.lua51 import LuaRuntime, lua_type

from tests.testbed.paths import CHECKOUT

FOLDER = CHECKOUT / "gitops" / "argo-cd"
CUSTOMIZATIONS = FOLDER / "resource_customizations" / "sae-operator.dev"
ALLOWED = {
    "_G", "_VERSION", "assert", "collectgarbage", "dofile", "error", "getfenv", "getmetatable", "ipairs", "load",
    "loadfile", "loadstring", "module", "newproxy", "next", "os", "package", "pairs", "pcall", "print", "rawequal",
    "rawget", "rawset", "require", "select", "setfenv", "setmetatable", "table", "tonumber", "tostring", "type",
    "unpack", "xpcall",
}  # fmt: skip
SAFE_OS = {"time", "date"}
HEALTH = {"Unknown", "Progressing", "Suspended", "Healthy", "Degraded", "Missing"}


def health(script: str, resource: Mapping[str, Any]) -> dict[str, str]:
    """`status` and `message`, where there is one. A script that returns something else makes a resource Unknown."""
    answer = run(script, resource)
    assert isinstance(answer, dict), answer
    assert answer["status"] in HEALTH, answer
    assert set(answer) <= {"status", "message"}, answer
    return answer


def discover(script: str, resource: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The actions that are offered on a resource, by name; `disabled` is left out where it is false."""
    answer = run(script, resource)
    actions = {} if answer == [] else answer
    assert isinstance(actions, dict), answer
    return [
        {"name": name, **{key: value for key, value in (settings or {}).items() if value is not False}}
        for name, settings in sorted(actions.items())
    ]


def act(script: str, resource: Mapping[str, Any]) -> dict[str, Any]:
    """The resource as an action returns it; Argo CD patches the live one with the difference."""
    answer = run(script, resource)
    assert isinstance(answer, dict), answer
    return _like(answer, resource)


def run(script: str, resource: Mapping[str, Any]) -> Any:
    """What a script returns for `obj`, as JSON has it."""
    lua = LuaRuntime(unpack_returned_tuples=False)
    names: Any = lua.globals()
    for name in list(names):
        if name not in ALLOWED:
            names[name] = None
    for name in list(names.os):
        if name not in SAFE_OS:
            names.os[name] = None
    # Text has methods by a metatable of the string library.
    lua.execute("getmetatable('').__index = nil")
    # No nulls, as JSON's become nil.
    plain = json.loads(json.dumps(resource), object_hook=lambda d: {k: v for k, v in d.items() if v is not None})
    names.obj = lua.table_from(plain, recursive=True)
    names.actionParams = lua.table()
    return _json(lua.execute(script))


def _json(value: Any) -> Any:
    if lua_type(value) != "table":
        return int(value) if isinstance(value, float) and value.is_integer() else value
    keys = list(value)
    # Lua knows one kind of table; an empty one becomes a list.
    if keys == list(range(1, len(keys) + 1)):
        return [_json(value[key]) for key in keys]
    return {key: _json(value[key]) for key in keys}


def _like(new: Any, old: Any) -> Any:
    """`new`, with empty objects where an empty table stands for one."""
    if isinstance(old, Mapping) and new == []:
        return {}
    if isinstance(old, Mapping) and isinstance(new, dict):
        return {key: _like(value, old.get(key)) for key, value in new.items()}
    if isinstance(old, Sequence) and not isinstance(old, str) and isinstance(new, list):
        return [_like(value, old[i]) if i < len(old) else value for i, value in enumerate(new)]
    return new


def kinds() -> list[str]:
    return sorted(path.name for path in CUSTOMIZATIONS.iterdir())


def health_script(kind: str) -> str:
    return (CUSTOMIZATIONS / kind / "health.lua").read_text()


def discovery_script(kind: str) -> str:
    return (CUSTOMIZATIONS / kind / "actions" / "discovery.lua").read_text()


def action_scripts(kind: str) -> dict[str, str]:
    """Script of each action by its name."""
    files: list[Path] = sorted((CUSTOMIZATIONS / kind / "actions").glob("*/action.lua"))
    return {path.parent.name: path.read_text() for path in files}


def patched(resource: Mapping[str, Any], **spec: Any) -> dict[str, Any]:
    """A copy of a resource with fields of its spec set."""
    changed = copy.deepcopy(dict(resource))
    changed["spec"] |= spec
    return changed
