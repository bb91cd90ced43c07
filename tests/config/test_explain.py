"""Where each value came from, and what is not shown."""

from __future__ import annotations

import tomllib
from pathlib import Path

from llamarunner.config.explain import HIDDEN, explain
from llamarunner.config.keys import every_key
from llamarunner.config.load import load_config

TEXT = """
[proxies.ollama]
api_key = "sk-secret"
[engines.other]
args = ["--api-key", "${KEY}", "--hf-token=sk-secret", "-v"]
[defaults]
keep_alive = -1
load_timeout = "90s"
[models."a.b"]
path = "m.gguf"
aliases = ["x", "y"]
[models."a.b".flags]
api-key = "sk-secret"
top-k = 5
[models."a.b".env]
HF_TOKEN = "sk-secret"
"""


def test_values_and_origins(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(TEXT)
    environ = {"LLAMARUNNER__SERVER__MAX_BODY": "1KiB", "KEY": "sk-secret"}
    loaded = load_config(file, environ=environ, overrides={"logging.level": "debug"}, validate_files=False)
    found = {each.key: (each.value, str(each.origin)) for each in explain(loaded)}
    assert found["tui.fps"] == ("15", "default")
    assert found["server.drain"] == ('"30s"', "default")
    assert found["server.max_body"] == ("1024", "LLAMARUNNER__SERVER__MAX_BODY")
    assert found["logging.level"] == ('"debug"', "command line")
    assert found["proxies.ollama.api_key"] == (HIDDEN, f"{file}:3")
    assert found["proxies.lmstudio.api_key"] == ("", "default")
    assert found['models."a.b".keep_alive'] == ("-1", f"{file}:7 (by defaults)")
    assert found['models."a.b".load_timeout'] == ('"1m30s"', f"{file}:8 (by defaults)")
    assert found['models."a.b".aliases'] == ('["x", "y"]', f"{file}:11")
    assert found['models."a.b".flags.top-k'] == ("5", f"{file}:14")
    assert found['models."a.b".flags.api-key'][0] == HIDDEN
    assert found['models."a.b".env.HF_TOKEN'][0] == HIDDEN
    assert found["engines.other.args"][0] == f'["--api-key", "{HIDDEN}", "--hf-token={HIDDEN}", "-v"]'
    assert "sk-secret" not in str(found)


def test_what_it_shows_is_toml_and_complete() -> None:
    loaded = load_config(Path(__file__).parents[2] / "config.toml.example", environ={})
    shown = {each.key: each.value for each in explain(loaded)}
    for value in shown.values():
        assert value == "" or tomllib.loads(f"value = {value}")
    plain = {".".join(map(str, path)) for path, _ in every_key() if path[0] not in ("engines", "models", "clients")}
    assert plain - shown.keys() == {"defaults.flags", "defaults.env"}  # tables with nothing in them
