"""How the layers of the configuration become one tree: overlaying, profiles, environment variables, inheritance.

Pure: takes parsed tables and gives tables, with the origin of each value beside them. Reads nothing.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llamarunner.config.keys import is_free_table, keys_at, nearest_hint, takes_text_only, type_at
from llamarunner.config.origin import Origin, Problem, dotted
from llamarunner.config.positions import KeyPath

Table = dict[str, Any]

BUILT_IN_PROFILES: Mapping[str, Table] = {
    "development": {"logging": {"level": "debug"}},
    "production": {"server": {"drain": "60s"}, "logging": {"level": "info"}},
    "testing": {
        "proxies": {"ollama": {"port": 0}, "lmstudio": {"port": 0}},
        "logging": {"file": False},
        "discovery": {"ollama": False, "lmstudio": False, "huggingface": False, "folders": []},
    },
}

VARIABLE_PREFIX = "LLAMARUNNER__"

_NOT_INHERITED = ("aliases", "inherits")


@dataclass(slots=True)
class Tree:
    """Tables laid over one another, and where each value (and table) came from."""

    data: Table = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def overlay(self, layer: Table, origin_of: Callable[[KeyPath], Origin]) -> None:
        """Put `layer` on top: tables merge, anything else replaces."""
        self._overlay(self.data, layer, (), origin_of)

    def _overlay(self, base: Table, layer: Table, path: KeyPath, origin_of: Callable[[KeyPath], Origin]) -> None:
        for key, value in layer.items():
            here = (*path, key)
            if not isinstance(value, dict):
                base[key] = value
                self.origins[here] = origin_of(here)
                continue
            if not isinstance(base.get(key), dict):
                base[key] = {}
                self.origins[here] = origin_of(here)
            self._overlay(base[key], value, here, origin_of)

    def table(self, key: str) -> Table:
        """A top-level table; empty where it is missing or no table."""
        found = self.data.get(key)
        return found if isinstance(found, dict) else {}

    def origin(self, path: KeyPath) -> Origin:
        """Of the value, or of the nearest table around it that was written."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, Origin())


def overlay_environment(tree: Tree, environ: Mapping[str, str]) -> list[Problem]:
    """Lay every `LLAMARUNNER__SECTION__KEY` over the tree. An empty variable counts as one that is not set."""
    problems = []
    for variable in sorted(environ):
        text = environ[variable]
        if not variable.upper().startswith(VARIABLE_PREFIX) or not text:
            continue
        path, trouble = _path_of_variable(variable[len(VARIABLE_PREFIX) :].split("__"), tree.data)
        if trouble:
            problems.append(Problem(variable, dotted(path), trouble))
            continue
        layer: Any = _value_of_variable(text, path)
        for key in reversed(path):
            layer = {key: layer}
        tree.overlay(layer, partial(Origin, "environment", variable))
    return problems


def _path_of_variable(parts: list[str], data: Table) -> tuple[tuple[str, ...], str]:
    """The key path a variable means, and why it means none ("" if it does).

    Upper case cannot say more than letters, digits and underscores, so names are compared by those alone:
    QWEN3_14B is the model "qwen3-14b".
    """
    path: tuple[str, ...] = ()
    table: Any = data
    for number, part in enumerate(parts):
        free = is_free_table(type_at(path))
        known = list(table) if free and isinstance(table, dict) else keys_at(path)
        same = [key for key in known if _letters(key) == _letters(part)]
        if free and path[-1] == "env":  # a variable of the engine: its name is its own, underscores and all
            return (*path, "__".join(parts[number:])), ""
        if len(same) > 1:
            return (*path, part), f"is ambiguous: it could be {' or '.join(same)}"
        if not part or (not same and not free):
            return (*path, part.lower()), f"is not a key of the configuration; {nearest_hint(part, known)}"
        key = same[0] if same else part.lower()
        if free and not same and path[-1] == "flags":
            key = key.replace("_", "-")
        path = (*path, key)
        table = table.get(key) if isinstance(table, dict) else None
    return path, ""


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name.casefold()).strip("_")


def _value_of_variable(text: str, path: KeyPath) -> Any:
    """A TOML value where the text is one, else the text. Where only text is wanted, 12345 is text too."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    if len(parsed) != 1 or (takes_text_only(type_at(path)) and not isinstance(parsed["value"], str)):
        return text
    return parsed["value"]


def resolve_inheritance(tree: Tree) -> tuple[Tree, dict[KeyPath, Problem]]:
    """The tree with every model whole: `[defaults]`, then the models it inherits from, then its own keys.

    And each `inherits` that leads nowhere, by its path.
    """
    models = tree.table("models")
    resolved = Tree({key: value for key, value in tree.data.items() if key != "profiles"}, dict(tree.origins))
    if not models:
        return resolved, {}
    resolved.data["models"] = {
        name: _whole_model(name, models, tree, resolved.origins) if isinstance(table, dict) else table
        for name, table in models.items()
    }
    return resolved, dict(_broken_links(models, tree))


def _whole_model(name: str, models: Table, tree: Tree, origins: dict[KeyPath, Origin]) -> Table:
    whole: Table = {}
    here: KeyPath = ("models", name)
    for source, path, via in _sources(name, models, tree.table("defaults")):
        for key, value in source.items():
            if key == "inherits" or (key in _NOT_INHERITED and via):
                continue
            merges = isinstance(value, dict) and isinstance(whole.get(key), dict)
            whole[key] = {**whole[key], **value} if merges else value
            if via:
                for below in [(key,), *((key, inner) for inner in value)] if isinstance(value, dict) else [(key,)]:
                    if origin := tree.origins.get((*path, *below)):
                        origins[(*here, *below)] = Origin(origin.kind, origin.name, origin.key, origin.line, via)
    origins.update((path, tree.origins[path]) for path in _written(here, models[name]) if path in tree.origins)
    return whole


def _written(path: KeyPath, table: Table) -> Iterator[KeyPath]:
    for key, value in table.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _written((*path, key), value)


def _sources(name: str, models: Table, defaults: Table) -> Iterator[tuple[Table, KeyPath, str]]:
    """What a model is made of, lowest first: (table, its path, how it is reached; "" for the model itself)."""
    chain = _chain(name, models)
    yield defaults, ("defaults",), "defaults"
    for ancestor in reversed(chain[1:]):
        yield models[ancestor], ("models", ancestor), ancestor
    yield models[name], ("models", name), ""


def _chain(name: str, models: Table) -> list[str]:
    """The model and its ancestors, as far as they exist and none comes twice."""
    chain: list[str] = []
    while name not in chain and isinstance(models.get(name), dict):
        chain.append(name)
        parent = models[name].get("inherits")
        if not isinstance(parent, str):
            break
        name = parent
    return chain


def _broken_links(models: Table, tree: Tree) -> Iterator[tuple[KeyPath, Problem]]:
    cycles_told: set[frozenset[str]] = set()
    for name, table in models.items():
        if not isinstance(table, dict) or "inherits" not in table:
            continue
        parent, path = table["inherits"], ("models", name, "inherits")
        origin = tree.origin(path)
        chain = _chain(name, models)
        if not isinstance(parent, str):
            yield path, Problem(origin.place, dotted(path), "the name of another model is wanted")
        elif parent not in models:
            others = [other for other in models if other != name]
            hint = nearest_hint(parent, others) if others else "there is no other model"
            yield path, Problem(origin.place, dotted(path), f'there is no model "{parent}"; {hint}')
        elif _closes(chain, models) == name and frozenset(chain) not in cycles_told:
            cycles_told.add(frozenset(chain))
            circle = " -> ".join([*chain, name])
            yield (
                path,
                Problem(origin.place, dotted(path), f"goes round in a circle: {circle}; one of them must stand alone"),
            )


def _closes(chain: list[str], models: Table) -> str | None:
    """The member of the chain its last one leads back to, if any."""
    parent = models[chain[-1]].get("inherits")
    return parent if isinstance(parent, str) and parent in chain else None
