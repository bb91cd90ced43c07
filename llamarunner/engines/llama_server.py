"""llama.cpp's server and its forks: where the program is, what it says of itself, and how it is started."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llamarunner.catalog.catalog import Model
from llamarunner.catalog.gguf import printable
from llamarunner.config.schema import EngineConfig
from llamarunner.config.values import FlagValue
from llamarunner.engines.engine import EngineInfo, LaunchPlan
from llamarunner.engines.flags import Flags, flags_for, to_arguments
from llamarunner.errors import EngineMissingError

KIND = "llama-server"
API_KEY_VARIABLE = "LLAMA_API_KEY"
INSTALL_HINT = "pip install 'llamarunner[builtin]', or install llama-server and name it in the engine's command"

_PROBE_S = 10.0  # a CUDA build looks for its devices before it answers
_OUTPUT_BYTES = 512 * 1024  # the help of llama-server has about 60 KiB
_FLAG = re.compile(r"(?<![\w-])--?([A-Za-z][A-Za-z0-9-]*)")
_FLASH_ATTENTION_VALUE = re.compile(r"--flash-attn\s+[\[{<(]?on\b")
_OPTIONAL = ("jinja", "no-webui", "slots")  # asked for where the program has them
_VERSION = re.compile(r"^version:? +(\S+(?: \(\w+\))?)", re.MULTILINE)
_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


@dataclass(frozen=True, slots=True)
class Probe:
    """What a binary's `--version` and `--help` say. `problem` is empty where both could be read."""

    version: str = ""
    flags: frozenset[str] = frozenset()
    flash_attention_takes_value: bool = True
    problem: str = ""

    def knows(self, flag: str) -> bool:
        return not self.flags or flag in self.flags


class _NoAnswerError(Exception):
    """Why a program did not say what it was asked, as the rest of a sentence that begins with its name."""


_UNPROBED = Probe()
_probes: dict[str, tuple[int, Probe]] = {}  # by the program's path: when it was last changed, and what it said


def find_command(config: EngineConfig) -> str | None:
    """The absolute path of the engine's program; None where there is none that may be run."""
    command = os.path.expanduser(config.command)
    found = shutil.which(command, path=config.env.get("PATH"))
    return os.path.abspath(found) if found else None


def probe(command: str, env: Mapping[str, str]) -> Probe:
    """Ask the program for its version and flags, once for each change of its file. Takes up to 20 s if it hangs."""
    changed = _changed_at(command)
    if (known := _probes.get(command)) and known[0] == changed:
        return known[1]
    try:
        version = _output([command, "--version"], env)
        text = _output([command, "--help"], env)
    except _NoAnswerError as error:
        return Probe(problem=f"{command} {error}")
    flags = frozenset(_FLAG.findall(text))
    if not flags:
        return Probe(version=_version(version), problem="its --help names no flags")
    found = Probe(_version(version), flags, bool(_FLASH_ATTENTION_VALUE.search(text)))
    _probes[command] = (changed, found)
    return found


def _known_probe(command: str) -> Probe:
    known = _probes.get(command)
    return known[1] if known and known[0] == _changed_at(command) else _UNPROBED


def _changed_at(command: str) -> int:
    try:
        return os.stat(command).st_mtime_ns
    except OSError:
        return 0


def _version(output: str) -> str:
    if match := _VERSION.search(output):
        return printable(match[1], 80)
    return next((printable(line.strip(), 80) for line in output.splitlines() if line.strip()), "")


def _output(argv: Sequence[str], env: Mapping[str, str]) -> str:
    """What a program prints, up to a limit in bytes and in time; neither it nor its children outlive the call."""
    deadline = time.monotonic() + _PROBE_S
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,
        )
    except OSError as error:
        raise _NoAnswerError(f"cannot be run: {error.strerror}") from None
    assert process.stdout is not None
    try:
        with process.stdout as pipe:
            text = _ESCAPE.sub("", _read(pipe.fileno(), deadline).decode("utf-8", "replace"))
        if len(text) < _OUTPUT_BYTES and process.wait(max(deadline - time.monotonic(), 0.1)) < 0:
            raise _NoAnswerError(f"ended with {signal.Signals(-process.returncode).name} when asked for {argv[1]}")
        return text
    except subprocess.TimeoutExpired:
        raise _too_slow() from None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(pipe: int, deadline: float) -> bytes:
    data = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(data) < _OUTPUT_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                raise _too_slow()
            block = os.read(pipe, 64 * 1024)
            if not block:
                break
            data += block
    return bytes(data)


def _too_slow() -> _NoAnswerError:
    return _NoAnswerError(f"did not answer within {_PROBE_S:g} s")


class LlamaServerEngine:
    kind = KIND
    is_local = True

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        self._config = config

    def info(self) -> EngineInfo:
        command = find_command(self._config)
        if command is None:
            return EngineInfo(self.name, KIND, self._config.command, problem=self._missing, hint=INSTALL_HINT)
        found = probe(command, self._config.env)
        hint = f"run {Path(command).name} --version to see what ails it" if found.problem else ""
        return EngineInfo(self.name, KIND, command, version=found.version, problem=found.problem, hint=hint)

    def plan(self, model: Model, *, port: int, api_key: str) -> LaunchPlan:
        command = find_command(self._config)
        if command is None:
            raise EngineMissingError(self._missing, hint=INSTALL_HINT)
        flags = _as_known(flags_for(model, port), _known_probe(command))
        return LaunchPlan(
            argv=(command, *self._config.args, *to_arguments(flags)),
            port=port,
            api_key=api_key,
            env={**self._config.env, **model.settings.env, API_KEY_VARIABLE: api_key},
            load_timeout_s=model.settings.load_timeout,
            supports_tools=self._config.supports_tools,
        )

    @property
    def _missing(self) -> str:
        return f"engine '{self.name}': the program {self._config.command} is not found"


def _as_known(flags: Flags, known: Probe) -> Flags:
    """In the words that this build of the program has for them."""
    adapted: Flags = {}
    for name, value in flags.items():
        if name == "flash-attn":
            adapted[name] = _flash_attention(value, known)
        elif name == "no-webui" and not known.knows(name) and known.knows("no-ui"):
            adapted["no-ui"] = value
        elif name not in _OPTIONAL or known.knows(name):
            adapted[name] = value
    return adapted


def _flash_attention(value: FlagValue, known: Probe) -> FlagValue:
    """It was a bare flag before it took "on", "off" or "auto"."""
    if known.flash_attention_takes_value:
        return "on" if value is True else value
    return value in (True, "on")
