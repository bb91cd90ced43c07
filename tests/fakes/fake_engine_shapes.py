"""The JSON that llama-server answers on each generating route, streamed and whole. Part of fake_engine.py."""

from __future__ import annotations

import json
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


class Named(Shape):
    """Events with names: `/v1/responses` and `/v1/messages`."""

    def named(self, event: dict[str, Any]) -> str:
        return f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}"


class Responses(Named):
    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.text = ""
        self.item = {"content": [], "id": "msg_1", "role": "assistant", "status": "in_progress", "type": "message"}

    def event(self, kind: str, **fields: Any) -> str:
        return self.named({"type": f"response.{kind}", **fields})

    def first(self) -> list[dict[str, Any] | str]:
        begun = {"id": "resp_1", "object": "response", "status": "in_progress"}
        return [
            self.event("created", response=begun), self.event("in_progress", response=begun),
            self.event("output_item.added", item=self.item),
            self.event("content_part.added", item_id="msg_1", part={"type": "output_text", "text": ""}),
        ]  # fmt: skip

    def delta(self, kind: str, text: str) -> str:
        self.text += text
        return self.event("output_text.delta", item_id="msg_1", delta=text)

    def last(self, calls: Any, finish: str, usage: Any, timings: Any, include_usage: bool) -> list[Any]:
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": self.text}
        item = {**self.item, "status": "completed", "content": [part]}
        return [
            self.event("output_text.done", item_id="msg_1", text=self.text),
            self.event("content_part.done", item_id="msg_1", part=part),
            self.event("output_item.done", item=item),
            self.event("completed", response=self.response([item], usage), timings=timings),
        ]  # fmt: skip

    def whole(self, pieces: Any, calls: Any, finish: str, usage: Any, timings: Any) -> dict[str, Any]:
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": joined(pieces, "content")}
        return self.response([{**self.item, "status": "completed", "content": [part]}], usage)

    def response(self, output: list[Any], usage: Any) -> dict[str, Any]:
        counted = {
            "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
        }  # fmt: skip
        ended = {"id": "resp_1", "object": "response", "created_at": self.base["created"], "status": "completed"}
        return {**ended, "model": self.base["model"], "output": output, "usage": counted}


class Messages(Named):
    def first(self) -> list[dict[str, Any] | str]:
        message = {**self.message([], None), "usage": {"cache_read_input_tokens": 3, "input_tokens": 4}}
        block = {"type": "text", "text": ""}
        return [
            self.named({"type": "message_start", "message": message}),
            self.named({"type": "content_block_start", "index": 0, "content_block": block}),
        ]

    def delta(self, kind: str, text: str) -> str:
        return self.named({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})

    def last(self, calls: Any, finish: str, usage: Any, timings: Any, include_usage: bool) -> list[Any]:
        delta = {"stop_reason": STOP_REASONS[finish], "stop_sequence": None}
        counted = {"output_tokens": usage["completion_tokens"]}
        return [
            self.named({"type": "content_block_stop", "index": 0}),
            self.named({"type": "message_delta", "delta": delta, "usage": counted}),
            self.named({"type": "message_stop"}),
        ]

    def whole(self, pieces: Any, calls: Any, finish: str, usage: Any, timings: Any) -> dict[str, Any]:
        content = [{"type": "text", "text": joined(pieces, "content")}]
        counted = {"cache_read_input_tokens": 3, "input_tokens": 4, "output_tokens": usage["completion_tokens"]}
        return {**self.message(content, STOP_REASONS[finish]), "usage": counted}

    def message(self, content: list[Any], reason: str | None) -> dict[str, Any]:
        named = {"id": self.base["id"], "type": "message", "role": "assistant", "model": self.base["model"]}
        return {**named, "content": content, "stop_reason": reason, "stop_sequence": None}


STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def shape_for(path: str, model: str) -> Any:
    match path:
        case "/v1/responses":
            return Responses(model)
        case "/v1/messages":
            return Messages(model)
        case "/v1/chat/completions" | "/chat/completions":
            return Chat(model)
        case _:
            return Text(model, path)
