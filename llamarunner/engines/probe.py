"""What a llama-server binary says of itself: its version, and the flags it has. Asked once for each change of the file,
and remembered on disk, so that neither a start of the program nor a request waits for the answer."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from llamarunner import paths
from llamarunner.catalog.gguf import printable
from llamarunner.engines.kept import KeptAnswers

_ANSWER_S = 10.0  # a CUDA build looks for its devices before it answers
_OUTPUT_BYTES = 512 * 1024  # the help of llama-server has about 60 KiB
_MOST_KEPT = 50  # binaries
_TYPICAL = "ctx-size"  # every llama-server has had it
_LISTS = ("flags", "bare", "switches")
_VERSION = re.compile(r"^version:? +(\S+(?: \(\w+\))?)", re.MULTILINE)
_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# One entry of the help: spellings, what value it takes, and from the next column on what it is for. Further lines of
# an entry stand further to the right.
_ENTRY = re.compile(r"^ {0,12}(-{1,2}[A-Za-z][\w.-]*(?:\(s\))?(?:, *-{1,2}[A-Za-z][\w.-]*)*)(.*)$")
_SPELLING = re.compile(r"(?<![\w-])--?([A-Za-z][\w.-]*)(\(s\))?")
_SWITCH = re.compile(r"^ ?[\[{<(]?(?:on\||auto\|on\b)")
_VALUE = re.compile(r"^ ?\S")  # a value stands one blank after the spellings, the explanation further off


@dataclass(frozen=True, slots=True)
class Probe:
    """What a binary's `--version` and `--help` say. `problem` is empty where both could be read."""

    version: str = ""
    flags: frozenset[str] = frozenset()  # every spelling, without dashes; empty where nothing is known
    bare: frozenset[str] = frozenset()  # those that take no value
    switches: frozenset[str] = frozenset()  # those that take on or off
    problem: str = ""

    def knows(self, flag: str) -> bool:
        return not self.flags or flag in self.flags


class _NoAnswerError(Exception):
    """Why a program did not say what it was asked, as the rest of a sentence that begins with its name."""


UNPROBED = Probe()
Identity = tuple[int, int]  # size and time of the last change
_known: dict[str, tuple[Identity, Probe]] = {}  # by the program's path
_asking = threading.Lock()  # who comes while another asks waits for its answer


def known(command: str) -> Probe:
    """What was learnt of the program as it is now; `UNPROBED` where nothing was. Runs and reads nothing."""
    found = _known.get(command)
    return found[1] if found and found[0] == identity_of(command) else UNPROBED


def probe(command: str, env: Mapping[str, str]) -> Probe:
    """Ask the program for its version and flags, unless that is known. Takes up to 20 s if it hangs."""
    with _asking:
        identity = identity_of(command)
        if (found := _known.get(command)) and found[0] == identity:
            return found[1]
        answer = _recall(command, identity) or _ask(command, env)
        if not answer.problem:
            _known[command] = (identity, answer)
        return answer


def parse_help(text: str) -> Probe:
    """The flags of a `--help`. An entry that says that it has been removed is none."""
    flags, bare, switches = set[str](), set[str](), set[str]()
    for spellings, rest, explanation in _entries(text):
        if "has been removed" in explanation:
            continue
        names = {name for name, plural in _SPELLING.findall(spellings)}
        names |= {f"{name}s" for name, plural in _SPELLING.findall(spellings) if plural}
        flags |= names
        if _SWITCH.match(rest):
            switches |= names
        elif not _VALUE.match(rest):
            bare |= names
    return Probe(flags=frozenset(flags), bare=frozenset(bare), switches=frozenset(switches))


def _entries(text: str) -> list[tuple[str, str, str]]:
    entries: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if match := _ENTRY.match(line):
            entries.append((match[1], match[2], match[2]))
        elif entries:
            spellings, rest, explanation = entries[-1]
            entries[-1] = (spellings, rest, f"{explanation} {line.strip()}")
    return entries


def _ask(command: str, env: Mapping[str, str]) -> Probe:
    identity = identity_of(command)
    try:
        version = _version(_output([command, "--version"], env))
        found = parse_help(_output([command, "--help"], env))
    except _NoAnswerError as error:
        return Probe(problem=f"{command} {error}")
    if not found.flags:
        return Probe(version=version, problem="its --help names no flags")
    # of a wrapper, which tells of itself, nothing is known of what it runs
    answer = replace(found, version=version) if _TYPICAL in found.flags else Probe(version)
    _remember(command, identity, answer)
    return answer


def identity_of(command: str) -> Identity:
    """Of the file as it is now."""
    try:
        status = os.stat(command)
    except OSError:
        return (0, 0)
    return (status.st_size, status.st_mtime_ns)


# --- on disk --------------------------------------------------------------------------------------------------------


def _kept() -> KeptAnswers:
    return KeptAnswers(paths.cache_dir() / "engines.json", _MOST_KEPT)


def _recall(command: str, identity: Identity) -> Probe | None:
    answer = _kept().get(command)
    try:
        if not answer or answer["of"] != list(identity):
            return None
        flags, bare, switches = (frozenset(map(str, answer[name])) for name in _LISTS)
        return Probe(str(answer["version"]), flags, bare, switches)
    except (TypeError, KeyError):
        return None


def _remember(command: str, identity: Identity, answer: Probe) -> None:
    lists = {name: sorted(getattr(answer, name)) for name in _LISTS}
    _kept().put(command, {"of": list(identity), "version": answer.version, **lists})


# --- the program ----------------------------------------------------------------------------------------------------


def _version(output: str) -> str:
    if match := _VERSION.search(output):
        return printable(match[1], 80)
    return next((printable(line.strip(), 80) for line in output.splitlines() if line.strip()), "")


def _output(argv: Sequence[str], env: Mapping[str, str]) -> str:
    try:
        code, output = run_bounded(argv, {**os.environ, **env}, _ANSWER_S)
    except TimeoutError:  # which is an OSError
        raise _NoAnswerError(f"did not answer within {_ANSWER_S:g} s") from None
    except OSError as error:
        raise _NoAnswerError(f"cannot be run: {error.strerror}") from None
    if code is not None and code < 0:
        raise _NoAnswerError(f"ended with {signal.Signals(-code).name} when asked for {argv[1]}")
    return output


def run_bounded(argv: Sequence[str], env: Mapping[str, str], within_s: float) -> tuple[int | None, str]:
    """How a program ended and what it printed, up to a limit in bytes and in time; neither it nor its children outlive
    the call. The code is None where it printed more than anybody wants. Raises OSError where it cannot be run, and
    TimeoutError."""
    deadline = time.monotonic() + within_s
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(env),
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        with process.stdout as pipe:
            data = _read(pipe.fileno(), deadline)
        text = _ESCAPE.sub("", data.decode("utf-8", "replace"))
        if len(data) >= _OUTPUT_BYTES:
            return None, text
        return process.wait(max(deadline - time.monotonic(), 0.1)), text
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
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
                raise TimeoutError
            block = os.read(pipe, 64 * 1024)
            if not block:
                break
            data += block
    return bytes(data)
