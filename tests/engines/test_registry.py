from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llamarunner.catalog.catalog import Model
from llamarunner.config.schema import Config, EngineConfig, ModelSettings
from llamarunner.engines import builtin
from llamarunner.engines.registry import make_engines
from llamarunner.errors import EngineMissingError


def kinds(**engines: EngineConfig) -> dict[str, str]:
    return {name: engine.kind for name, engine in make_engines(Config(engines=engines)).items()}


def test_which_engine_auto_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "my-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    engines = {"default": EngineConfig(command=str(program)), "other": EngineConfig(command="no-such-llama-server")}
    assert kinds(**engines) == {"default": "llama-server", "other": "builtin"}
    monkeypatch.setattr(builtin, "is_installed", lambda: False)
    assert kinds(**engines) == {"default": "llama-server", "other": "auto"}


def test_a_kind_that_is_named_is_that_kind() -> None:
    server = EngineConfig(kind="llama-server", command="no-such-llama-server")
    assert kinds(default=server, b=EngineConfig(kind="builtin")) == {"default": "llama-server", "b": "builtin"}


def test_nothing_to_run_models_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "is_installed", lambda: False)
    engine = make_engines(Config(engines={"default": EngineConfig(command="no-such-llama-server")}))["default"]
    info = engine.info()
    assert (info.name, info.kind) == ("default", "auto")
    assert "no-such-llama-server" in info.problem
    assert "llamarunner[builtin]" in info.hint
    with pytest.raises(EngineMissingError, match="neither") as caught:
        engine.plan(Model("m", Path("/m.gguf"), ModelSettings()), port=1, api_key="k")
    assert caught.value.hint == info.hint


def test_llama_cpp_is_never_loaded_into_our_process() -> None:
    script = (
        "import sys; from llamarunner.config.schema import Config;"
        "from llamarunner.engines.registry import make_engines;"
        "[engine.info() for engine in make_engines(Config()).values()];"
        "assert not {'xllamacpp', 'gguf', 'numpy', 'tui', 'textual', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
