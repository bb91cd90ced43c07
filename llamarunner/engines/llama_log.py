"""What llama.cpp's server and its forks say in their logs, as events: a pure reading of one line after another.

Only the beginning of a line decides what it is, after the prefixes that builds and routers put before it; a line that
is not known changes nothing. `Loaded` and `Fatal` come from whole phrases of the engine's own functions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from llamarunner.engines.llama_slots import SLOT, SlotReader, grammar, whole
from llamarunner.engines.log_events import (
    MAX_SLOTS,
    BufferSize,
    ContextInfo,
    Device,
    Events,
    Fatal,
    Loaded,
    LoadProgress,
    LoadStarted,
    OffloadedLayers,
)

_LINE_CHARS = 1000  # looked at; nothing we know has its facts beyond them
_TEXT_CHARS = 300
_MAX_BUFFERS = 256  # of a model
_MIB = 1024**2

# A router's "[port]", the time since start, the level's letter; then the first word.
_HEAD = grammar(r"(?:\[\d{1,5}\] )?(?:\d{1,9}\.\d\d\.\d{3}\.\d{3} )?(?:[DIWE] )?(?=[ \t]{0,40}(\w{0,40}))")
# Mid-2024, and ik_llama.cpp: INFO [  function] message | tid="..." timestamp=... id_slot=0
_TAGGED = grammar(r" *(?:INFO|WARN|ERR|ERROR|VERB) +\[[^\]]*\] (.*)")
_TAG = grammar(r"(\w+)=(\"[^\"]*\"|\S+)")

_BUFFER = grammar(r"(\w{1,80}): +(\S{1,80}) +(?:(model|KV|compute|output|RS) )?buffer size = +(~) MiB")
_OFFLOADED = grammar(r"\w+: offloaded (#)/(#) layers to GPU")
_DEVICE = grammar(r"\w+: using device (\S{1,80}) \(.*- (#) MiB free")
_DEVICE_INFO = grammar(r"(?:cmn +common_param:)? +- (\S{1,80}) *: .*\(# MiB, (#) MiB free\)")
_CACHE_PART = grammar(r"\w+: creating +(\S[\w -]{0,40}?) +KV cache")
_FITTING = grammar(r"(?:cmn +)?\w+: fitting params to (device memory|free memory took)")
_WARMING_UP = grammar(r"(?:cmn +)?\w+: warming up the model with")
_STATE = grammar(r"cmd_child_to_router:(state:\{.*\}|ready|error:.*)$")
_LONG_READY = 'cmd_child_to_router:state:{"state":"ready",'
_DOTS = grammar(r"\.{2,101}$")
_LOADING = grammar(r"(?:main|srv +[\w()]+): loading model(?: '|$)")
_LOADED = grammar(
    r"(?:(?:main|srv +[\w()]+): (?:model loaded|all slots are idle)"
    r"|main: server is listening on \S+(?: - starting the main loop)?)$"
)
_SLOTS = grammar(r"srv +[\w()]+: initializing(?: slots)?, n_slots = (#)(?:, n_ctx_slot = (#))?")
_NEW_SLOT = grammar(r"new slot,? n_ctx(?:_slot)? = (#)")
_OLD_CONTEXT = grammar(r" *-> Slot (#) - max context: (#)$")

# While loading: the engine's own word that it gives up.
_LOAD_FATAL = grammar(
    r"error: |error while handling argument|panic: |(?:main|llama_\w+|common_\w+): error[: ]"
    r"|(?:srv +|cmn +)?\w+: (?:failed to (?:load (?:model|draft model|multimodal model)"
    r"|initialize (?:the context|model)|create context)|exiting due to|couldn't bind)"
)
# At any time: the process cannot go on.
_ABORT = grammar(
    r"(?:\S{1,200}:\d{1,6}: )?(?:GGML_ASSERT\(|(?:CUDA|ROCm|HIP|MUSA|SYCL) error)"
    r"|fatal error: |terminate called after |libc\+\+abi: terminating|Segmentation fault|Illegal instruction"
)
_ABORT_SIGNS = ("error", "ASSERT", "terminat", "Segmentation", "Illegal")


@dataclass(slots=True)
class _Load:
    """What is known of the load in progress, or of the newest."""

    begun: bool = False  # told that it began
    told: bool = False  # told anything since that a new beginning makes void
    loaded: bool = False
    trial: bool = False  # llama.cpp tries which parameters fit, by loads without weights
    staged: bool = False  # the engine itself tells its stages
    fraction: float = 0.0
    stage: str = ""
    models: int = 0  # begun so far: a draft model is a second one
    contexts: int = 0
    in_context: bool = False
    newest_kind: str = ""
    cache_part: str = ""
    weights: dict[tuple[str, str], int] = field(default_factory=dict)  # the files of a split model are told one by one
    n_slots: int | None = None
    context: ContextInfo | None = None


class LogReader:
    """Feed it each line of one engine's output, from its start. Its memory does not grow with them."""

    def __init__(self) -> None:
        self._load = _Load()
        self._slots = SlotReader()
        timing = self._slots.timing_line
        self._words: Mapping[str, Callable[[str], Events]] = {
            "slot": self._slot_line,
            "srv": self._server_line,
            "main": self._server_line,
            "cmd_child_to_router": self._state_line,
            **dict.fromkeys(("prompt", "eval", "total", "print_timings", "llama_print_timings"), timing),
            **dict.fromkeys(("INFO", "WARN", "ERR", "ERROR", "VERB"), self._tagged_line),
        }

    def feed(self, line: str) -> Events:
        """What this line tells; it may also be the beginning of one that is not yet ended, such as a row of dots."""
        if len(line) > _LINE_CHARS:
            line = line[:_LINE_CHARS]
        head = _HEAD.match(line)
        assert head is not None  # each part of it may be missing
        word, start = head[1], head.end()
        if (known := self._words.get(word)) is not None:
            return known(line[start:])
        if not word:
            return self._wordless(line[start:])
        if not self._load.loaded or "model buffer size" in line or "loading model tensors" in line:
            return self._load_line(line[start:])
        if any(sign in line for sign in _ABORT_SIGNS):
            return self._fatal(line[start:])
        return ()

    def _slot_line(self, text: str) -> Events:
        if "new slot" in text and (match := SLOT.match(text)) and (new := _NEW_SLOT.match(match[3])):
            return self._slot_found(int(match[1]), int(new[1]))
        return self._slots.line(text)

    def _server_line(self, text: str) -> Events:
        if ("loaded" in text or "idle" in text or "listening on" in text) and _LOADED.match(text):
            return self._end()
        if ": loading model" in text and _LOADING.match(text):
            return self._begin()
        if "n_slots = " in text and (match := _SLOTS.match(text)):
            return self._context(int(match[1]), int(match[2]) if match[2] else None)
        return self._fatal(text)

    def _wordless(self, text: str) -> Events:
        if text.startswith("{"):
            return self._json_line(text)
        if text.startswith("..") and _DOTS.match(text):
            return self._progress(len(text) / 100, self._load.stage or "text_model")
        if text.startswith("/"):  # the source file of an assertion
            return self._fatal(text)
        if "MiB free" in text and (match := _DEVICE_INFO.match(text)):
            return (Device(match[1], int(match[2]) * _MIB),)
        if "-> Slot" in text and (match := _OLD_CONTEXT.match(text)):
            return self._slot_found(int(match[1]), int(match[2]))
        return ()

    def _fatal(self, text: str) -> Events:
        if _ABORT.match(text) or (not self._load.loaded and _LOAD_FATAL.match(text)):
            return (_fatal(text),)
        return ()

    # --- loading ---------------------------------------------------------------------------------------------------

    def _begin(self) -> Events:
        if self._load.begun and not self._load.told:
            self._load = _Load(begun=True, staged=self._load.staged)
            return ()
        self._load = _Load(begun=True)
        self._slots.clear()
        return (LoadStarted(),)

    def _end(self) -> Events:
        if self._load.loaded:
            return ()
        self._load.loaded = self._load.told = True
        return (Loaded(),)

    def _progress(self, fraction: float, stage: str) -> Events:
        load = self._load
        if load.loaded or load.trial or (stage == load.stage and fraction <= load.fraction):
            return ()
        load.stage, load.fraction = stage, max(load.fraction, min(round(fraction, 4), 1.0))
        return (LoadProgress(load.fraction, stage),)

    def _load_line(self, text: str) -> Events:
        if "buffer size" in text:
            return self._buffer(text)
        if "layers to GPU" in text and (match := _OFFLOADED.match(text)):
            self._load.told = True
            return (OffloadedLayers(int(match[1]), int(match[2])),)
        if "MiB free" in text and (match := _DEVICE.match(text) or _DEVICE_INFO.match(text)):
            return (Device(match[1], int(match[2]) * _MIB),)
        if "KV cache" in text and (match := _CACHE_PART.match(text)):
            self._load.cache_part = match[1]
            return ()
        if "loading model tensors" in text:
            return self._next_model() if text.startswith(("load_tensors:", "llm_load_tensors:")) else ()
        if "fitting params to " in text and (match := _FITTING.match(text)):
            return self._trial(begins=match[1] == "device memory")
        if text.startswith(("llama_context: constructing", "llama_new_context_with_model: n_ctx ")):
            self._load.in_context = False
            return self._after_weights("context")
        if "warming up" in text and _WARMING_UP.match(text):
            return self._after_weights("warmup")
        return self._fatal(text)

    def _after_weights(self, stage: str) -> Events:
        return self._progress(self._load.fraction if self._load.staged else 1.0, stage)

    def _trial(self, *, begins: bool) -> Events:
        if not begins:
            return self._begin()
        told = self._progress(0.0, "fit_params")
        self._load.trial = True
        return told

    def _next_model(self) -> Events:
        begun = self._begin() if self._load.loaded else ()
        load = self._load
        load.models += 1
        load.newest_kind, load.in_context = "model", False
        load.weights.clear()
        return (*begun, *self._progress(0.0, "text_model" if load.models == 1 else "spec_model"))

    def _buffer(self, text: str) -> Events:
        match = _BUFFER.match(text)
        if match is None:
            return ()
        function, device, kind, size = match.groups()
        size_bytes = round(float(size) * _MIB)
        if kind is None:  # until November 2024, and ik_llama.cpp
            return self._weights(function, device, size_bytes) if "load_tensors" in function else ()
        if kind == "model":
            return self._weights(function, device, size_bytes)
        return self._of_context(function, device, kind, size_bytes)

    def _weights(self, function: str, device: str, size_bytes: int) -> Events:
        begun = self._next_model() if self._load.loaded or self._load.newest_kind != "model" else ()
        load, key = self._load, (function, device)
        if key not in load.weights and len(load.weights) >= _MAX_BUFFERS:
            return begun
        load.told = True
        load.weights[key] = load.weights.get(key, 0) + size_bytes
        return (*begun, BufferSize(_numbered(function, load.models), device, "model", load.weights[key]))

    def _of_context(self, function: str, device: str, kind: str, size_bytes: int) -> Events:
        load = self._load
        if load.loaded:
            return ()
        # a context's compute buffers come last: another cache or output after them belongs to another context
        if not load.in_context or (load.newest_kind == "compute" and kind != "compute"):
            load.contexts += 1
        load.told, load.in_context, load.newest_kind = True, True, kind
        component = f"{function} ({load.cache_part})" if kind == "KV" and load.cache_part else function
        return (BufferSize(_numbered(component, load.contexts), device, kind, size_bytes),)

    # --- slots there are -------------------------------------------------------------------------------------------

    def _slot_found(self, number: int, n_ctx: int) -> Events:
        return self._context(max(self._load.n_slots or 0, number + 1), n_ctx)

    def _context(self, n_slots: int | None, n_ctx_slot: int | None) -> Events:
        load = self._load
        if n_slots is None or not 0 < n_slots <= MAX_SLOTS:
            return ()
        load.n_slots = n_slots
        if n_ctx_slot is None or load.context == (told := ContextInfo(n_ctx_slot, n_slots)):
            return ()
        load.context, load.told = told, True
        return (told,)

    # --- lines with fields -----------------------------------------------------------------------------------------

    def _state_line(self, text: str) -> Events:
        """What a router's child writes for it."""
        match = _STATE.match(text)
        if match is None:
            return self._end() if text.startswith(_LONG_READY) else ()  # of a model with many names
        if match[1] == "ready":
            return self._end()
        if match[1].startswith("error:"):
            return (_fatal(match[1][len("error:") :]),)
        match _object(match[1][len("state:") :]):
            case {"state": "ready"}:
                return self._end()
            case {"state": "loading", "payload": {"stages": [*stages], "current": str(stage), **payload}}:
                return self._stage(stages, stage[:80], payload.get("value", 0.0))
            case {"state": "loading", "payload": {"stage": str(stage)}}:
                return self._progress(self._load.fraction, stage[:80])
            case _:
                return ()

    def _stage(self, stages: list[object], stage: str, value: object) -> Events:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            return ()
        begun = self._begin() if self._load.loaded else ()
        self._load.trial, self._load.staged = False, True
        number = stages.index(stage) if stage in stages else 0
        return (*begun, *self._progress((number + value) / max(len(stages), 1), stage))

    def _json_line(self, text: str) -> Events:
        """Until the end of 2024 a build could log JSON."""
        fields = _object(text) if '"msg":' in text or '"message":' in text else {}
        message = fields.get("msg", fields.get("message"))
        return self._fields(message, fields) if isinstance(message, str) else ()

    def _tagged_line(self, text: str) -> Events:
        told, bar, tags = text.partition("| tid=")
        match = _TAGGED.match(told) if bar else None
        return self._fields(match[1].strip(), dict(_TAG.findall(tags))) if match else ()

    def _fields(self, message: str, fields: Mapping[str, object]) -> Events:
        if message in ("model loaded", "all slots are idle"):
            return self._end()
        if message == "initializing slots":
            return self._context(whole(fields, "n_slots"), None)
        if message == "new slot":
            number, n_ctx = whole(fields, "id_slot", "slot_id"), whole(fields, "n_ctx_slot")
            return () if number is None or n_ctx is None else self._slot_found(number, n_ctx)
        if message == "unable to load model" and not self._load.loaded:
            return (_fatal(message),)
        return self._slots.fields(message, fields)


def _numbered(component: str, number: int) -> str:
    return component if number <= 1 else f"{component}#{number}"


def _fatal(text: str) -> Fatal:
    return Fatal(" ".join(text.split())[:_TEXT_CHARS])


def _object(text: str) -> dict[str, Any]:
    """Of JSON; empty where the text is something else."""
    try:
        told = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}
