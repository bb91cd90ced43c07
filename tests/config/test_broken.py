"""Broken configurations: each is refused at the right place, in words, and without a traceback."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from llamarunner.config.load import load_config
from llamarunner.errors import ConfigError

SECRET = "sk-very-secret-1234"

# (what is wrong, the text, line, key, words of the message)
CASES: list[tuple[str, str, int, str, str]] = [
    ("unknown section", "[servr]\nhost = '::1'", 1, "servr", 'did you mean "server"?'),
    ("unknown top-level key", "\nport = 5", 2, "port", "it belongs in"),
    ("unknown key", "[server]\nhots = '::1'", 2, "server.hots", 'did you mean "host"?'),
    ("unknown key, nothing near", "[tui]\nxyzzy = 1", 2, "tui.xyzzy", "known are theme, mouse, fps, ascii"),
    ("key of an empty section", "[audio]\nvoice = 1", 2, "audio.voice", "this section has no keys yet"),
    ("dash for underscore", "[defaults]\ngpu-layers = 3", 2, "defaults.gpu-layers", 'did you mean "gpu_layers"?'),
    ("replica on no engine", "[defaults]\nalso_on = ['defaultt']", 2, "defaults.also_on[0]", 'no engine "defaultt"'),
    ("client that is nobody", "[clients.a]\npriority = 1", 1, "clients.a", "nobody can be recognised by it"),
    ("client with no key to send", "[clients.a]\napi_key = 'a b'", 2, "clients.a.api_key", "visible ASCII"),
    (
        "client from nowhere",
        "[clients.a]\naddresses = ['home']\napi_key = 'k'",
        2,
        "clients.a.addresses[0]",
        "a network is wanted",
    ),
    ("key of another section", "[tui]\nmax_loaded = 1", 2, "tui.max_loaded", "it belongs in [scheduler]"),
    ("section is a string", "server = 'x'", 1, "server", 'a table is wanted; found "x"'),
    ("model is a number", "[models]\nx = 1", 2, "models.x", "a table is wanted; found 1"),
    ("string for a number", "[proxies.ollama]\nport = '11434'", 2, "proxies.ollama.port", "a whole number is wanted"),
    ("fraction for a number", "[tui]\nfps = 1.5", 2, "tui.fps", "a whole number is wanted; found 1.5"),
    ("number for true or false", "[tui]\nmouse = 1", 2, "tui.mouse", "true or false is wanted; found 1"),
    ("true for a number", "[tui]\nfps = true", 2, "tui.fps", "a whole number is wanted; found true"),
    ("number for a string", "[server]\nhost = 127", 2, "server.host", "a string is wanted; found 127"),
    ("string for an array", "[proxies.ollama]\ncors_origins = '*'", 2, "proxies.ollama.cors_origins", "an array"),
    (
        "wrong array element",
        "[proxies.ollama]\nallowed_hosts = ['a',\n 5]",
        3,
        "proxies.ollama.allowed_hosts[1]",
        "string",
    ),
    ("date for a number", "[tui]\nfps = 2026-01-01", 2, "tui.fps", "found a date or time"),
    ("table for a string", "[server.host]\na = 1", 1, "server.host", "found a table"),
    ("port too large", "[proxies.lmstudio]\nport = 70000", 2, "proxies.lmstudio.port", "at most 65535"),
    ("port negative", "[proxies.lmstudio]\nport = -1", 2, "proxies.lmstudio.port", "at least 0"),
    ("enormous number", "[tui]\nfps = 0x" + "f" * 5000, 2, "tui.fps", "at most 60 is wanted; found a number"),
    ("not a duration", "[server]\ndrain = '5x'", 2, "server.drain", 'such as "30s" or "5m" is wanted; found "5x"'),
    ("negative duration", "[server]\ndrain = '-5s'", 2, "server.drain", "cannot be negative"),
    ("nan duration", "[server]\ndrain = nan", 2, "server.drain", "a duration"),
    ("keep_alive as a boolean", "[defaults]\nkeep_alive = true", 2, "defaults.keep_alive", "-1 (never unload)"),
    ("not a size", "[server]\nmax_body = 'big'", 2, "server.max_body", 'such as "8GiB"'),
    ("size of nothing", "[server]\nmax_body = '0B'", 2, "server.max_body", "a size"),
    (
        "unknown choice",
        "[logging]\nlevel = 'loud'",
        2,
        "logging.level",
        '"debug", "info", "warning" or "error" is wanted',
    ),
    ("gpu_layers", "[defaults]\ngpu_layers = 'most'", 2, "defaults.gpu_layers", 'a whole number or "all" or "auto"'),
    ("unknown engine kind", "[engines.a]\nkind = 'vllm'", 2, "engines.a.kind", '"llama-server" or "builtin" is wanted'),
    ("empty command", "[engines.a]\ncommand = ' '", 2, "engines.a.command", "is empty"),
    ("unset variable", "[engines.a]\ncommand = '${NOPE}/x'", 2, "engines.a.command", "NOPE is not set"),
    ("environment name", "[engines.a.env]\n'A=B' = 'x'", 2, 'engines.a.env."A=B"', "name of an environment variable"),
    ("no such engine", "[defaults]\nengine = 'defautl'", 2, "defaults.engine", 'did you mean "default"?'),
    ("model without a path", "[models.x]\ncontext = 1", 1, "models.x.path", "is missing"),
    ("empty path", "[models.x]\npath = ''", 2, "models.x.path", "the path is empty"),
    ("NUL in a path", '[models.x]\npath = "a\\u0000b"', 2, "models.x.path", "NUL"),
    ("unset variable in a path", "[models.x]\npath = '${NOPE}'", 2, "models.x.path", "NOPE is not set"),
    ("unknown model key", "[models.x]\npath = 'a'\nctx = 5", 3, "models.x.ctx", 'did you mean "context"?'),
    ("nameless model", "[models.'']\npath = 'a'", 1, 'models.""', "a visible character"),
    ("control character", '[models."a\\u001bb"]\npath = "a"', 1, 'models."a\\u001bb"', "no control characters"),
    ("flag with dashes", "[models.x]\npath='a'\nflags.--mlock = true", 3, "models.x.flags.--mlock", 'write "mlock"'),
    ("flag as a table", "[defaults.flags]\na = {b = 1}", 2, "defaults.flags.a", "an array of numbers and strings"),
    ("inherits nobody", "[models.x]\npath='a'\n[models.y]\ninherits = 'z'", 4, "models.y.inherits", 'no model "z"'),
    ("inherits itself", "[models.x]\npath='a'\ninherits = 'x'", 3, "models.x.inherits", "x -> x"),
    ("inherits a number", "[models.x]\npath='a'\ninherits = 3", 3, "models.x.inherits", "name of another model"),
    ("defaults inherit", "[defaults]\ninherits = 'x'", 2, "defaults.inherits", "no such key"),
    ("same name", "[models.a]\npath='a'\n[models.A]\npath='b'", 3, "models.A", 'already the name of model "a"'),
    (
        "alias of a name",
        "[models.a]\npath='a'\n[models.b]\npath='b'\naliases=['A:latest']",
        5,
        "models.b.aliases[0]",
        "already",
    ),
    ("open to all", "[server]\nhost = '0.0.0.0'", 2, "server.host", "server.allow_unauthenticated = true"),
    ("one proxy open", "[proxies.ollama]\nhost = '192.168.0.1'", 2, "proxies.ollama.host", "proxies.ollama.api_key"),
    ("loopback lookalike", "[server]\nhost = '127.evil.example'", 2, "server.host", "anyone who reaches"),
    ("empty host", "[server]\nhost = ''", 2, "server.host", "an address or name"),
    ("URL for a host", "[server]\nhost = 'http://x'", 2, "server.host", "an address or name"),
    ("empty api_key", "[proxies.ollama]\napi_key = ''", 2, "proxies.ollama.api_key", "protects nothing"),
    ("one port for both", "[proxies.lmstudio]\nport = 11434", 2, "proxies.lmstudio.port", "give each its own"),
    (
        "one port, and one proxy at every address",
        "[server]\nallow_unauthenticated = true\n[proxies]\nollama.host = '0.0.0.0'\nlmstudio.port = 11434",
        5,
        "proxies.lmstudio.port",
        "give each its own",
    ),
    ("profile with a typo", "[profiles.mine.server]\ndrian = 1", 2, "profiles.mine.server.drian", 'mean "drain"?'),
    ("profile is a string", "[profiles]\nmine = 'x'", 2, "profiles.mine", "a table is wanted"),
    ("profiles is a string", "profiles = 'x'", 1, "profiles", "[profiles.NAME]"),
    ("profile in a profile", "[profiles.a.profiles.b]\n", 1, "profiles.a.profiles", "no profiles of its own"),
    ("TOML: no value", "[server]\nhost =", 2, "", "is not valid TOML: Invalid value"),
    ("TOML: unclosed string", "\n\n[server]\nhost = 'x", 4, "", "is not valid TOML"),
    ("TOML: key twice", "[tui]\nfps = 1\nfps = 2", 3, "", "is not valid TOML"),
    ("TOML: table twice", "[tui]\n[tui]\n", 2, "", "is not valid TOML"),
    ("TOML: number of 5,000 digits", "[tui]\nfps = " + "9" * 5000, 2, "", "is not valid TOML"),
]


def problems_of(file: Path, **arguments: object) -> tuple[str, ...]:
    arguments.setdefault("environ", {})
    with pytest.raises(ConfigError) as caught:
        load_config(file, validate_files=False, **arguments)  # type: ignore[arg-type]  # keywords of its own
    return caught.value.problems or (caught.value.message,)


@pytest.mark.parametrize(
    ("text", "line", "key", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_it_is_refused_at_its_place(tmp_path: Path, text: str, line: int, key: str, words: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    problems = problems_of(file)
    place = f"{file}:{line}: {key}: " if key else f"{file}:{line}: "
    assert any(problem.startswith(place) and words in problem for problem in problems), problems
    assert all(problem.startswith(f"{file}:{line}: ") for problem in problems)  # and nothing is made up elsewhere
    assert "pydantic" not in " ".join(problems)


THIRTEEN = """\
[server]
drain = "5x"
[proxies.ollama]
prot = 1
port = "11434"
[proxies.lmstudio]
host = "0.0.0.0"
[engines.fast]
kind = "vllm"
[defaults]
gpu_layers = "most"
[models."llama3.1:8b"]
path = "x.gguf"
engine = "fas"
[models.LLAMA]
path = "y.gguf"
inherits = "lama"
[models.llama]
path = "z.gguf"
contxt = 5
[models.bare]
[loging]
level = "debug"
[profiles.production.server]
drian = 3
"""


def test_thirteen_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(THIRTEEN, encoding="utf-8")
    places = [problem.removeprefix(f"{file}:").split(": ")[:2] for problem in problems_of(file)]
    assert places == [
        ["2", "server.drain"],
        ["4", "proxies.ollama.prot"],
        ["5", "proxies.ollama.port"],
        ["7", "proxies.lmstudio.host"],
        ["9", "engines.fast.kind"],
        ["11", "defaults.gpu_layers"],
        ["14", 'models."llama3.1:8b".engine'],
        ["17", "models.LLAMA.inherits"],
        ["18", "models.llama"],
        ["20", "models.llama.contxt"],
        ["21", "models.bare.path"],
        ["22", "loging"],
        ["25", "profiles.production.server.drian"],
    ]


def test_a_mistake_in_defaults_is_told_once_however_many_inherit_it(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    models = "".join(f"[models.m{number}]\npath = 'a'\n" for number in range(50))
    file.write_text(f"[defaults]\nparallel = 'two'\n{models}", encoding="utf-8")
    assert problems_of(file) == (f'{file}:2: defaults.parallel: a whole number is wanted; found "two"',)


def test_a_circle_of_models_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    text = "[models.a]\npath='a'\ninherits='b'\n[models.b]\ninherits='c'\n[models.c]\ninherits='a'"
    file.write_text(text, encoding="utf-8")
    (problem,) = problems_of(file)
    assert problem.startswith(f"{file}:3: models.a.inherits: ")
    assert "a -> b -> c -> a" in problem


def test_secrets_are_never_told(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        f"[proxies.ollama]\napi_key = ['{SECRET}']\napikey = '{SECRET}'\n[proxies.lmstudio.api_key]\na = '{SECRET}'\n"
        f"[engines.default]\nenv = {{ 'A=' = '{SECRET}', HF_TOKEN = ['{SECRET}'], B = '${{UNSET}}{SECRET}' }}\n",
        encoding="utf-8",
    )
    environ = {
        "LLAMARUNNER__PROXIES__OLLAMA__API_KEE": SECRET,
        "LLAMARUNNER__SERVER__ALLOW_UNAUTHENTICATED": "maybe",
        "LLAMARUNNER__PROXIES__OLLAMA__HOST": "0.0.0.0",
    }
    problems = problems_of(file, environ=environ)
    assert len(problems) >= 6
    assert SECRET not in "\n".join(problems)


class TestFiles:
    def test_a_named_file_must_exist(self, tmp_path: Path) -> None:
        (problem,) = problems_of(tmp_path / "none.toml")
        assert problem == f"there is no configuration file {tmp_path / 'none.toml'}"

    def test_a_folder(self, tmp_path: Path) -> None:
        assert problems_of(tmp_path) == (f"{tmp_path} is a folder",)

    def test_not_a_regular_file(self, tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)  # reading it would wait for ever
        assert problems_of(fifo) == (f"{fifo} is not a regular file",)

    def test_a_socket(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / "s"))
            assert problems_of(tmp_path / "s") == (f"{tmp_path / 's'} is not a regular file",)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_unreadable(self, tmp_path: Path) -> None:
        file = tmp_path / "config.toml"
        file.touch(mode=0o000)
        assert "Permission denied" in problems_of(file)[0]

    def test_a_file_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        assert "Not a directory" in problems_of(tmp_path / "a" / "b")[0]

    def test_a_link_to_itself(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(tmp_path / "a")
        assert "cannot be read" in problems_of(tmp_path / "a")[0]

    def test_a_name_no_system_takes(self) -> None:
        assert "cannot be read" in problems_of(Path("a\0b"))[0]
        assert "cannot be read" in problems_of(Path("a" * 5000))[0]

    def test_not_utf8(self, tmp_path: Path) -> None:
        file = tmp_path / "config.toml"
        file.write_bytes(b"# fine\n# caf\xe9\n")
        assert problems_of(file) == (f"{file}:2: is not UTF-8 text; save it in that encoding",)

    def test_utf16(self, tmp_path: Path) -> None:
        file = tmp_path / "config.toml"
        file.write_text("[server]\n", encoding="utf-16")
        assert "is not UTF-8 text" in problems_of(file)[0]

    def test_too_large(self, tmp_path: Path) -> None:
        file = tmp_path / "config.toml"
        with file.open("wb") as stream:
            stream.truncate(10 * 1024**2 + 1)
        assert problems_of(file) == (f"{file} is larger than 10 MiB",)

    @pytest.mark.parametrize(
        "text",
        ["a = " + "[" * 5000 + "]" * 5000, "a." * 5000 + "a = 1", "[" + "a." * 90 + "b]"],
        ids=["arrays", "dotted key", "header"],
    )
    def test_nested_without_end(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "config.toml"
        file.write_text(text, encoding="utf-8")
        assert "nested" in problems_of(file)[0]
