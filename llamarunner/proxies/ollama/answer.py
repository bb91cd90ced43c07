"""llama-server's stream as Ollama's lines: events in, whole NDJSON lines out. Pure but for the clock it is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson

from llamarunner.errors import EngineError, EngineGoneError, EngineRefusalError, LlamaRunnerError
from llamarunner.proxies.figures import numbers
from llamarunner.proxies.sse import DONE

_STRANGE = "the engine sent an event of a form that nobody knows"


def timestamp(at_ns: int) -> str:
    """RFC 3339 in UTC with nanoseconds, as Go writes it."""
    seconds, nanoseconds = divmod(at_ns, 1_000_000_000)
    return f"{_second(seconds)}.{nanoseconds:09d}Z"


@lru_cache(maxsize=4)  # of a stream's lines most fall into one second, and writing it out is what costs
def _second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def line(record: Mapping[str, Any]) -> bytes:
    return orjson.dumps(record) + b"\n"


@dataclass(slots=True)
class Answer:
    """One answer being written. `chat` tells /api/chat's shape from /api/generate's.

    `started_ns` is when the request came, by the monotonic clock, `load_ns` what it waited for its model. Durations are
    integers of nanoseconds, and a figure that is zero is left out, as Ollama does.
    """

    model: str  # as the client spelt it
    chat: bool
    started_ns: int
    load_ns: int
    now_ns: Callable[[], int] = time.time_ns
    clock_ns: Callable[[], int] = time.monotonic_ns
    content: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str = ""
    timings: Mapping[str, Any] = field(default_factory=dict)
    usage: Mapping[str, Any] = field(default_factory=dict)
    _calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    _frame: tuple[bytes, bytes, bytes] = (b"", b"", b"")  # of a line of text alone: around its values

    def __post_init__(self) -> None:
        text = b'","message":{"role":"assistant","content":' if self.chat else b'","response":'
        head = b'{"model":' + orjson.dumps(self.model) + b',"created_at":"'
        self._frame = (head, text, b'},"done":false}\n' if self.chat else b',"done":false}\n')

    def feed_all(self, payloads: Iterable[bytes]) -> tuple[bytes, LlamaRunnerError | None]:
        """The lines that these events become, and the error that ended them: what came before it is an answer too."""
        lines: list[bytes] = []
        try:
            for payload in payloads:
                lines.append(self.feed(payload))  # noqa: PERF401  # an error must leave what was fed before it
        except LlamaRunnerError as error:
            return b"".join(lines), error
        return b"".join(lines), None

    def feed(self, payload: bytes) -> bytes:
        """The lines (none, one or two) that an event becomes. Raises EngineRefusalError for an error event."""
        if payload == DONE:
            return b""
        try:
            event = orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            raise EngineGoneError(f"the engine sent an event that is not JSON: {error}") from None
        if not isinstance(event, dict):
            raise EngineGoneError("the engine sent an event that is not an object")
        return self._understood(event)

    def feed_whole(self, answer: Mapping[str, Any]) -> bytes:
        """The lines that an answer which was not streamed becomes. Raises as `feed` does."""
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            return self._understood(answer)
        try:
            message = choices[0].get("message") or {}
            calls = [{"index": index, **call} for index, call in enumerate(message.get("tool_calls") or ())]
            event = {**answer, "choices": [{**choices[0], "delta": {**message, "tool_calls": calls}}]}
        except (AttributeError, TypeError) as error:
            raise EngineError(_STRANGE) from error
        return self._understood(event)

    def _understood(self, event: Mapping[str, Any]) -> bytes:
        """Servers elsewhere may call anything an event, and its parts are looked at only where they are used."""
        try:
            return self._event(event)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise EngineError(_STRANGE) from error

    def _event(self, event: Mapping[str, Any]) -> bytes:
        if "error" in event:
            raise _stream_error(event["error"])
        if timings := event.get("timings"):
            self.timings = numbers(timings)
        if usage := event.get("usage"):
            self.usage = numbers(usage)
        choices = event.get("choices")
        if choices is None:
            return self._completion_event(event)
        return self._choice(choices[0]) if choices else b""

    def _choice(self, choice: Mapping[str, Any]) -> bytes:
        """An event of /v1/chat/completions."""
        delta = choice.get("delta") or {}
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        out = self._piece(delta.get("content") or "", delta.get("reasoning_content") or "", logprobs)
        for fragment in delta.get("tool_calls") or ():
            self._gather_call(fragment)
        if reason := choice.get("finish_reason"):
            self.finish_reason = reason
            out += self._whole_calls()
        return out

    def _completion_event(self, event: Mapping[str, Any]) -> bytes:
        """An event of /completion or /infill."""
        if event.get("stop"):
            self.finish_reason = "length" if event.get("stop_type") == "limit" else "stop"
        return self._piece(event.get("content") or "", "", event.get("completion_probabilities") or [])

    def _piece(self, content: Any, thinking: Any, logprobs: list[Any]) -> bytes:
        if not (isinstance(content, str) and isinstance(thinking, str)):
            raise EngineError(_STRANGE)
        if not thinking and not logprobs:
            return self._plain(content) if content else b""
        record = self._head()
        if content:
            self.content.append(content)
        if thinking:
            self.thinking.append(thinking)
        record |= self._text(content, thinking)
        record["done"] = False
        if logprobs:
            tokens = [_logprob(each) for each in logprobs]
            self.logprobs += tokens
            record["logprobs"] = tokens
        return line(record)

    def _plain(self, content: str) -> bytes:
        """Nearly every line is one of these, so it is put together without a record."""
        self.content.append(content)
        head, text, tail = self._frame
        return head + timestamp(self.now_ns()).encode() + text + orjson.dumps(content) + tail

    def _head(self) -> dict[str, Any]:
        return {"model": self.model, "created_at": timestamp(self.now_ns())}

    def _text(self, content: str, thinking: str, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        extra: dict[str, Any] = {"thinking": thinking} if thinking else {}
        if calls:
            extra["tool_calls"] = calls
        if self.chat:
            return {"message": {"role": "assistant", "content": content, **extra}}
        return {"response": content, **extra}

    def _gather_call(self, fragment: Mapping[str, Any]) -> None:
        """Names and arguments come in pieces; clients want each call whole."""
        call = self._calls.setdefault(fragment.get("index") or 0, {"id": "", "name": "", "arguments": ""})
        function = fragment.get("function") or {}
        call["id"] = fragment.get("id") or call["id"]
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""

    def _whole_calls(self) -> bytes:
        if not self._calls:
            return b""
        self.tool_calls = [_tool_call(index, call) for index, call in sorted(self._calls.items())]
        self._calls = {}
        return line({**self._head(), **self._text("", "", self.tool_calls), "done": False})

    def final(self, context: list[int] | None = None) -> dict[str, Any]:
        """The record that ends a stream."""
        return {**self._head(), **self._text("", ""), **self._end(context)}

    def whole(self, context: list[int] | None = None) -> dict[str, Any]:
        """The one record of an answer that is not streamed."""
        text = self._text("".join(self.content), "".join(self.thinking), self.tool_calls)
        logprobs = {"logprobs": self.logprobs} if self.logprobs else {}
        return {**self._head(), **text, **self._end(context), **logprobs}

    def _end(self, context: list[int] | None) -> dict[str, Any]:
        figures = {
            "total_duration": max(self.clock_ns() - self.started_ns, 1),
            "load_duration": max(self.load_ns, 1),
            **self._counts(),
        }
        end: dict[str, Any] = {"done": True, "done_reason": "length" if self.finish_reason == "length" else "stop"}
        if context:
            end["context"] = context
        return end | {name: figure for name, figure in figures.items() if figure}

    def _counts(self) -> dict[str, int]:
        timings, usage = self.timings, self.usage
        prompt = (timings.get("cache_n") or 0) + (timings.get("prompt_n") or 0) or usage.get("prompt_tokens") or 0
        return {
            "prompt_eval_count": prompt,
            "prompt_eval_duration": _nanoseconds(timings.get("prompt_ms")),
            "eval_count": timings.get("predicted_n") or usage.get("completion_tokens") or 0,
            "eval_duration": _nanoseconds(timings.get("predicted_ms")),
        }


def bare_reply(model: str, reason: str, *, chat: bool) -> dict[str, Any]:
    """What a request without a prompt gets: `reason` is "load" or "unload"."""
    text = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    return {"model": model, "created_at": timestamp(time.time_ns()), **text, "done": True, "done_reason": reason}


def rendered_reply(model: str, prompt: str, files: int, *, chat: bool) -> dict[str, Any]:
    """What `_debug_render_only` gets: the prompt as the model would see it."""
    text = {"message": {"role": "", "content": ""}} if chat else {"response": ""}
    count = {"image_count": files} if files else {}
    info = {"_debug_info": {"rendered_template": prompt, **count}}
    return {"model": model, "created_at": timestamp(time.time_ns()), **text, "done": False, **info}


def _nanoseconds(milliseconds: float | None) -> int:
    return round((milliseconds or 0.0) * 1_000_000)


def _logprob(token: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: token[name] for name in ("token", "logprob", "bytes") if name in token}
    if top := token.get("top_logprobs"):
        kept["top_logprobs"] = [_logprob(each) for each in top]
    return kept


def _tool_call(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    try:
        arguments = orjson.loads(call["arguments"] or b"{}") or {}
    except orjson.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise EngineError("the model called a tool with arguments that are not a JSON object")
    function = {"index": index, "name": call["name"], "arguments": arguments}
    return {"id": call["id"], "function": function} if call["id"] else {"function": function}


def _stream_error(error: object) -> EngineRefusalError:
    if isinstance(error, dict):
        status = error.get("code")
        message = str(error.get("message", "the engine reported an error"))
        return EngineRefusalError(status if isinstance(status, int) else 500, message, kind=str(error.get("type", "")))
    return EngineRefusalError(500, str(error))
