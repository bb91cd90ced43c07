"""Finding, layering, profiles, environment and inheritance of the configuration."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from llamarunner.config.load import LoadedConfig, load_config
from llamarunner.config.merge import BUILT_IN_PROFILES
from llamarunner.config.schema import Config, json_schema
from llamarunner.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMARUNNER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def load(tmp_path: Path, text: str, *, environ: Mapping[str, str] | None = None, **arguments: object) -> LoadedConfig:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    arguments.setdefault("validate_files", False)
    return load_config(file, environ=environ or {}, **arguments)  # type: ignore[arg-type]  # keywords of its own


def refused(tmp_path: Path, text: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, environ=environ)
    return caught.value.problems


class TestFinding:
    def test_no_file_at_all_gives_the_defaults(self) -> None:
        loaded = load_config(environ={})
        assert loaded.config == Config()
        assert (loaded.path, loaded.profile, dict(loaded.origins), loaded.warnings) == (None, "", {}, ())

    def test_the_usual_file(self, home: Path) -> None:
        (home / "config").mkdir(parents=True)
        (home / "config" / "config.toml").write_text("tui.fps = 7")
        assert load_config(environ={}).config.tui.fps == 7

    def test_a_usual_file_that_is_a_dead_link_is_not_passed_over(self, home: Path) -> None:
        (home / "config").mkdir(parents=True)
        (home / "config" / "config.toml").symlink_to(home / "gone")
        with pytest.raises(ConfigError, match="there is no configuration file"):
            load_config(environ={})

    def test_the_environment_names_one_and_the_command_line_another(self, tmp_path: Path) -> None:
        for fps in (3, 4):
            (tmp_path / f"{fps}.toml").write_text(f"tui.fps = {fps}")
        environ = {"LLAMARUNNER_CONFIG": str(tmp_path / "3.toml")}
        assert load_config(environ=environ).config.tui.fps == 3
        assert load_config(tmp_path / "4.toml", environ=environ).config.tui.fps == 4
        with pytest.raises(ConfigError):
            load_config(environ={"LLAMARUNNER_CONFIG": str(tmp_path / "5.toml")})

    def test_a_byte_order_mark_and_windows_line_ends(self, tmp_path: Path) -> None:
        file = tmp_path / "config.toml"
        file.write_bytes(b"\xef\xbb\xbf[tui]\r\nfps = 9\r\n")
        loaded = load_config(file, environ={})
        assert loaded.config.tui.fps == 9
        assert loaded.origins["tui.fps"].line == 2

    def test_paths_count_from_the_file_and_may_hold_variables(self, tmp_path: Path) -> None:
        text = (
            "[models.a]\npath = '${DIR}/a.gguf'\n[models.b]\npath = '${NONE:-/x}/b.gguf'\n[models.c]\npath = '~/c.gguf'"
        )
        models = load(tmp_path, text, environ={"DIR": "m"}).config.models
        assert models["a"].path == tmp_path / "m" / "a.gguf"
        assert models["b"].path == Path("/x/b.gguf")
        assert models["c"].path == Path.home() / "c.gguf"


class TestLayers:
    def test_each_wins_over_the_one_below(self, tmp_path: Path) -> None:
        text = "[tui]\nfps = 1\n[profiles.mine.tui]\nfps = 2\n"
        variable = {"LLAMARUNNER__TUI__FPS": "3"}
        assert load(tmp_path, "").config.tui.fps == 15
        assert load(tmp_path, text).config.tui.fps == 1
        assert load(tmp_path, text, profile="mine").config.tui.fps == 2
        assert load(tmp_path, text, profile="mine", environ=variable).config.tui.fps == 3
        loaded = load(tmp_path, text, profile="mine", environ=variable, overrides={"tui.fps": 4})
        assert loaded.config.tui.fps == 4
        assert str(loaded.origins["tui.fps"]) == "command line"

    def test_origins_say_where(self, tmp_path: Path) -> None:
        text = "[tui]\nfps = 1\nmouse = false\n[profiles.production.tui]\nfps = 2\n"
        loaded = load(tmp_path, text, profile="production", environ={"LLAMARUNNER__TUI__ASCII": "true"})
        file = tmp_path / "config.toml"
        origins = {key: str(origin) for key, origin in loaded.origins.items() if key.count(".") == 1}
        assert origins == {
            "tui.fps": f"{file}:5 (profile production)",
            "tui.mouse": f"{file}:3",
            "tui.ascii": "LLAMARUNNER__TUI__ASCII",
            "server.drain": "profile production",
            "logging.level": "profile production",
        }

    def test_a_wrong_override_names_the_command_line(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            load(tmp_path, "", overrides={"logging.level": "loud"})
        assert caught.value.problems[0].startswith("command line: logging.level: ")


class TestProfiles:
    def test_built_in(self, tmp_path: Path) -> None:
        assert load(tmp_path, "", profile="development").config.logging.level == "debug"
        production = load(tmp_path, "", profile="production").config
        assert (production.server.drain, production.logging.level) == (60.0, "info")
        testing = load(tmp_path, "", profile="testing").config
        assert (testing.proxies.ollama.port, testing.proxies.lmstudio.port) == (0, 0)
        assert (testing.logging.file, testing.discovery.folders) == (False, [])

    def test_the_environment_chooses_and_the_command_line_wins(self, tmp_path: Path) -> None:
        environ = {"LLAMARUNNER_PROFILE": "testing"}
        assert load(tmp_path, "", environ=environ).profile == "testing"
        assert load(tmp_path, "", environ=environ, profile="production").profile == "production"
        assert load(tmp_path, "", environ=environ, profile="").profile == ""

    def test_the_file_adds_to_a_built_in_one(self, tmp_path: Path) -> None:
        config = load(tmp_path, "[profiles.testing.proxies.ollama]\nport = 5", profile="testing").config
        assert (config.proxies.ollama.port, config.proxies.lmstudio.port) == (5, 0)

    def test_an_unknown_one(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r'there is no profile "prodution".*did you mean "production"'):
            load(tmp_path, "[profiles.mine]", profile="prodution")
        with pytest.raises(ConfigError, match="known are development, mine, production, testing"):
            load(tmp_path, "[profiles.mine]", profile="xyz")

    def test_a_profile_reaches_models_through_their_defaults(self, tmp_path: Path) -> None:
        text = "[defaults]\ncontext = 1\n[models.a]\npath = 'a'\n[profiles.big.defaults]\ncontext = 2"
        assert load(tmp_path, text, profile="big").config.models["a"].context == 2

    def test_choosing_one_leaves_the_built_in_tables_alone(self, tmp_path: Path) -> None:
        load(tmp_path, "", profile="testing", environ={"LLAMARUNNER__PROXIES__OLLAMA__PORT": "9"})
        assert BUILT_IN_PROFILES["testing"]["proxies"]["ollama"] == {"port": 0}


class TestEnvironment:
    @pytest.mark.parametrize(
        ("variable", "value", "key", "expected"),
        [
            ("LLAMARUNNER__SERVER__HOST", "::1", "server.host", "::1"),
            ("llamarunner__server__host", "::1", "server.host", "::1"),
            ("LLAMARUNNER__SERVER__HOST", "'::1'", "server.host", "::1"),
            ("LLAMARUNNER__SERVER__DRAIN", "1m", "server.drain", 60.0),
            ("LLAMARUNNER__SERVER__DRAIN", "5", "server.drain", 5.0),
            ("LLAMARUNNER__TUI__MOUSE", "false", "tui.mouse", False),
            ("LLAMARUNNER__LOGGING__LEVEL", "debug", "logging.level", "debug"),
            ("LLAMARUNNER__DISCOVERY__FOLDERS", '["/a", "/b"]', "discovery.folders", [Path("/a"), Path("/b")]),
            ("LLAMARUNNER__DEFAULTS__GPU_LAYERS", "all", "defaults.gpu_layers", "all"),
            ("LLAMARUNNER__DEFAULTS__GPU_LAYERS", "7", "defaults.gpu_layers", 7),
            ("LLAMARUNNER__DEFAULTS__CHAT_TEMPLATE", "123", "defaults.chat_template", "123"),
            ("LLAMARUNNER__DEFAULTS__FLAGS", "{ a = 1 }", "defaults.flags", {"a": 1}),
            ("LLAMARUNNER__DEFAULTS__FLAGS__CACHE_TYPE_K", "q8_0", "defaults.flags", {"cache-type-k": "q8_0"}),
            ("LLAMARUNNER__DEFAULTS__ENV__CUDA_VISIBLE_DEVICES", "0", "defaults.env", {"CUDA_VISIBLE_DEVICES": "0"}),
            ("LLAMARUNNER__DEFAULTS__ENV__A__B", "x", "defaults.env", {"A__B": "x"}),
            ("LLAMARUNNER__TUI__THEME", "x\ny = 1", "tui.theme", "x\ny = 1"),
            ("LLAMARUNNER__TUI__FPS", "", "tui.fps", 15),
        ],
    )
    def test_values(self, tmp_path: Path, variable: str, value: str, key: str, expected: object) -> None:
        found: object = load(tmp_path, "", environ={variable: value}).config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == expected
        assert type(found) is type(expected)

    def test_a_key_of_digits_is_text(self, tmp_path: Path) -> None:
        config = load(tmp_path, "", environ={"LLAMARUNNER__PROXIES__OLLAMA__API_KEY": "12345"}).config
        assert config.proxies.ollama.api_key is not None
        assert config.proxies.ollama.api_key.get_secret_value() == "12345"

    @pytest.mark.parametrize(
        ("name", "variable"),
        [
            ("qwen3-14b", "QWEN3_14B"),
            ("llama3.1:8b", "LLAMA3_1_8B"),
            ("小さい 模型/x", "小さい_模型_X"),
            ("a//b", "A_B"),
        ],
    )
    def test_names_of_models(self, tmp_path: Path, name: str, variable: str) -> None:
        text = f"[models.'{name}']\npath = 'a'\n[models.'{name}'.flags]\ncache-type-k = 'f16'"
        environ = {
            f"LLAMARUNNER__MODELS__{variable}__CONTEXT": "99",
            f"LLAMARUNNER__MODELS__{variable}__FLAGS__CACHE_TYPE_K": "q8_0",
        }
        (model,) = load(tmp_path, text, environ=environ).config.models.values()
        assert (model.context, model.flags) == (99, {"cache-type-k": "q8_0"})

    def test_a_model_of_the_environment_alone(self) -> None:
        environ = {"LLAMARUNNER__MODELS__SMOL__PATH": "/m/x.gguf", "LLAMARUNNER__MODELS__SMOL__ALIASES": '["s"]'}
        assert load_config(environ=environ, validate_files=False).config.models["smol"].path == Path("/m/x.gguf")

    def test_a_model_may_inherit_by_it(self, tmp_path: Path) -> None:
        text = "[models.a]\npath = 'a'"
        config = load(tmp_path, text, environ={"LLAMARUNNER__MODELS__B__INHERITS": "a"}).config
        assert config.models["b"].path == tmp_path / "a"

    def test_mistakes_name_the_variable(self, tmp_path: Path) -> None:
        text = "[models.a-b]\npath = 'a'\n[models.'a.b']\npath = 'b'"
        environ = {
            "LLAMARUNNER__SERVR__HOST": "x",
            "LLAMARUNNER__TUI__FPS": "many",
            "LLAMARUNNER__TUI__FPS__MORE": "1",
            "LLAMARUNNER__MODELS__A_B__CONTEXT": "1",
            "LLAMARUNNER__": "1",
            "LLAMARUNNER____X": "1",
        }
        problems = {problem.split(": ")[0]: problem for problem in refused(tmp_path, text, environ)}
        assert problems.keys() == environ.keys()
        assert 'did you mean "server"?' in problems["LLAMARUNNER__SERVR__HOST"]
        assert problems["LLAMARUNNER__TUI__FPS"].endswith('tui.fps: a whole number is wanted; found "many"')
        assert "could be a-b or a.b" in problems["LLAMARUNNER__MODELS__A_B__CONTEXT"]

    def test_other_variables_are_left_alone(self, tmp_path: Path) -> None:
        environ = {"LLAMARUNNER_HOME": "/x", "LLAMARUNNERS": "1", "LLAMARUNNER": "1"}
        assert load(tmp_path, "", environ=environ).config == Config()


class TestInheritance:
    TEXT = """
[defaults]
context = 1
parallel = 2
[defaults.flags]
a = 1
b = 1
[models.base]
path = "base.gguf"
aliases = ["root"]
keep_alive = -1
context = 3
flags = { b = 2, c = 2 }
env = { X = "1" }
[models.child]
inherits = "base"
context = 4
[models.child.flags]
c = 3
[models.grandchild]
inherits = "child"
pin = true
[models.other]
path = "other.gguf"
"""

    def test_own_keys_win_over_ancestors_and_those_over_defaults(self, tmp_path: Path) -> None:
        models = load(tmp_path, self.TEXT).config.models
        grandchild = models["grandchild"]
        assert (grandchild.context, grandchild.parallel, grandchild.pin) == (4, 2, True)
        assert (grandchild.keep_alive, grandchild.path) == (math.inf, tmp_path / "base.gguf")
        assert (grandchild.flags, grandchild.env) == ({"a": 1, "b": 2, "c": 3}, {"X": "1"})
        assert grandchild.aliases == []
        assert (models["base"].context, models["base"].flags) == (3, {"a": 1, "b": 2, "c": 2})
        assert (models["other"].context, models["other"].flags, models["other"].env) == (1, {"a": 1, "b": 1}, {})

    def test_origins_name_who_it_is_from(self, tmp_path: Path) -> None:
        origins = load(tmp_path, self.TEXT).origins
        file = tmp_path / "config.toml"
        assert str(origins["models.grandchild.pin"]) == f"{file}:22"
        assert str(origins["models.grandchild.context"]) == f"{file}:17 (inherited from child)"
        assert str(origins["models.grandchild.path"]) == f"{file}:9 (inherited from base)"
        assert str(origins["models.grandchild.flags.a"]) == f"{file}:6 (by defaults)"
        assert str(origins["models.grandchild.flags.c"]) == f"{file}:19 (inherited from child)"
        assert "models.grandchild.aliases" not in origins

    def test_500_models_load_at_once(self, tmp_path: Path) -> None:
        lines = ["[defaults]", "context = 4096", "keep_alive = '10m'", "[defaults.flags]", "a = 1"]
        for number in range(500):
            start = f"inherits = 'm{number - number % 5}'" if number % 5 else f"path = 'm{number}.gguf'"
            lines += [
                f"[models.m{number}]",
                start,
                f"aliases = ['a{number}', 'b{number}']",
                f"flags = {{ b = {number} }}",
            ]
        began = time.process_time()
        loaded = load(tmp_path, "\n".join(lines), validate_files=True)
        assert time.process_time() - began < 0.5  # about 0.1 s; a slip to quadratic time would take many
        assert len(loaded.config.models) == 500
        assert len(loaded.warnings) == 100  # each file that is missing is told once


class TestModelFiles:
    def test_a_missing_one_is_a_warning(self, tmp_path: Path) -> None:
        (tmp_path / "there").touch()
        text = "[models.a]\npath = 'a'\n[models.b]\npath = '.'\n[models.c]\npath = 'there'\nmmproj = 'p'"
        file = tmp_path / "config.toml"
        warnings = [str(problem) for problem in load(tmp_path, text, validate_files=True).warnings]
        assert warnings == [
            f"{file}:2: models.a.path: there is no such file: {tmp_path}/a",
            f"{file}:4: models.b.path: this is a folder; name the .gguf file in it: {tmp_path}",
            f"{file}:7: models.c.mmproj: there is no such file: {tmp_path}/p",
        ]

    def test_nothing_is_said_where_files_are_not_looked_at(self, tmp_path: Path) -> None:
        assert load(tmp_path, "[models.a]\npath = 'a'").warnings == ()


class TestAddresses:
    @pytest.mark.parametrize(
        "text",
        [
            "[server]\nhost = '127.0.0.2'",
            "[server]\nhost = 'LOCALHOST'",
            "[server]\nhost = '0.0.0.0'\nallow_unauthenticated = true",
            "[server]\nhost = '::'\n[proxies]\nollama.api_key = 'a'\nlmstudio.api_key = 'b'",
            "[server]\nhost = '::'\n[proxies]\nollama.api_key = 'a'\nlmstudio.enabled = false",
            "[proxies]\nollama.port = 0\nlmstudio.port = 0",
            "[proxies]\nollama.port = 1234\nlmstudio.enabled = false",
            "[proxies]\nollama = { port = 1234, host = '127.0.0.1' }\nlmstudio.host = '127.0.0.2'",
            "server.allow_unauthenticated = true\n[proxies]\nollama = { port = 1234 }\nlmstudio.host = '::'",
        ],
    )
    def test_allowed(self, tmp_path: Path, text: str) -> None:
        load(tmp_path, text)


def test_the_json_schema_is_of_what_a_user_writes() -> None:
    schema = json_schema()
    model = schema["$defs"]["ModelConfig"]
    assert {"inherits", "path", "context"} <= model["properties"].keys()
    assert model["required"] == []
    assert "profiles" in schema["properties"]
    assert model["properties"]["keep_alive"]["type"] == ["string", "number"]
