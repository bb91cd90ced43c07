"""What must hold between the parts of a configuration: names, references, addresses. And the look at the model files,
whose absence is a warning: a disk may be mounted later, and the other models can be served."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from llamarunner.config.keys import nearest_hint
from llamarunner.config.positions import KeyPath
from llamarunner.config.schema import Config, EngineConfig, ModelConfig, ProxyConfig, is_loopback
from llamarunner.config.values import PLACEHOLDERS

Finding = tuple[KeyPath, str]

_EMPTY_COMMAND = "is empty; write the name or path of a program, or leave the key out"
_NO_URL = 'is missing; write the server\'s address, such as "http://192.168.1.30:8080"'


def broken_rules(config: Config) -> Iterator[Finding]:
    yield from _names(config)
    yield from _engines(config)
    yield from _clients(config)
    yield from _addresses(config)
    for path, flags in _flag_tables(config):
        for name in flags:
            if name.startswith("-") or not name.strip():
                bare = name.lstrip("-") or "cache-type-k"
                yield (*path, name), f'a flag is written without its dashes; write "{bare}"'


def missing_files(config: Config) -> Iterator[Finding]:
    for name, model in config.models.items():
        engine = config.engines.get(model.engine)
        if engine is not None and not engine.reads_gguf:
            yield from _missing_anything(name, model)
            continue
        for key in ("path", "mmproj"):
            path = getattr(model, key)
            if path is None or os.path.isfile(path):  # pathlib's own raises for a folder we may not look into
                continue
            what = "this is a folder; name the .gguf file in it" if os.path.isdir(path) else "there is no such file"
            yield ("models", name, key), f"{what}: {path}"


def _missing_anything(name: str, model: ModelConfig) -> Iterator[Finding]:
    """A relative path is a name, and not of a file."""
    if model.path.is_absolute() and not os.path.exists(model.path):
        yield ("models", name, "path"), f"there is no such file or folder: {model.path}"


def _names(config: Config) -> Iterator[Finding]:
    """As the catalogue compares them: without case and without Ollama's default tag."""
    taken: dict[str, str] = {}
    claims: Iterator[tuple[str, KeyPath]] = itertools.chain(
        ((name, ("models", name)) for name in config.models),
        (
            (alias, ("models", name, "aliases", index))
            for name, model in config.models.items()
            for index, alias in enumerate(model.aliases)
        ),
    )
    for called, path in claims:
        key = called.strip().removesuffix(":latest").casefold()
        if not key or not called.isprintable():
            yield path, "a name needs a visible character, and no control characters"
        elif key in taken:
            why = "" if taken[key] == called else ' (case and ":latest" make no difference)'
            yield path, f'"{called}" is already the name of {taken[key]}{why}; choose another'
        else:
            owner = str(path[1])
            taken[key] = f'model "{owner}"' if called == owner else f'model "{owner}", as an alias'


def _engines(config: Config) -> Iterator[Finding]:
    settings = [(("defaults",), config.defaults), *((("models", name), model) for name, model in config.models.items())]
    for path, model in settings:
        if model.engine not in config.engines:
            message = f'there is no engine "{model.engine}"; {nearest_hint(model.engine, list(config.engines))}'
            yield (*path, "engine"), message
        for index, name in enumerate(model.also_on):
            if name not in config.engines:
                message = f'there is no engine "{name}"; {nearest_hint(name, list(config.engines))}'
                yield (*path, "also_on", index), message
    for name, engine in config.engines.items():
        for key, message in _engine(engine):
            yield ("engines", name, key), message
        if engine.is_remote and engine.url is not None and _is_ourselves(engine.url, config):
            yield ("engines", name, "url"), "is this program's own address; name another server's"


def _clients(config: Config) -> Iterator[Finding]:
    keys: dict[str, str] = {}
    for name, client in config.clients.items():
        if client.api_key is None and not client.addresses:
            yield ("clients", name), "nobody can be recognised by it; give it an api_key, or addresses"
        if client.api_key is None:
            continue
        key = client.api_key.get_secret_value()
        if not _can_be_header(key):
            yield (
                ("clients", name, "api_key"),
                "a key of visible ASCII characters is wanted; write one, or leave it out",
            )
        elif key in keys:
            yield ("clients", name, "api_key"), f'is the key of client "{keys[key]}" too; give each its own'
        keys[key] = name


def _engine(engine: EngineConfig) -> Iterator[tuple[str, str]]:
    if not engine.command.strip():
        yield "command", _EMPTY_COMMAND
    if engine.api_key is not None and not _can_be_header(engine.api_key.get_secret_value()):
        yield "api_key", "a key of visible ASCII characters is wanted; write one, or leave it out"
    if engine.is_remote:
        problem = _NO_URL if engine.url is None else url_problem(engine.url)
        if problem:
            yield "url", problem
        return
    if engine.url is not None:
        yield "url", f'only an engine of kind "remote" has one, and this one is of kind "{engine.kind}"'
    if engine.kind == "command":
        yield from _command_engine(engine)
    else:
        for key, texts in (("args", engine.args), ("env", list(engine.env.values()))):
            if names := _placeholders(texts):
                yield key, f'${{{names[0]}}} is filled in for engines of kind "command" alone'


def _command_engine(engine: EngineConfig) -> Iterator[tuple[str, str]]:
    if "command" not in engine.model_fields_set:
        yield "command", 'is missing; write the name or path of the program, such as "vllm"'
    in_args = _placeholders(engine.args)
    if "api_key" in in_args:
        yield "args", "every user of this machine can read a program's arguments; hand ${api_key} over in `env`"
    if "port" not in in_args + _placeholders(list(engine.env.values())):
        yield "args", 'the server must be told its port; write it as ${port}, such as ["--port", "${port}"]'
    if not engine.health.startswith("/") or not engine.health.isascii() or not engine.health.isprintable():
        yield "health", 'the path of an address is wanted, such as "/health"'


def _is_ourselves(url: str, config: Config) -> bool:
    """As far as the address alone can tell: our models would be listed as that server's, and theirs again as ours."""
    if url_problem(url):
        return False
    parts = urlsplit(url)
    ours = {proxy.port for proxy in (config.proxies.ollama, config.proxies.lmstudio) if proxy.enabled}
    return parts.port in ours and is_loopback(parts.hostname or "")


def _placeholders(texts: list[str]) -> list[str]:
    return [name for name in PLACEHOLDERS if any(f"${{{name}}}" in text for text in texts)]


def _can_be_header(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable() and " " not in key


def url_problem(url: str) -> str:
    """What is wrong with a server's address, without showing it: it may hold a password. Empty if nothing is."""
    if not url.isprintable() or " " in url:
        return "an address holds no spaces or control characters"
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        has_host = False
        parts = urlsplit("")
    if parts.username is not None or parts.password is not None:
        return "an address holds no name or password; write the key as api_key"
    if parts.scheme not in ("http", "https") or not has_host:
        return 'an address such as "http://192.168.1.30:8080" or "https://example.org/api/v1" is wanted'
    if parts.query or parts.fragment or "?" in url or "#" in url:
        return 'an address ends with its path: leave out what follows "?" or "#"'
    return ""


def _addresses(config: Config) -> Iterator[Finding]:
    proxies = {"ollama": config.proxies.ollama, "lmstudio": config.proxies.lmstudio}
    for name, proxy in proxies.items():
        if proxy.api_key is not None and not proxy.api_key.get_secret_value().strip():
            yield ("proxies", name, "api_key"), "an empty key protects nothing; write one, or leave it out"
        elif proxy.enabled and proxy.api_key is None and not config.server.allow_unauthenticated:
            host = config.proxy_host(proxy)
            if not is_loopback(host):
                path = ("proxies", name, "host") if proxy.host else ("server", "host")
                yield (
                    path,
                    (
                        f"anyone who reaches {host} could use the models through proxies.{name}; set "
                        f"proxies.{name}.api_key, or server.allow_unauthenticated = true if that is meant"
                    ),
                )
    if _collide(config, proxies["ollama"], proxies["lmstudio"]):
        port = proxies["ollama"].port
        yield ("proxies", "lmstudio", "port"), f"both proxies listen on port {port}; give each its own"


def _collide(config: Config, one: ProxyConfig, other: ProxyConfig) -> bool:
    if not (one.enabled and other.enabled and one.port and one.port == other.port):
        return False
    first, second = config.proxy_host(one), config.proxy_host(other)
    same_family = (":" in first) == (":" in second)
    return first == second or (same_family and bool({first, second} & {"0.0.0.0", "::"}))


def _flag_tables(config: Config) -> Iterator[tuple[KeyPath, dict[str, object]]]:
    yield ("defaults", "flags"), dict(config.defaults.flags)
    models: dict[str, ModelConfig] = config.models
    for name, model in models.items():
        yield ("models", name, "flags"), dict(model.flags)
