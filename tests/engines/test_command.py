"""Engines of kind "command": from the configuration's words to a command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.catalog.stores import discover
from llamarunner.config.load import LoadedConfig, load_config
from llamarunner.config.schema import EngineConfig, ModelSettings
from llamarunner.engines.command import CommandEngine
from llamarunner.engines.engine import LaunchPlan
from llamarunner.engines.registry import make_engines
from llamarunner.errors import ConfigError, EngineMissingError, UnsupportedError

SERVE = "[engines.v]\nkind = 'command'\ncommand = 'x'\nargs = ['--port', '${port}']\n"


def load(folder: Path, text: str, **environ: str) -> LoadedConfig:
    file = folder / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, environ=environ)


def problems(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return "\n".join(caught.value.problems)


def plan(args: list[str], model: Model | None = None, **config: Any) -> LaunchPlan:
    engine = CommandEngine("v", EngineConfig(kind="command", command=sys.executable, args=args, **config))
    return engine.plan(model or a_model(), port=4001, api_key="fresh-key")


def a_model(name: str = "qwen", path: str = "Qwen/Qwen3-8B", **settings: Any) -> Model:
    return Model(name, Path(path), ModelSettings(engine="v", **settings))


class TestPlan:
    def test_all_is_filled_in(self) -> None:
        args = [
            "serve",
            "${model}",
            "--port=${port}",
            "--name",
            "${name}",
            "-c${context}x${parallel}",
            "$port",
            "{port}",
        ]
        model = a_model(context=1000, parallel=3, flags={"enforce_eager": True, "no": False, "dtype": "half"})
        made = plan(args, model, health="/ping")
        expected = ["serve", "Qwen/Qwen3-8B", "--port=4001", "--name", "qwen", "-c1000x3", "$port", "{port}"]
        assert made.argv == (sys.executable, *expected, "--enforce_eager", "--dtype", "half")
        assert (made.port, made.health_path, made.base_url) == (4001, "/ping", "http://127.0.0.1:4001")
        assert not made.is_llama_cpp

    def test_a_model_named_like_a_placeholder_is_not_filled_in_again(self) -> None:
        assert plan(["${name}", "${port}"], a_model("${port} ${api_key}")).argv[1:] == ("${port} ${api_key}", "4001")

    def test_a_key_only_where_it_is_asked_for(self) -> None:
        without = plan(["${port}"], env={"A": "b"})
        assert (without.api_key, without.headers, dict(without.env)) == ("", {}, {"A": "b"})
        asked = plan(["${port}"], env={"VLLM_API_KEY": "${api_key}"})
        assert asked.headers == {"Authorization": "Bearer fresh-key"}
        assert asked.env["VLLM_API_KEY"] == "fresh-key"
        its_own = plan(["${port}"], env={"K": "${api_key}"}, api_key="its-own")
        assert (its_own.api_key, its_own.env["K"]) == ("its-own", "its-own")
        assert plan(["${port}"], api_key="its-own").headers == {"Authorization": "Bearer its-own"}
        assert "fresh-key" not in repr(asked)
        assert "its-own" not in repr(its_own)

    def test_the_models_environment_is_over_the_engines(self) -> None:
        assert plan(["${port}"], a_model(env={"A": "model"}), env={"A": "engine", "B": "b"}).env == {
            "A": "model",
            "B": "b",
        }

    @pytest.mark.parametrize(
        ("args", "served"),
        [
            (["--model", "${model}", "--port", "${port}"], "Qwen/Qwen3-8B"),
            (["${model}", "--served-model-name", "${name}", "${port}"], "qwen"),
            (["--config", "tabby.yml", "${port}"], ""),
        ],
    )
    def test_what_the_server_calls_the_model(self, args: list[str], served: str) -> None:
        assert plan(args).served_model == served

    def test_its_port_is_not_the_models_to_set(self) -> None:
        with pytest.raises(UnsupportedError, match="'port' cannot be set") as caught:
            plan(["${port}"], a_model(flags={"port": 5}))
        assert "engines.v.args" in caught.value.hint

    def test_a_program_that_is_not_there(self) -> None:
        engine = CommandEngine("v", EngineConfig(kind="command", command="no-such-vllm", args=["${port}"]))
        info = engine.info()
        assert "no-such-vllm is not found" in info.problem
        with pytest.raises(EngineMissingError) as caught:
            engine.plan(a_model(), port=1, api_key="k")
        assert (caught.value.message, caught.value.hint) == (info.problem, info.hint)

    def test_its_program_is_not_run_to_tell_its_version(self, tmp_path: Path) -> None:
        program = tmp_path / "serve"
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
        program.chmod(0o755)
        info = CommandEngine("v", EngineConfig(kind="command", command=str(program))).info()
        assert (info.command, info.problem, info.version) == (str(program), "", "")
        assert not (tmp_path / "was-run").exists()


class TestConfiguration:
    def test_what_is_filled_in_later_survives_loading(self, tmp_path: Path) -> None:
        text = (
            "[engines.v]\nkind = 'command'\ncommand = '${WHERE}/x'\n"
            "args = ['${port}', '${model}', '${name}', '${context}', '${parallel}', '${MINE}', '${port:-80}']\n"
            "env = { KEY = '${api_key}', MINE = '${MINE}' }"
        )
        config = load(tmp_path, text, MINE="m", WHERE="/opt").config
        engine = config.engines["v"]
        assert engine.command == "/opt/x"
        assert engine.args == ["${port}", "${model}", "${name}", "${context}", "${parallel}", "m", "80"]
        assert engine.env == {"KEY": "${api_key}", "MINE": "m"}
        made = make_engines(config)["v"]
        assert (made.kind, made.is_local) == ("command", True)

    @pytest.mark.parametrize(
        ("table", "words"),
        [
            ("command = 'x'\nargs = ['--port', '8000']", "args: the server must be told its port"),
            ("command = 'x'", "args: the server must be told its port"),
            ("args = ['${port}']", "command: is missing"),
            ("command = 'x'\nargs = ['${prot}', '${port}']", "did you mean ${port}?"),
            ("command = 'x'\nargs = ['${Model}', '${port}']", "did you mean ${model}?"),
            ("command = 'x'\nargs = ['${port}']\nenv = { A = '${apikey}' }", "did you mean ${api_key}?"),
            ("command = 'x'\nargs = ['${port}', '${NOPE}']", "NOPE is not set"),
            ("command = 'x'\nargs = ['${port}', '--key=${api_key}']", "args: every user of this machine can read"),
            ("command = 'x'\nargs = ['${port}']\nhealth = 'health'", "health: the path of an address is wanted"),
            ("command = 'x'\nargs = ['${port}']\nhealth = '/a\\nb'", "health: the path of an address is wanted"),
            ("command = 'x'\nargs = ['${port}']\nurl = 'http://h'", 'url: only an engine of kind "remote" has one'),
            ("command = 'x'\nargs = ['${port}']\napi_key = ''", "api_key: a key of visible ASCII"),
        ],
    )
    def test_what_is_wrong_is_told(self, tmp_path: Path, table: str, words: str) -> None:
        table = table.replace("'/a\\nb'", '"/a\\nb"')
        found = problems(tmp_path, f"[engines.v]\nkind = 'command'\n{table}")
        assert words in found
        assert len(found.splitlines()) == 1

    def test_other_kinds_have_nothing_filled_in(self, tmp_path: Path) -> None:
        assert "engines.v.args: ${port} is filled in" in problems(tmp_path, "[engines.v]\nargs = ['${port}']")
        assert "engines.v.env: ${name} is" in problems(tmp_path, "[engines.v]\nkind='builtin'\nenv = { A = '${name}' }")


class TestModels:
    def test_which_paths_are_names(self, tmp_path: Path) -> None:
        models = {
            "hub": "Qwen/Qwen3-8B",
            "dotted": "./Qwen/Qwen3-8B",
            "folder": "Qwen3-8B",
            "deep": "a/b/c",
            "file": "models/x.gguf",
            "absolute": "/srv/x",
        }
        tables = "".join(f"[models.{name}]\nengine = 'v'\npath = '{path}'\n" for name, path in models.items())
        loaded = load(tmp_path, SERVE + tables)
        paths = {name: str(model.path) for name, model in loaded.config.models.items()}
        assert paths == {
            "hub": "Qwen/Qwen3-8B",
            "dotted": f"{tmp_path}/Qwen/Qwen3-8B",
            "folder": f"{tmp_path}/Qwen3-8B",
            "deep": f"{tmp_path}/a/b/c",
            "file": f"{tmp_path}/models/x.gguf",
            "absolute": "/srv/x",
        }
        assert {problem.key for problem in loaded.warnings} == {
            f"models.{name}.path" for name in models if name != "hub"
        }
        assert all("no such file or folder" in problem.message for problem in loaded.warnings)

    def test_an_engine_that_reads_files_has_no_names(self, tmp_path: Path) -> None:
        loaded = load(tmp_path, "[models.m]\npath = 'Qwen/Qwen3-8B'")
        assert loaded.config.models["m"].path == tmp_path / "Qwen/Qwen3-8B"
        assert "no such file" in loaded.warnings[0].message

    def test_the_engine_counts_wherever_it_is_set(self, tmp_path: Path) -> None:
        text = SERVE + "[defaults]\nengine = 'v'\n[models.a]\npath = 'Q/a'\n[models.b]\ninherits = 'a'\n[models.c]\n"
        models = load(tmp_path, f"{text}inherits = 'a'\nengine = 'default'").config.models
        assert [str(models[name].path) for name in "abc"] == ["Q/a", "Q/a", f"{tmp_path}/Q/a"]

    def test_they_are_in_the_catalogue_without_a_problem(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "broken.gguf").write_bytes(b"not a model")
        text = SERVE + "".join(
            f"[models.{name}]\nengine = 'v'\npath = '{path}'\naliases = ['{name}-too']\n"
            for name, path in {"a": "Q/a", "b": "./folder", "c": "broken.gguf", "d": "/in/a/container"}.items()
        )
        loaded = load(tmp_path, text + "[discovery]\nfolders = []\n")
        assert [problem.key for problem in loaded.warnings] == ["models.d.path"]
        catalog = discover(loaded.config)
        assert [model.name for model in catalog] == ["a", "b", "c", "d"]
        assert all(not model.problem and Capability.COMPLETION in model.capabilities for model in catalog)
        assert catalog.find("b-too").path == tmp_path / "folder"

    def test_a_gguf_file_says_more_than_a_name(self, tmp_path: Path, smollm2: Path) -> None:
        loaded = load(tmp_path, f"{SERVE}[models.a]\nengine = 'v'\npath = '{smollm2}'\n[discovery]\nfolders = []")
        assert discover(loaded.config).find("a").details.architecture == "llama"
