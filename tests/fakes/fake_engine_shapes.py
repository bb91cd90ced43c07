"""The JSON that llama-server answers on each generating route, streamed and whole. Part of fake_engine.py."""

from __future__ import annotations

import os
import time
from typing import Any


class Shape:
    """The JSON of one route's answers."""

    def __init__(self, model: str) -> None:
        self.base = {"created": int(time.time()), "id": f"chatcmpl-{os.urandom(8).hex()}", "model": model}
        self.base["system_fingerprint"] = "b0-fake"

    def first(self) -> list[dict[str, Any] | str]:
        return []


class Chat(Shape):
    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"finish_reason": finish, "index": 0, "delta": delta}
        return {"choices": [choice], **self.base, "object": "chat.completion.chunk"}

    def first(self) -> list[dict[str, Any] | str]:
        return [self.chunk({"role": "assistant", "content": None})]

    def delta(self, kind: str, text: str) -> dict[str, Any]:
        return self.chunk({"reasoning_content" if kind == "reasoning" else "content": text})

    def last(self, calls: Any, finish: str, usage: Any, timings: Any, include_usage: bool) -> list[Any]:
        events: list[Any] = []
        for index, call in enumerate(calls):
            head, tail = call["arguments"][:1], call["arguments"][1:]
            function = {"name": call["name"], "arguments": head}
            opening = {"index": index, "id": f"call_{index}", "type": "function", "function": function}
            events.append(self.chunk({"tool_calls": [opening]}))
            events.append(self.chunk({"tool_calls": [{"index": index, "function": {"arguments": tail}}]}))
        events.append(self.chunk({}, finish))
        if include_usage:
            events.append({"choices": [], **self.base, "object": "chat.completion.chunk", "usage": usage})
        events[-1]["timings"] = timings
        return [*events, "[DONE]"]

    def whole(self, pieces: Any, calls: Any, finish: str, usage: Any, timings: Any) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": joined(pieces, "content")}
        if thought := joined(pieces, "reasoning"):
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = [
                {"type": "function", "function": call, "id": f"call_{index}"} for index, call in enumerate(calls)
            ]
        choice = {"finish_reason": finish, "index": 0, "message": message}
        return {"choices": [choice], **self.base, "object": "chat.completion", "usage": usage, "timings": timings}


class Text(Shape):
    """`/v1/completions`, and llama.cpp's own `/completion` and `/infill`."""

    def __init__(self, model: str, path: str) -> None:
        super().__init__(model)
        self.native = not path.startswith("/v1/")
        self.count = 0

    def part(self, text: str, finish: str | None = None) -> dict[str, Any]:
        if self.native:
            counts = {"tokens_predicted": self.count, "tokens_evaluated": 7}
            return {"index": 0, "content": text, "tokens": [], "stop": finish is not None, "id_slot": 0, **counts}
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": finish}
        return {"choices": [choice], **self.base, "object": "text_completion"}

    def delta(self, kind: str, text: str) -> dict[str, Any]:
        self.count += 1
        return self.part(text)

    def last(self, calls: Any, finish: str, usage: Any, timings: Any, include_usage: bool) -> list[Any]:
        return [self.ended("", finish, usage, timings), *([] if self.native else ["[DONE]"])]

    def whole(self, pieces: Any, calls: Any, finish: str, usage: Any, timings: Any) -> dict[str, Any]:
        self.count = len(pieces)
        return self.ended(joined(pieces, "content"), finish, usage, timings)

    def ended(self, text: str, finish: str, usage: Any, timings: Any) -> dict[str, Any]:
        event = {**self.part(text, finish), "timings": timings}
        if self.native:
            stop_type = "limit" if finish == "length" else "eos"
            return {**event, "model": self.base["model"], "stop_type": stop_type, "truncated": False, "prompt": ""}
        return {**event, "usage": usage}


def joined(pieces: list[tuple[str, str]], kind: str) -> str:
    return "".join(text for of, text in pieces if of == kind)
