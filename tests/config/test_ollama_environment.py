"""Ollama's variables as a layer of the configuration."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.config.explain import explain
from llamarunner.config.load import LoadedConfig, load_config
from llamarunner.config.ollama_environment import ollama_settings, parse_host
from llamarunner.errors import ConfigError


def load(tmp_path: Path, environ: Mapping[str, str], text: str = "", **arguments: Any) -> LoadedConfig:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, environ=environ, validate_files=False, **arguments)


# --- OLLAMA_HOST ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1", "127.0.0.1", 11434), ("127.0.0.1:1", "127.0.0.1", 1), ("0.0.0.0", "0.0.0.0", 11434),
        (":11435", "0.0.0.0", 11435), ("localhost:", "localhost", None), ("box.lan", "box.lan", 11434),
        ("http://box.lan", "box.lan", 80), ("https://box.lan", "box.lan", 443), ("HTTP://box.lan", "box.lan", 80),
        ("http://box.lan:11434/", "box.lan", 11434), ("http://box.lan/ollama", "box.lan", 80),
        ("::1", "::1", 11434), ("[::1]", "::1", 11434), ("[::1]:80", "::1", 80), ("http://[::1]:80", "::1", 80),
        ("::", "::", 11434), ("http://", "127.0.0.1", 80), ("0", "0", 11434), ("box:0", "box", 0),
        ("ftp://box", None, None), ("box:port", None, None), ("box:65536", None, None), ("box:-1", None, None),
        ("[::1", None, None), ("[::1]x", None, None), ("box:1٣", None, None),
    ],
)  # fmt: skip
def test_hosts(text: str, host: str | None, port: int | None) -> None:
    if host is None or port is None:
        with pytest.raises(ValueError, match="is no"):
            parse_host(text)
    else:
        assert parse_host(text) == (host, port)


ADDRESS = st.ip_addresses().map(str) | st.from_regex(r"[a-z][a-z0-9-]{0,10}(\.[a-z]{2,5})?", fullmatch=True)


@given(ADDRESS, st.integers(0, 65535), st.sampled_from(["", "http://", "https://"]), st.sampled_from(["", "/", "/x"]))
def test_every_address_with_a_port_is_found_again(host: str, port: int, scheme: str, path: str) -> None:
    written = f"[{host}]" if ":" in host else host
    assert parse_host(f"{scheme}{written}:{port}{path}") == (host, port)


@given(st.text(max_size=30))
def test_no_text_makes_it_fall(text: str) -> None:
    try:
        host, port = parse_host(text)
    except ValueError:
        return
    assert host
    assert 0 <= port <= 65535


@given(st.ip_addresses(v=6))
def test_bare_ipv6(address: ipaddress.IPv6Address) -> None:
    assert parse_host(str(address)) == (str(address), 11434)


# --- each variable -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("OLLAMA_HOST", "127.0.0.1:11500", "proxies.ollama.port", 11500),
        ("OLLAMA_HOST", ' "localhost" ', "proxies.ollama.host", "localhost"),
        ("OLLAMA_ORIGINS", "http://a, chrome-extension://*,", "proxies.ollama.cors_origins",
         ["http://a", "chrome-extension://*"]),
        ("OLLAMA_KEEP_ALIVE", "10m", "defaults.keep_alive", 600),
        ("OLLAMA_KEEP_ALIVE", "90", "defaults.keep_alive", 90),
        ("OLLAMA_KEEP_ALIVE", "-1", "defaults.keep_alive", math.inf),
        ("OLLAMA_KEEP_ALIVE", "0", "defaults.keep_alive", 0),
        ("OLLAMA_KEEP_ALIVE", "-1m", "defaults.keep_alive", math.inf),
        ("OLLAMA_LOAD_TIMEOUT", "90s", "defaults.load_timeout", 90),
        ("OLLAMA_LOAD_TIMEOUT", "0", "defaults.load_timeout", math.inf),
        ("OLLAMA_NUM_PARALLEL", "4", "defaults.parallel", 4), ("OLLAMA_NUM_PARALLEL", "0", "defaults.parallel", 1),
        ("OLLAMA_MAX_LOADED_MODELS", "2", "scheduler.max_loaded", 2),
        ("OLLAMA_MAX_QUEUE", "64", "scheduler.max_queue", 64),
        ("OLLAMA_CONTEXT_LENGTH", "32768", "defaults.context", 32768),
        ("OLLAMA_CONTEXT_LENGTH", "0", "defaults.context", 8192),
        ("OLLAMA_FLASH_ATTENTION", "1", "defaults.flags", {"flash-attn": True}),
        ("OLLAMA_FLASH_ATTENTION", "false", "defaults.flags", {"flash-attn": "off"}),
        ("OLLAMA_KV_CACHE_TYPE", "q8_0", "defaults.flags", {"cache-type-k": "q8_0", "cache-type-v": "q8_0"}),
        ("OLLAMA_GPU_OVERHEAD", "1073741824", "scheduler.gpu_reserve", 1024**3),
        ("OLLAMA_GPU_OVERHEAD", "0", "scheduler.gpu_reserve", 512 * 1024**2),
        ("OLLAMA_SCHED_SPREAD", "1", "scheduler.spread", True),
        ("OLLAMA_SCHED_SPREAD", "False", "scheduler.spread", False),
        ("OLLAMA_DEBUG", "1", "logging.level", "debug"), ("OLLAMA_DEBUG", "2", "logging.level", "debug"),
        ("OLLAMA_DEBUG", "true", "logging.level", "debug"), ("OLLAMA_DEBUG", "0", "logging.level", "info"),
        ("OLLAMA_DEBUG", "", "logging.level", "info"), ("OLLAMA_NOPRUNE", "1", "logging.level", "info"),
    ],
)  # fmt: skip
def test_each_variable(tmp_path: Path, variable: str, text: str, key: str, value: object) -> None:
    loaded = load(tmp_path, {variable: text})
    found: Any = loaded.config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert all(origin.place == variable for origin in loaded.origins.values())


@pytest.mark.parametrize(
    ("variable", "text", "problem"),
    [
        ("OLLAMA_HOST", "box:port", 'OLLAMA_HOST: "port" is no port: a number up to 65535 is wanted'),
        ("OLLAMA_KEEP_ALIVE", "5x", 'OLLAMA_KEEP_ALIVE: time: unknown unit "x" in duration "5x"'),
        ("OLLAMA_NUM_PARALLEL", "-1", 'OLLAMA_NUM_PARALLEL: "-1" is no whole number'),
        ("OLLAMA_NUM_PARALLEL", "900",
         "OLLAMA_NUM_PARALLEL: defaults.parallel: a number of at most 256 is wanted; found 900"),
        ("OLLAMA_SCHED_SPREAD", "maybe", 'OLLAMA_SCHED_SPREAD: "maybe" is neither true nor false: 1 or 0 is wanted'),
        ("OLLAMA_HOST", "0.0.0.0",
         "OLLAMA_HOST: proxies.ollama.host: anyone who reaches 0.0.0.0 could use the models through proxies.ollama; "
         "set proxies.ollama.api_key, or server.allow_unauthenticated = true if that is meant; where OLLAMA_HOST is "
         "meant for clients alone, proxies.ollama.host says where to listen"),
    ],
)  # fmt: skip
def test_mistakes_are_told_like_others(tmp_path: Path, variable: str, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {variable: text})
    assert caught.value.problems == (problem,)


# --- among the other layers ----------------------------------------------------------------------------------------


def test_what_is_written_for_us_wins(tmp_path: Path) -> None:
    environ = {"OLLAMA_HOST": "0.0.0.0:1", "OLLAMA_KEEP_ALIVE": "1m", "OLLAMA_NUM_PARALLEL": "2", "OLLAMA_DEBUG": "1",
               "OLLAMA_MAX_QUEUE": "9", "LLAMARUNNER__DEFAULTS__PARALLEL": "3"}  # fmt: skip
    text = """
        [proxies.ollama]
        host = "127.0.0.1"
        [models.a]
        path = "a.gguf"
        keep_alive = "2m"
        [models.b]
        path = "b.gguf"
        [profiles.quiet.logging]
        level = "error"
    """
    loaded = load(tmp_path, environ, text, profile="quiet", overrides={"scheduler.max_queue": 8})
    config = loaded.config
    assert (config.proxies.ollama.host, config.proxies.ollama.port) == ("127.0.0.1", 1)
    assert (config.models["a"].keep_alive, config.models["b"].keep_alive) == (120, 60)
    assert (config.models["a"].parallel, config.logging.level, config.scheduler.max_queue) == (3, "error", 8)
    shown = {each.key: str(each.origin) for each in explain(loaded)}
    assert shown["proxies.ollama.port"] == "OLLAMA_HOST"
    assert shown["models.b.keep_alive"] == "OLLAMA_KEEP_ALIVE (by defaults)"
    assert shown["defaults.parallel"] == "LLAMARUNNER__DEFAULTS__PARALLEL"
    assert shown["logging.level"].endswith("(profile quiet)")


def test_without_ollamas_dialect_they_mean_nothing(tmp_path: Path) -> None:
    environ = {"OLLAMA_HOST": "nonsense:", "OLLAMA_KEEP_ALIVE": "1m"}
    assert load(tmp_path, environ, "proxies.ollama.enabled = false").config.defaults.keep_alive == 300


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ('defaults.flags.flash-attn = "auto"', {"flash-attn": "auto", "cache-type-k": "q8_0", "cache-type-v": "q8_0"}),
        ('defaults.flags.fa = "auto"', {"fa": "auto", "cache-type-k": "q8_0", "cache-type-v": "q8_0"}),
        ('[models.a]\npath = "a"\nflags = { ctk = "f16" }', {"flash-attn": True, "cache-type-v": "q8_0"}),
        ('[engines.e]\nkind = "command"\ncommand = "x"\nargs = ["${port}"]', {}),
    ],
)
def test_flags_only_where_they_do_no_harm(tmp_path: Path, text: str, flags: dict[str, Any]) -> None:
    environ = {"OLLAMA_FLASH_ATTENTION": "1", "OLLAMA_KV_CACHE_TYPE": "q8_0"}
    assert load(tmp_path, environ, text).config.defaults.flags == flags


@given(st.dictionaries(st.sampled_from(["OLLAMA_HOST", "OLLAMA_ORIGINS", "OLLAMA_KEEP_ALIVE", "OLLAMA_LOAD_TIMEOUT",
                                        "OLLAMA_NUM_PARALLEL", "OLLAMA_DEBUG", "OLLAMA_FLASH_ATTENTION"]),
                       st.text(max_size=12)))  # fmt: skip
def test_any_value_is_taken_or_told(environ: dict[str, str]) -> None:
    settings, problems = ollama_settings(environ, {})
    assert {setting.variable for setting in settings}.isdisjoint(problem.place for problem in problems)
    assert {problem.place for problem in problems} <= environ.keys()
