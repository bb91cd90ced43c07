"""What must hold between the parts of a configuration: names, references, addresses. And the look at the model files,
whose absence is a warning: a disk may be mounted later, and the other models can be served."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

from llamarunner.config.keys import nearest_hint
from llamarunner.config.positions import KeyPath
from llamarunner.config.schema import Config, ModelConfig, ProxyConfig, is_loopback

Finding = tuple[KeyPath, str]


def broken_rules(config: Config) -> Iterator[Finding]:
    yield from _names(config)
    yield from _engines(config)
    yield from _addresses(config)
    for path, flags in _flag_tables(config):
        for name in flags:
            if name.startswith("-") or not name.strip():
                bare = name.lstrip("-") or "cache-type-k"
                yield (*path, name), f'a flag is written without its dashes; write "{bare}"'


def missing_files(config: Config) -> Iterator[Finding]:
    for name, model in config.models.items():
        for key in ("path", "mmproj"):
            path = getattr(model, key)
            if path is None or os.path.isfile(path):  # pathlib's own raises for a folder we may not look into
                continue
            what = "this is a folder; name the .gguf file in it" if os.path.isdir(path) else "there is no such file"
            yield ("models", name, key), f"{what}: {path}"


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
    for name, engine in config.engines.items():
        if not engine.command.strip():
            yield ("engines", name, "command"), "is empty; write the name or path of a program, or leave the key out"


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
