"""What well-known clients ask before and beside a chat, and how they read the answers: each is a small parser here that
fails where the client would. The engine is scripted; the official libraries are in test_ollama_clients.py."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from serving import TOOLS_TEMPLATE, Serving, scripted_config, serve, soon

try:
    from compression import zstd
except ImportError:  # before Python 3.14
    from backports import zstd

pytestmark = pytest.mark.asyncio(loop_scope="module")

CODER, EMBEDDER = "acme/coder:7b", "embedder"
HI = [{"role": "user", "content": "Hi"}]
WEATHER = {"name": "get_weather", "description": "Tells it.", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "get_weather", "arguments": '{"city":"Oslo"}'}
FIM = {f"tokenizer.ggml.{kind}_token_id": number for number, kind in enumerate(("prefix", "suffix", "middle"))}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("probes")
    large = {"llama.context_length": 32768, "general.basename": "Coder"}
    models = {
        CODER: {"context": 4096, "metadata": {**FIM, **large, "tokenizer.chat_template": TOOLS_TEMPLATE}},
        EMBEDDER: {"embeddings": True, "metadata": {"llama.pooling_type": 1}},
    }
    config, scripts = scripted_config(folder, models)
    async with serve(folder / "home", config, scripts) as serving:
        yield serving


@pytest.fixture(autouse=True)
def scripts_as_new(served: Serving) -> None:
    for script in served.scripts.values():
        script.set()


@pytest_asyncio.fixture(loop_scope="module")
async def http(served: Serving) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(served.ollama) as session:
        yield session


async def get(http: aiohttp.ClientSession, path: str) -> Any:
    async with http.get(path) as answer:
        assert answer.status == 200, path
        return await answer.json()


async def post(http: aiohttp.ClientSession, path: str, body: object, **headers: str) -> Any:
    async with http.post(path, json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def lines(http: aiohttp.ClientSession, path: str, body: object) -> list[dict[str, Any]]:
    """As the clients read them that parse each line, and each network chunk by itself."""
    found = []
    async with http.post(path, json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for chunk, _ in answer.content.iter_chunks():
            assert chunk.endswith(b"\n")
            found += [json.loads(line) for line in chunk.decode().splitlines()]
    return found


async def events(answer: aiohttp.ClientResponse) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in (await answer.text()).split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line)
        if fields and fields["data"] != "[DONE]":
            found.append((fields.get("event", ""), json.loads(fields["data"])))
    return found


# --- editors -------------------------------------------------------------------------------------------------------


async def test_vs_code_copilot(http: aiohttp.ClientSession, served: Serving) -> None:
    version = (await get(http, "/api/version"))["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)
    offered = {}
    for entry in (await get(http, "/api/tags"))["models"]:
        shown = await post(http, "/api/show", {"model": entry["model"]}, **{"User-Agent": "GitHubCopilotChat/0.32"})
        info = shown["model_info"]
        if "tools" in shown["capabilities"]:
            assert isinstance(info[f"{info['general.architecture']}.context_length"], int)
            offered[entry["model"]] = info["general.basename"]
    assert offered == {CODER: CODER}
    served.scripts[CODER].set(tokens=[], tool_calls=[CALL])
    body = {"model": CODER, "messages": HI, "stream": True, "tools": [{"type": "function", "function": WEATHER}],
            "stream_options": {"include_usage": True}}  # fmt: skip
    async with http.post("/v1/chat/completions", json=body) as answer:
        chunks = [data for _, data in await events(answer)]
    parts = [call for c in chunks if c["choices"] for call in c["choices"][0]["delta"].get("tool_calls", ())]
    assert "".join(part["function"]["arguments"] for part in parts) == CALL["arguments"]
    assert parts[0]["index"] == 0
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert chunks[-1]["usage"]["completion_tokens"] >= 0


async def test_zed(http: aiohttp.ClientSession) -> None:
    """Its structs are strict: no null for a string, no fraction for a size."""
    for entry in (await get(http, "/api/tags"))["models"]:
        assert isinstance(entry["size"], int)
        assert entry["size"] >= 0
        for text in (entry["name"], entry["digest"], entry["modified_at"]):
            assert isinstance(text, str)
        details = entry["details"]
        for name in ("parent_model", "format", "family", "parameter_size", "quantization_level"):
            assert isinstance(details[name], str), name
        assert all(isinstance(family, str) for family in details["families"])
        shown = await post(http, "/api/show", {"model": entry["name"]})
        assert isinstance(shown["capabilities"], list)
    body = {"model": CODER, "messages": HI, "stream": True, "keep_alive": -1, "think": True,
            "options": {"num_ctx": 4096, "stop": []}, "tools": []}  # fmt: skip
    chunks = await lines(http, "/api/chat", body)
    assert all(chunk["message"]["role"] == "assistant" for chunk in chunks)
    assert all(isinstance(chunk["message"]["content"], str) for chunk in chunks)
    assert chunks[-1]["done"] is True
    assert isinstance(chunks[-1]["prompt_eval_count"], int)


async def test_continue(http: aiohttp.ClientSession, served: Serving) -> None:
    shown = await post(http, "/api/show", {"name": CODER})
    parameters = dict(re.findall(r"^(\w+)\s+(.+)$", shown["parameters"], re.MULTILINE))
    assert int(parameters["num_ctx"]) == 4096
    assert ".Suffix" in shown["template"], "what it takes for a sign of fill-in-the-middle"
    assert "insert" in shown["capabilities"]
    body = {"model": CODER, "prompt": "def f(", "suffix": "return 1", "raw": False, "keep_alive": 1800,
            "options": {"num_ctx": 4096, "num_predict": 5, "temperature": 0.01, "stop": ["\n\n"]}}  # fmt: skip
    chunks = await lines(http, "/api/generate", body)
    assert "".join(chunk["response"] for chunk in chunks) == "Hello there!"
    assert served.scripts[CODER].requests("/infill")


async def test_jetbrains(http: aiohttp.ClientSession) -> None:
    for path in ("/api/version/", "/api/tags/"):
        assert await get(http, path)
    assert await post(http, "/api/show/", {"model": CODER})
    whole = await post(http, "/api/chat/", {"model": CODER, "messages": HI, "stream": False})
    assert whole["message"]["content"] == "Hello there!"


async def test_codex(http: aiohttp.ClientSession, served: Serving) -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": None}
    body = {
        "model": CODER, "instructions": "You code.", "store": False, "stream": True, "parallel_tool_calls": False,
        "tool_choice": "auto", "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "medium"},
        "prompt_cache_key": "x", "text": {"verbosity": "low"},
        "tools": [{"type": "function", "strict": False, **WEATHER}, {"type": "local_shell"}, {"type": "web_search"}],
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Rules."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            thought,
            {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c1"},
            {"type": "function_call_output", "call_id": "c1", "output": "done"},
        ],
    }  # fmt: skip
    packed = zstd.compress(json.dumps(body).encode())
    headers = {"Content-Encoding": "zstd", "Content-Type": "application/json", "Accept": "text/event-stream",
               "OpenAI-Beta": "responses=experimental", "Authorization": "Bearer none"}  # fmt: skip
    async with http.post("/v1/responses", data=packed, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        found = await events(answer)
    done = [data["item"] for name, data in found if name == "response.output_item.done"]
    assert [part["text"] for item in done for part in item["content"]] == ["Hello there!"]
    name, last = found[-1]
    assert name == "response.completed"
    assert isinstance(last["response"]["id"], str)
    assert all(isinstance(last["response"]["usage"][f"{kind}_tokens"], int) for kind in ("input", "output", "total"))
    asked = served.scripts[CODER].asked("/v1/responses")
    assert [item["type"] for item in asked["input"]] == ["message", "message", "function_call", "function_call_output"]


@pytest.mark.parametrize("port", ["ollama", "lmstudio"])
async def test_claude_code(served: Serving, port: str) -> None:
    headers = {
        "x-api-key": "none",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "interleaved-thinking-2025-05-14",
    }
    body = {
        "model": CODER, "max_tokens": 32000, "stream": True, "metadata": {"user_id": "u"},
        "system": [{"type": "text", "text": "You code.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [
            {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}],
        "tools": [{"name": "Bash", "description": "Runs it.", "input_schema": {"type": "object", "properties": {}}}],
    }  # fmt: skip
    async with aiohttp.ClientSession(served.url(port), headers=headers) as session:
        async with session.post("/v1/messages?beta=true", json=body) as answer:
            assert answer.status == 200, await answer.text()
            found = await events(answer)
        counted = {name: body[name] for name in ("model", "messages", "system", "tools")}
        assert (await post(session, "/v1/messages/count_tokens?beta=true", counted))["input_tokens"] == 1
    assert found[0][1]["message"]["usage"]["input_tokens"] >= 0
    text = [data["delta"]["text"] for name, data in found if name == "content_block_delta"]
    assert "".join(text) == "Hello there!"
    assert found[-2][1]["delta"]["stop_reason"] == "end_turn"


# --- front ends and libraries --------------------------------------------------------------------------------------


async def test_open_webui(http: aiohttp.ClientSession) -> None:
    version = (await get(http, "/api/version"))["version"]
    assert tuple(int(part) for part in re.sub(r"^v|-.*", "", version).split("."))
    await lines(http, "/api/chat", {"model": CODER, "messages": HI, "options": {}, "keep_alive": "10m"})
    listed = {entry["model"]: entry for entry in (await get(http, "/api/tags"))["models"]}
    (running,) = [entry for entry in (await get(http, "/api/ps"))["models"] if entry["model"] in listed]
    assert running["model"] == CODER, "it joins the two by this"
    expires = datetime.fromisoformat(running["expires_at"])
    assert timedelta(minutes=9) < expires - datetime.now(UTC) <= timedelta(minutes=10)
    whole = await post(http, "/api/generate", {"model": CODER, "keep_alive": 0, "prompt": ""})
    assert (whole["done"], whole["done_reason"]) == (True, "unload")
    last = (await lines(http, "/api/chat", {"model": CODER, "messages": HI}))[-1]
    assert last["eval_count"] / (last["eval_duration"] / 1e9) > 0
    assert last["prompt_eval_count"] / (last["prompt_eval_duration"] / 1e9) > 0
    async with http.post("/api/chat", json={"model": "nobody", "messages": HI}) as answer:
        assert (answer.status, answer.content_type) == (404, "application/json")
        assert isinstance((await answer.json())["error"], str)


async def test_home_assistant(http: aiohttp.ClientSession, served: Serving) -> None:
    async with asyncio.timeout(5):
        assert CODER in [entry["model"] for entry in (await get(http, "/api/tags"))["models"]]
    served.scripts[CODER].set(tokens=["Let me look."], tool_calls=[CALL])
    body = {"model": CODER, "messages": [{"role": "system", "content": "You run a home."}, *HI], "stream": True,
            "think": False, "keep_alive": "-1s", "options": {"num_ctx": 8192},
            "tools": [{"type": "function", "function": WEATHER}]}  # fmt: skip
    chunks = await lines(http, "/api/chat", body)
    calls = [call for chunk in chunks for call in chunk["message"].get("tool_calls", ())]
    assert [call["function"]["arguments"] for call in calls] == [{"city": "Oslo"}], "whole, and an object"
    assert chunks[-1]["done_reason"] == "stop"
    running = await _running(http, CODER)
    assert running is not None
    assert running["context_length"] == 8192


async def test_lite_llm(http: aiohttp.ClientSession) -> None:
    shown = await post(http, "/api/show", {"name": CODER})
    assert "tools" in shown["template"]
    length = next(value for key, value in shown["model_info"].items() if "context_length" in key)
    assert (type(length), length) == (int, 32768)
    async with http.get("/api/models") as answer:
        assert answer.status == 404, "which it tries as well"
    embedded = await post(http, "/api/embed", {"model": EMBEDDER, "input": ["a", "b"]})
    assert [len(vector) for vector in embedded["embeddings"]] == [8, 8]
    assert isinstance(embedded["prompt_eval_count"], int)


async def test_vercels_ai_sdk(http: aiohttp.ClientSession) -> None:
    """Its schemas take no null."""
    for chunk in await lines(http, "/api/chat", {"model": CODER, "messages": HI}):
        assert isinstance(chunk["created_at"], str)
        assert isinstance(chunk["done"], bool)
        assert isinstance(chunk["message"]["content"], str)
        assert "thinking" not in chunk["message"] or isinstance(chunk["message"]["thinking"], str)
    last = (await lines(http, "/api/generate", {"model": CODER, "prompt": "Hi"}))[-1]
    assert all(isinstance(token, int) for token in last["context"])
    assert last["context"]


# --- Ollama's own command line -------------------------------------------------------------------------------------


async def test_the_ollama_cli(http: aiohttp.ClientSession, served: Serving) -> None:
    async with http.head("/") as answer:
        assert answer.status == 200
    assert (await get(http, "/api/status"))["cloud"]["disabled"] is True
    async with http.post("/api/me") as answer:
        assert answer.status in (401, 503)
    await post(http, "/api/show", {"model": CODER})
    loaded = await post(http, "/api/generate", {"model": CODER, "keep_alive": "-1m"})
    assert loaded["done_reason"] == "load"
    running = await _running(http, CODER)
    assert running is not None
    assert re.fullmatch("[0-9a-f]{12}", running["digest"][:12])
    forever = datetime.fromisoformat(running["expires_at"])
    assert forever - datetime.now(UTC) > timedelta(days=100 * 365), 'shown as "Forever"'
    assert 0 <= running["size_vram"] <= running["size"]
    assert isinstance(running["size"], int)
    stopped = await post(http, "/api/generate", {"model": CODER, "keep_alive": 0})
    assert stopped["done_reason"] == "unload"
    await soon(lambda: CODER not in [model.name for model in served.service.manager.loaded])
    assert await _running(http, CODER) is None
    for entry in (await get(http, "/api/tags"))["models"]:
        assert entry["digest"][:12]
        assert datetime.fromisoformat(entry["modified_at"]).tzinfo is not None


async def _running(http: aiohttp.ClientSession, model: str) -> dict[str, Any] | None:
    return next((entry for entry in (await get(http, "/api/ps"))["models"] if entry["model"] == model), None)
