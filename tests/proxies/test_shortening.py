"""Prompts that an engine refused, cut: with an engine that counts words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest

from llamarunner.catalog.catalog import Capability, Model, ModelDetails
from llamarunner.config.schema import ModelSettings
from llamarunner.errors import EngineRefusalError
from llamarunner.events import RequestTrace
from llamarunner.proxies.ollama import generate
from llamarunner.proxies.ollama.asking import Question
from llamarunner.proxies.ollama.chat import chat_body
from llamarunner.proxies.ollama.shortening import Shortening
from llamarunner.proxies.upstream import TOO_LONG

MODEL = Model(
    "m", Path("/m.gguf"), ModelSettings(context=1000), ModelDetails(capabilities=frozenset(Capability))
)  # fmt: skip
PNG = "iVBORw0KGgoAAAANSUhEUg=="
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


class Engine:
    """Each word is a token, and the number of one its place; a template that begins with a tool's answer is refused."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def call(self, _lease: object, path: str, body: dict[str, Any]) -> dict[str, Any]:
        match path:
            case "/apply-template":
                self.asked.append(body)
                turns = [m for m in body["messages"] if m["role"] != "system"]
                if turns[0]["role"] == "assistant":
                    raise EngineRefusalError(500, "conversations must begin with the user")
                return {"prompt": " ".join(m["content"] for m in body["messages"])}
            case "/tokenize":
                return {"tokens": list(range(len(body["content"].split())))}
            case _:
                return {"content": " ".join(f"w{token}" for token in body["tokens"])}


async def shortened(request: dict[str, Any], asked: dict[str, Any], context: int) -> tuple[dict[str, Any], str, Engine]:
    engine, trace = Engine(), RequestTrace("ollama", "/api/chat", "")
    path = "/api/chat" if "messages" in request else "/api/generate"
    question = Question(cast("Any", SimpleNamespace(path=path)), request, MODEL, None, trace)
    shorten = Shortening(cast("Any", engine), question, asked)
    refusal = EngineRefusalError(400, "too long", kind=TOO_LONG, context=context)
    body = await shorten(cast("Any", SimpleNamespace(runner=SimpleNamespace(context=None))), refusal)
    return orjson.loads(body), trace.truncated, engine


def conversation(*lengths: int, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": "word " * length} for n, length in enumerate(lengths)]
    request = {"model": "m", "messages": [{"role": "system", "content": "S"}, *messages], **more}
    return request, chat_body(request, MODEL)


async def test_what_the_template_refuses_does_not_fit() -> None:
    request, asked = conversation(10, 10, 10, 10, 10, tools=[TOOL], think=False)
    body, what, engine = await shortened(request, asked, 45)
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert what == "the oldest 2 of 6 messages"
    assert body.items() >= {"tools": asked["tools"], "temperature": 0.8, "stream": True}.items(), (
        "the rest is as it was"
    )
    for question in engine.asked:
        assert question["tools"] == asked["tools"]
        assert question["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(("context", "left"), [(1600, 3), (1500, 1), (700, 0)])
async def test_pictures_count(context: int, left: int) -> None:
    messages = [{"role": "user", "content": "look at it", "images": [PNG]} for _ in range(3)]
    if left == 3:
        messages[0] = {"role": "user", "content": "word " * 30}
    request = {"model": "m", "messages": messages}
    if not left:
        with pytest.raises(EngineRefusalError):
            await shortened(request, chat_body(request, MODEL), context)
        return
    body, _, engine = await shortened(request, chat_body(request, MODEL), context)
    assert len(body["messages"]) == (2 if left == 3 else 1)
    assert body["messages"][-1]["content"][1]["type"] == "image_url", "it is sent as it was"
    assert all(isinstance(m["content"], str) for question in engine.asked for m in question["messages"])


async def test_a_prompt_keeps_what_stands_around_it() -> None:
    request = {"model": "m", "prompt": "word " * 100, "system": "Be brief", "images": [PNG], "options": {"num_keep": 3}}
    _, asked = generate.plan(request, MODEL)
    body, what, _ = await shortened(request, asked, 768 + 2 + 43)
    system, turn = body["messages"]
    assert system == {"role": "system", "content": "Be brief"}
    assert turn["content"][0]["text"].split() == ["w0", "w1", "w2", *(f"w{n}" for n in range(80, 100))]
    assert turn["content"][1]["type"] == "image_url"
    assert what == "77 of 100 tokens in the middle of the prompt"


async def test_a_raw_prompt_is_cut_to_tokens() -> None:
    request = {"model": "m", "prompt": "word " * 100, "raw": True, "options": {"num_keep": 2}}
    _, asked = generate.plan(request, MODEL)
    body, _, _ = await shortened(request, asked, 42)
    assert body["prompt"] == [0, 1, *range(80, 100)]


@pytest.mark.parametrize("more", [{"truncate": False}, {"raw": False, "suffix": "x"}], ids=["whole", "infill"])
async def test_what_must_stay_whole_is_refused(more: dict[str, Any]) -> None:
    request = {"model": "m", "prompt": "word " * 100, "raw": True, **more}
    _, asked = generate.plan(request, MODEL)
    with pytest.raises(EngineRefusalError):
        await shortened(request, asked, 42)
