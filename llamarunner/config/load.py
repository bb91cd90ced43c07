"""Find, read and merge the configuration: defaults < Ollama's variables < file < profile < environment < command line.

Everything that is wrong is found in one pass and raised as one ConfigError, each problem with its place.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llamarunner import paths
from llamarunner.config import rules, shape
from llamarunner.config.keys import nearest_hint
from llamarunner.config.merge import BUILT_IN_PROFILES, Table, Tree, overlay_environment, resolve_inheritance
from llamarunner.config.ollama_environment import FOR_CLIENTS, HOST, ollama_settings
from llamarunner.config.origin import Kind, Origin, Problem, dotted
from llamarunner.config.positions import KeyPath, locate
from llamarunner.config.schema import Config
from llamarunner.errors import ConfigError

_MAX_BYTES = 10 * 1024**2  # a configuration of 10,000 models is 2 MB
_MAX_DEPTH = 20  # the schema needs 5; what follows may then recurse without fear
_AT_LINE = re.compile(r"\s*\(at line (\d+), column (\d+)\)$")


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """`path` is None where there is no file, `profile` "" where none was chosen. `origins` has each value that is not
    a default by its dotted key. `warnings` are problems the program can start with."""

    config: Config
    path: Path | None = None
    profile: str = ""
    origins: Mapping[str, Origin] = field(default_factory=lambda: MappingProxyType({}))
    warnings: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class _File:
    """A parsed file and the line of each of its keys. An empty name stands for no file."""

    name: str = ""
    data: Table = field(default_factory=dict)
    lines: Mapping[KeyPath, int] = field(default_factory=dict)


def load_config(
    file: Path | None = None,
    *,
    profile: str | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, object] = MappingProxyType({}),
    validate_files: bool = True,
) -> LoadedConfig:
    """Load `file`, or what LLAMARUNNER_CONFIG names, or the user's own file if there is one.

    `overrides` are the command line's, by dotted key. Without `validate_files` nothing is said of model files that are
    missing. Raises ConfigError with every problem there is.
    """
    path = _find(file, environ)
    source = _read(path) if path else _File()
    chosen = profile if profile is not None else environ.get("LLAMARUNNER_PROFILE", "")
    tree, problems = _merge(source, chosen, environ, overrides)
    whole, broken_links = resolve_inheritance(tree)
    problems += broken_links.values()
    context = {"base": path.parent.absolute() if path else Path.cwd(), "environ": environ}

    config, wrong = shape.validate(whole.data, context)
    findings = _apart_from(wrong, rules.broken_rules(config))
    missing = _apart_from(wrong, rules.missing_files(config)) if validate_files else []
    inherited = {(*path[:-1], "path") for path in broken_links}  # they would be there if the link held
    findings += [(path, message) for path, message in wrong.items() if path not in inherited]
    problems += [_problem(path, message, whole, source) for path, message in findings]
    problems += _problems_of_other_profiles(source, chosen, context)
    warnings = [_problem(path, message, whole, source) for path, message in missing]
    if problems:
        raise _refusal(source.name, [*problems, *warnings])
    origins = {dotted(key): origin for key, origin in whole.origins.items() if key[0] != "profiles"}
    return LoadedConfig(config, path, chosen, MappingProxyType(origins), tuple(dict.fromkeys(warnings)))


def _find(file: Path | None, environ: Mapping[str, str]) -> Path | None:
    if file is None and (named := environ.get("LLAMARUNNER_CONFIG")):
        file = Path(os.path.expanduser(named))
    if file is not None:
        return file
    usual = paths.config_file()
    return usual if os.path.lexists(usual) else None


def _read(path: Path) -> _File:
    text = _text_of(path)
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: arrays and tables are nested too deeply to be read") from None
    except ValueError as error:
        raise _syntax_error(path, text, error) from None
    if _is_deeper_than(data, _MAX_DEPTH):
        raise ConfigError(f"{path}: tables are nested more than {_MAX_DEPTH} deep; no key lies that far down")
    return _File(str(path), data, locate(text))


def _text_of(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise ConfigError(f"{path} is {kind}", hint="name a file such as config.toml")
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        hint = "`llamarunner init` writes one; without any the defaults apply"
        raise ConfigError(f"there is no configuration file {path}", hint=hint) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{path} cannot be read: {reason}") from None
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than 10 MiB", hint="is it a configuration at all?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _one_problem(Problem(f"{path}:{line}", "", "is not UTF-8 text; save it in that encoding")) from None


def _syntax_error(path: Path, text: str, error: ValueError) -> ConfigError:
    """`tomllib` ends its message with the place, or with "(at end of document)"."""
    reason = str(error)
    if match := _AT_LINE.search(reason):
        line, reason = int(match[1]), f"{reason[: match.start()]} (column {match[2]})"
    else:
        line = text.count("\n") + (not text.endswith("\n"))
    return _one_problem(Problem(f"{path}:{max(line, 1)}", "", f"is not valid TOML: {reason}"))


def _one_problem(problem: Problem) -> ConfigError:
    return ConfigError("the configuration cannot be read", problems=[str(problem)])


def _is_deeper_than(data: object, limit: int) -> bool:
    level: list[object] = [data]
    for _ in range(limit):
        below = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level = [inner for parts in below for inner in parts]
    return bool(level)


def _merge(
    source: _File, profile: str, environ: Mapping[str, str], overrides: Mapping[str, object]
) -> tuple[Tree, list[Problem]]:
    tree, problems = Tree(), []

    def written(prefix: KeyPath) -> Callable[[KeyPath], Origin]:
        kind: Kind = "profile" if prefix else "file"
        return lambda key: Origin(kind, source.name, (*prefix, *key), source.lines.get((*prefix, *key), 0))

    tree.overlay(source.data, written(()))
    if profile:
        own = source.data.get("profiles")
        own = own.get(profile) if isinstance(own, dict) else None
        if profile not in BUILT_IN_PROFILES and own is None:
            known = sorted({*BUILT_IN_PROFILES, *_profile_names(source)})
            raise ConfigError(f'there is no profile "{profile}"', hint=nearest_hint(profile, known))
        tree.overlay(dict(BUILT_IN_PROFILES.get(profile, {})), partial(Origin, "profile", profile))
        if isinstance(own, dict):
            tree.overlay(own, written(("profiles", profile)))
    problems += overlay_environment(tree, environ)
    for key, value in overrides.items():
        layer: Any = value
        for part in reversed(key.split(".")):
            layer = {part: layer}
        tree.overlay(layer, partial(Origin, "command line", ""))
    return _over_ollama(tree, environ, problems), problems


def _over_ollama(tree: Tree, environ: Mapping[str, str], problems: list[Problem]) -> Tree:
    """The tree laid over what Ollama's variables set; their mistakes join `problems`."""
    settings, wrong = ollama_settings(environ, tree.data)
    problems += wrong
    if not settings:
        return tree
    whole = Tree()
    for setting in settings:
        layer: Any = setting.value
        for key in reversed(setting.path):
            layer = {key: layer}
        whole.overlay(layer, partial(Origin, "environment", setting.variable))
    whole.overlay(tree.data, tree.origins.__getitem__)
    return whole


def _profile_names(source: _File) -> list[str]:
    profiles = source.data.get("profiles")
    return list(profiles) if isinstance(profiles, dict) else []


def _problems_of_other_profiles(source: _File, chosen: str, context: Mapping[str, Any]) -> list[Problem]:
    """A mistake in a profile shows before the day it is first used. Keys a profile need not have are not missed."""
    problems = []
    if "profiles" in source.data and not isinstance(source.data["profiles"], dict):
        return [_problem(("profiles",), "tables such as [profiles.NAME] are wanted", Tree(), source)]
    for name in _profile_names(source):
        profile, prefix = source.data["profiles"][name], ("profiles", name)
        if not isinstance(profile, dict):
            problems.append(_problem(prefix, "a table is wanted", Tree(), source))
        elif name != chosen:
            tree = Tree(profile)
            whole, _ = resolve_inheritance(tree)
            _, wrong = shape.validate(whole.data, context)
            problems += [
                _problem((*prefix, *path), message, Tree(), source)
                for path, message in wrong.items()
                if not message.startswith(shape.MISSING)
            ]
        if isinstance(profile, dict) and "profiles" in profile:
            problems.append(_problem((*prefix, "profiles"), "a profile holds no profiles of its own", Tree(), source))
    return problems


def _apart_from(wrong: Mapping[KeyPath, str], findings: Iterable[rules.Finding]) -> list[rules.Finding]:
    """Findings that do not merely follow from a value that was wrong and left out."""

    def follows(path: KeyPath) -> bool:
        related = (path, ("proxies", path[1], "api_key")) if path[0] == "proxies" else (path,)
        # of an array with a wrong element nothing is left
        left_out = {bad[:-1] if isinstance(bad[-1], int) else bad for bad in wrong}
        return any(key[: len(bad)] == bad for bad in left_out for key in related)

    return [(path, message) for path, message in findings if not follows(path)]


def _problem(path: KeyPath, message: str, tree: Tree, source: _File) -> Problem:
    """At the place the value was written: an inherited mistake is one mistake, where it was made."""
    known = path
    while known and known not in tree.origins:
        known = known[:-1]
    origin = tree.origins.get(known, Origin("file" if source.name else "default", source.name))
    key = (*origin.key, *path[len(known) :])
    line = 0
    if origin.kind in ("file", "profile") and origin.name == source.name:
        line = next((found for end in range(len(key), 0, -1) if (found := source.lines.get(key[:end]))), 0)
    place = f"{source.name}:{line}" if line else origin.place
    if place == HOST:
        message += f"; {FOR_CLIENTS}"
    return Problem(place, dotted(key), message)


def _refusal(name: str, problems: Iterable[Problem]) -> ConfigError:
    lines = [str(problem) for problem in sorted(dict.fromkeys(problems), key=_by_line)]
    count = f"{len(lines)} problems" if len(lines) > 1 else "a problem"
    return ConfigError(f"{name or 'the configuration'} has {count}", problems=lines)


def _by_line(problem: Problem) -> tuple[str, int]:
    place, _, line = problem.place.rpartition(":")
    return (place, int(line)) if line.isdigit() else (problem.place, 0)
