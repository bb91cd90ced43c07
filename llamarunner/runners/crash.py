"""Why an engine ended, in words a person can act on: from its exit code and the last lines of its log. Pure.

Knows the wording of llama.cpp's builds and forks since 2023; what it does not recognise is reported as it stands.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class CauseKind(StrEnum):
    OUT_OF_MEMORY = "out_of_memory"
    BAD_ARGUMENT = "bad_argument"
    MISSING_FILE = "missing_file"
    BAD_MODEL_FILE = "bad_model_file"
    PORT_TAKEN = "port_taken"
    UNSUPPORTED_ARCHITECTURE = "unsupported_architecture"
    ILLEGAL_INSTRUCTION = "illegal_instruction"
    MISSING_LIBRARY = "missing_library"
    KILLED = "killed"
    CRASHED = "crashed"
    EXITED = "exited"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Cause:
    kind: CauseKind
    summary: str  # one clause, no full stop: "out of memory: cudaMalloc failed: out of memory"
    hint: str = ""


@dataclass(frozen=True, slots=True)
class _Rule:
    """The newest line that matches makes the summary: `words`, and after it the part of the line from the match on."""

    kind: CauseKind
    pattern: re.Pattern[str]
    words: str
    hint: str


def _rule(kind: CauseKind, words: str, hint: str, *patterns: str) -> _Rule:
    return _Rule(kind, re.compile("|".join(patterns), re.IGNORECASE), words, hint)


_LESS_MEMORY = "set a smaller context or parallel, fewer gpu_layers, or use a smaller quantization of the model"

# the first rule with a match decides: a load that fails for want of memory also says "failed to load model"
_RULES = (
    _rule(
        CauseKind.MISSING_LIBRARY,
        "the engine lacks a library",
        "install what it needs, or set LD_LIBRARY_PATH in the engine's env",
        r"[^\s:]+: cannot open shared object file",
        r"(?:libc|libstdc\+\+|libm)\.so\.\d+: version .* not found",
        r"error while loading shared libraries: .*",
        r"symbol lookup error: .*",
    ),
    _rule(
        CauseKind.PORT_TAKEN,
        "its port was taken",
        "another program took the port in that moment; try again",
        r"couldn.t bind (?:HTTP server|to server) socket.*",
        r"(?:bind|listen).*address already in use.*",
        r"address already in use.*",
    ),
    _rule(
        CauseKind.OUT_OF_MEMORY,
        "out of memory",
        _LESS_MEMORY,
        r"allocating [\d.,]+ MiB on device \d+: \w+ failed: out of memory",
        r"cudaMalloc failed.*",
        r"out of (?:device )?memory.*",
        r"ErrorOutOf(?:Device|Host)Memory.*",
        r"failed to allocate (?!.*pinned memory).*",
        r"unable to allocate .* buffer",
        r"(?:buffer|memory) allocation failed.*",
        r"(?:not enough|insufficient) memory.*",
        r"std::bad_alloc",
        r"cannot allocate memory",
        r"CUBLAS_STATUS_ALLOC_FAILED",
    ),
    _rule(
        CauseKind.BAD_ARGUMENT,
        "the engine refused its arguments",
        "this build does not know the flag or value; see the model's `flags` and the engine's `args`",
        r"(?:invalid|unknown|unrecognized|unexpected) (?:argument|option)s?:? .*",
        r"invalid parameter for argument:? .*",
        r"error while handling argument .*",
        r"error: the argument has been removed.*",
        r"expected value for argument.*",
        r"unsupported cache type:? .*",
        r"invalid value for .*",
    ),
    _rule(
        CauseKind.UNSUPPORTED_ARCHITECTURE,
        "the engine does not know this kind of model",
        "a newer build of the engine may",
        r"unknown model architecture: .*",
        r"unknown (?:pre-tokenizer type|tokenizer|projector type|vision projector type).*",
        r"unsupported model architecture.*",
    ),
    _rule(
        CauseKind.MISSING_FILE,
        "a file is missing or may not be read",
        "check the model's paths and their permissions",
        r"failed to open .*(?:no such file|permission denied|is a directory).*",
        r"failed to open (?:GGUF )?file.*",
        r"error: (?:file|failed to open file) .*(?:does not exist|not found).*",
        r"(?:can.t|cannot|could not|unable to) open .*\.(?:gguf|jinja|bin).*",
        r"failed to load (?:.* )?split .*(?:no such file).*",
    ),
    _rule(
        CauseKind.BAD_MODEL_FILE,
        "the model's file is damaged or not a GGUF",
        "download it again",
        r"tensor .* data is not within the file bounds.*",
        r"invalid magic (?:characters|number).*",
        r"model is corrupted or incomplete",
        r"failed to read (?:key-value pairs|tensor (?:info|data)|magic|header).*",
        r"(?:bad GGUF|GGUFv1 is no longer supported|unsupported GGUF version|is version .* but this software).*",
        r"wrong number of tensors.*",
        r"tensor .* (?:has wrong shape|not found).*",
        r"(?:missing tensor|key not found in model|error loading model (?:hyperparameters|vocabulary)).*",
        r"(?:invalid split file|illegal split file).*",
    ),
    _rule(
        CauseKind.BAD_MODEL_FILE,
        "the engine could not read the model's file",
        "download it again, or try a newer build of the engine",
        r"error loading model: .*",
    ),
    _rule(
        CauseKind.ILLEGAL_INSTRUCTION,
        "the engine's build needs a newer processor",
        "use a build made for this CPU",
        r"illegal instruction.*",
    ),
    _rule(
        CauseKind.CRASHED,
        "the engine crashed",
        "a newer or older build of the engine may not",
        r"GGML_ASSERT.*",
        r"(?:CUDA|ROCm|HIP|Vulkan|Metal) error.*",
        r"segmentation fault.*",
        r"terminate called after throwing.*",
        r"(?:panic|fatal error): .*",
    ),
)

# llama.cpp goes on after this one: what it complained of before was no reason to end
_RECOVERED = re.compile(r"retrying without pipeline parallelism", re.IGNORECASE)
_PREFIX = re.compile(r"^(?:\d+\.\d\d\.\d{3}\.\d{3} )?(?:[IWED] (?=\S))?")
_TELLING = re.compile(
    r"^(?:panic: |fatal error: |error: |\S*: error: |CUDA error|ROCm error|cudaMalloc failed|error loading model"
    r"|GGML_ASSERT|llama_init_from_model:|\w*Error: )",
    re.IGNORECASE,
)
_ERROR_LEVEL = re.compile(r"^\d+\.\d\d\.\d{3}\.\d{3} E ")
_SUMMARY_CHARS = 300
_LINE_CHARS = 600  # looked at; the patterns take the square of it in time


def classify(exit_code: int | None, log_tail: Sequence[str]) -> Cause:
    """`exit_code` is negative for a signal, None where the process is still there. `log_tail` is oldest first."""
    lines = _after_recovery([line[:_LINE_CHARS] for line in log_tail])
    number = _signal_number(exit_code)
    if number == signal.SIGILL:
        return Cause(
            CauseKind.ILLEGAL_INSTRUCTION,
            "the engine's build needs a newer processor (illegal instruction)",
            "use a build made for this CPU",
        )
    for rule in _RULES:
        for line in reversed(lines):
            if match := rule.pattern.search(line):
                return Cause(rule.kind, _joined(rule.words, line[match.start() :]), rule.hint)
    return _from_exit_code(exit_code, number, _telling_line(lines))


def _from_exit_code(exit_code: int | None, number: int | None, line: str) -> Cause:
    if exit_code is None:
        return Cause(CauseKind.UNKNOWN, _joined("the engine failed", line))
    if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        hint = f"if the system ran out of memory: {_LESS_MEMORY}" if number == signal.SIGKILL else ""
        return Cause(CauseKind.KILLED, f"something killed the engine ({_signal_name(number)})", hint)
    if number is not None:
        return Cause(
            CauseKind.CRASHED,
            _joined(f"the engine crashed ({_signal_name(number)})", line),
            "a newer or older build of the engine may not",
        )
    if exit_code == 127:
        return Cause(CauseKind.MISSING_LIBRARY, _joined("the engine, or a library of it, was not found", line))
    return Cause(CauseKind.EXITED, _joined(f"the engine ended with exit code {exit_code}", line))


def _signal_number(exit_code: int | None) -> int | None:
    """Also of a shell's 128 + n, where a wrapper script hides the signal."""
    if exit_code is None:
        return None
    if exit_code < 0:
        return -exit_code
    return exit_code - 128 if 128 < exit_code <= 128 + signal.SIGSYS else None


def _signal_name(number: int | None) -> str:
    try:
        return signal.Signals(number or 0).name
    except ValueError:
        return f"signal {number}"


def _after_recovery(lines: Sequence[str]) -> Sequence[str]:
    for index in range(len(lines) - 1, -1, -1):
        if _RECOVERED.search(lines[index]):
            return lines[index + 1 :]
    return lines


def _telling_line(lines: Sequence[str]) -> str:
    """The line most likely to say what went wrong; "" where there is none."""
    stripped = [_PREFIX.sub("", line.strip()) for line in lines]
    for text in reversed(stripped):
        if _TELLING.search(text):
            return text
    for line, text in zip(reversed(lines), reversed(stripped), strict=True):
        if _ERROR_LEVEL.search(line):
            return text
    return next((text for text in reversed(stripped) if text), "")


def _joined(words: str, line: str) -> str:
    text = " ".join(line.split()).rstrip(" .")
    if not text or text.lower() == words.lower():
        return words
    return f"{words}: {text[:_SUMMARY_CHARS]}"
