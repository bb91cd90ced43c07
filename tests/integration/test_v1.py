"""/v1 on both ports, against scripted engines: what is changed on the way, figures, errors, compressed bodies."""

from __future__ import annotations

import base64
import gzip
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import psutil
import pytest
import pytest_asyncio
from gguf_file import projector_bytes
from serving import Serving, scripted_config, serve, soon

from llamarunner.catalog.catalog import Capability

try:
    from compression import zstd
except ImportError:  # before Python 3.14
    from backports import zstd

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 200_000
HI = [{"role": "user", "content": "Hi"}]
ASK: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 50},
}
NAMED = ["/v1/responses", "/v1/messages"]
PORTS = ["ollama", "lmstudio"]
FIM = {f"tokenizer.ggml.{kind}_token_id": number for number, kind in enumerate(("prefix", "suffix", "middle"))}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def fake(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("v1")
    (folder / "mmproj.gguf").write_bytes(projector_bytes())
    models = {
        "smol": {"embeddings": True, "keep_alive": -1, "metadata": FIM},
        "roomy": {"context": 2048, "keep_alive": -1, "metadata": {"llama.context_length": 32768}},
        "plain": {"keep_alive": -1, "metadata": {"tokenizer.chat_template": "{{ messages }}"}},
        "ranker": {"keep_alive": -1, "flags": {"reranking": True}},
        "sight": {"keep_alive": -1, "mmproj": str(folder / "mmproj.gguf")},
    }
    config, scripts = scripted_config(folder, models)
    config["server"] = {"max_body": LIMIT}
    async with serve(folder / "home", config, scripts) as serving:
        yield serving


@pytest.fixture(autouse=True)
def scripts_as_new(fake: Serving) -> None:
    for script in fake.scripts.values():
        script.set()


@pytest.fixture(params=PORTS)
def port(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def ask(fake: Serving, port: str, path: str, *, model: str = "smol", **more: Any) -> tuple[int, Any]:
    body = {"model": model, **ASK.get(path, {}), **more}
    async with aiohttp.ClientSession(fake.url(port)) as session, session.post(path, json=body) as answer:
        raw = await answer.text()
        return answer.status, raw if answer.content_type == "text/event-stream" else json.loads(raw)


def events(raw: str) -> list[tuple[str, dict[str, Any]]]:
    """Name ("" for none) and data of each event, `[DONE]` left out."""
    found = []
    for block in raw.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line)
        if fields and fields["data"] != "[DONE]":
            found.append((fields.get("event", ""), json.loads(fields["data"])))
    return found


# --- what passes through -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ASK)
@pytest.mark.parametrize("stream", [False, True])
async def test_figures_are_noted(fake: Serving, port: str, path: str, stream: bool) -> None:
    status, _ = await ask(fake, port, path, stream=stream)
    trace = (await soon(lambda: [t for t in fake.finished if t.endpoint == path]))[-1]
    assert (status, trace.status, trace.error, trace.stream) == (200, 200, "", stream)
    assert (trace.prompt_tokens, trace.output_tokens) == (7, 3)
    assert trace.model == "smol"
    assert trace.first_byte


async def test_the_list_of_models_has_a_head(fake: Serving, port: str) -> None:
    async with aiohttp.ClientSession(fake.url(port)) as session:
        for path in ("/v1/models", "/v1/models/", "/v1/models/smol"):
            async with session.head(path) as answer:
                assert (answer.status, await answer.read()) == (200, b"")


async def test_events_of_messages_pass_untouched(fake: Serving, port: str) -> None:
    _, raw = await ask(fake, port, "/v1/messages", stream=True)
    names = [name for name, _ in events(raw)]
    assert names == ["message_start", "content_block_start", *["content_block_delta"] * 3, "content_block_stop",
                     "message_delta", "message_stop"]  # fmt: skip
    assert all(name == data["type"] for name, data in events(raw))
    _, whole = await ask(fake, port, "/v1/messages")
    assert whole["content"] == [{"type": "text", "text": "Hello there!"}]
    status, counted = await ask(fake, port, "/v1/messages/count_tokens", messages=[*HI, *HI])
    assert (status, counted) == (200, {"input_tokens": 2})


async def test_events_of_responses_get_what_clients_read(fake: Serving, port: str) -> None:
    _, raw = await ask(fake, port, "/v1/responses", stream=True)
    records = events(raw)
    assert [data["sequence_number"] for _, data in records] == list(range(len(records)))
    assert all(name == data["type"] for name, data in records)
    deltas = [data for name, data in records if name == "response.output_text.delta"]
    assert "".join(data["delta"] for data in deltas) == "Hello there!"
    assert all((d["output_index"], d["content_index"], d["logprobs"]) == (0, 0, []) for d in deltas)
    begun, ended = records[0][1]["response"], records[-1][1]["response"]
    assert (begun["output"], begun["tools"], begun["error"], begun["usage"]) == ([], [], None, None)
    assert begun["created_at"] > 0
    assert ended["output"][0]["content"][0]["text"] == "Hello there!"
    assert ended["usage"]["total_tokens"] == 10


async def test_a_newer_engine_says_it_all_itself(fake: Serving) -> None:
    begun = {"type": "response.created", "sequence_number": 0, "response": {"id": "r", "object": "response"}}
    delta = {
        "type": "response.output_text.delta",
        "sequence_number": 1,
        "output_index": 3,
        "item_id": "m",
        "delta": "x",
    }
    fake.scripts["smol"].replay("".join(f"data: {json.dumps(event)}\n\n" for event in (begun, delta)))
    _, raw = await ask(fake, "ollama", "/v1/responses", stream=True)
    assert [data["sequence_number"] for _, data in events(raw)] == [0, 1]
    assert events(raw)[1][1] == delta


async def test_items_of_a_response_keep_their_places(fake: Serving) -> None:
    thought, call = {"type": "reasoning", "id": "rs_1"}, {"type": "function_call", "call_id": "fc_1"}
    written = [
        {"type": "response.output_item.added", "item": thought},
        {"type": "response.reasoning_text.delta", "item_id": "rs_1", "delta": '"output_index": '},
        {"type": "response.output_item.added", "item": call},
        {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "delta": "{"},
        {"type": "response.output_item.done", "item": thought},
        {"type": "response.output_item.done", "item": call},
    ]
    compact = [json.dumps(event, separators=(",", ":")) for event in written]
    fake.scripts["smol"].replay("".join(f"data: {text}\n\n" for text in compact), chunk_bytes=7)
    _, raw = await ask(fake, "ollama", "/v1/responses", stream=True)
    found = [data for _, data in events(raw)]
    assert [data["output_index"] for data in found] == [0, 0, 1, 1, 0, 1]
    assert [data["sequence_number"] for data in found] == [0, 1, 2, 3, 4, 5]
    assert found[1]["delta"] == '"output_index": '
    assert "content_index" not in found[3]


async def test_only_functions_are_tools(fake: Serving, port: str) -> None:
    tools = [{"type": "web_search"}, {"type": "function", "name": "f", "parameters": {}}, {"type": "local_shell"}]
    assert (await ask(fake, port, "/v1/responses", tools=tools))[0] == 200
    assert fake.scripts["smol"].asked("/v1/responses")["tools"] == [tools[1]]
    for wrong in ([{"type": "function"}], [5], "f", [{"name": "f"}]):
        assert (await ask(fake, port, "/v1/responses", tools=wrong))[0] == 400


async def test_thoughts_that_cannot_be_read_are_left_out(fake: Serving, port: str) -> None:
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": "x"}
    message = {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
    status, _ = await ask(fake, port, "/v1/responses", input=[sealed, message])
    assert status == 200
    assert fake.scripts["smol"].asked("/v1/responses")["input"] == [message]


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [
        ({"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True},
         {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}),
        ({"type": "json_object"}, {"type": "json_object"}), ({"type": "text"}, None),
    ],
)  # fmt: skip
async def test_the_format_of_a_response(fake: Serving, port: str, wanted: Any, asked: Any) -> None:
    assert (await ask(fake, port, "/v1/responses", text={"format": wanted}))[0] == 200
    assert fake.scripts["smol"].asked("/v1/responses").get("response_format") == asked


# --- Ollama's defaults and extensions ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_ollamas_defaults(fake: Serving, path: str) -> None:
    await ask(fake, "ollama", path, temperature=0.5)
    asked = fake.scripts["smol"].asked(path)
    assert (asked["temperature"], asked["top_p"]) == (0.5, 1.0)
    await ask(fake, "lmstudio", path)
    assert "temperature" not in fake.scripts["smol"].asked(path)


@pytest.mark.parametrize(
    ("fields", "kwargs"),
    [
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"reasoning_effort": "minimal"}, {"enable_thinking": True, "reasoning_effort": "low"}),
        ({"reasoning_effort": "xhigh"}, {"enable_thinking": True, "reasoning_effort": "max"}),
        ({"reasoning": {"effort": "high"}}, {"enable_thinking": True, "reasoning_effort": "high"}),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
         {"enable_thinking": False, "reasoning_effort": "low"}),
    ],
)  # fmt: skip
async def test_efforts(fake: Serving, fields: dict[str, Any], kwargs: dict[str, Any]) -> None:
    for path in ("/v1/chat/completions", "/v1/responses"):
        status, _ = await ask(fake, "ollama", path, **fields)
        assert status == 200
        assert fake.scripts["smol"].asked(path)["chat_template_kwargs"] == kwargs


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/chat/completions", {"num_ctx": 4096}), ("/v1/messages", {"options": {"num_ctx": 8192}})],
)
async def test_num_ctx_is_heeded(fake: Serving, path: str, fields: dict[str, Any]) -> None:
    wanted = fields.get("num_ctx") or fields["options"]["num_ctx"]
    assert (await ask(fake, "ollama", path, model="roomy", **fields))[0] == 200
    async with aiohttp.ClientSession(fake.ollama) as session, session.get("/api/ps") as answer:
        (running,) = [m for m in (await answer.json())["models"] if m["model"] == "roomy:latest"]
    assert running["context_length"] == wanted
    status, answer = await ask(fake, "ollama", path, model="roomy", num_ctx="many")
    assert (status, answer["error"]["message"]) == (400, 'option "num_ctx" must be of type integer')


async def test_keep_alive_is_heeded(fake: Serving) -> None:
    for minutes, path in enumerate(ASK, start=90):
        assert (await ask(fake, "ollama", path, keep_alive=f"{minutes}m"))[0] == 200
        place = fake.service.manager.residence("smol")
        assert place is not None
        assert place.keep_alive_s == 60 * minutes
    status, answer = await ask(fake, "ollama", "/v1/messages", keep_alive="soon")
    assert (status, answer["error"]["message"]) == (400, 'time: invalid duration "soon"')


async def test_an_effort_of_a_model_that_does_not_think(fake: Serving) -> None:
    status, answer = await ask(fake, "ollama", "/v1/chat/completions", model="plain", reasoning_effort="low")
    assert (status, answer["error"]["message"]) == (400, '"plain" does not support thinking')
    status, _ = await ask(fake, "ollama", "/v1/responses", model="plain", reasoning={"effort": "low"})
    assert status == 200
    assert "chat_template_kwargs" not in fake.scripts["plain"].asked("/v1/responses")


async def test_a_suffix_is_infilled(fake: Serving, port: str) -> None:
    model = next(model for model in fake.service.catalog if model.name == "smol")
    assert Capability.INSERT in model.capabilities
    fields = {"prompt": "def f(", "suffix": "return 1", "max_tokens": 9, "temperature": 0.5}
    _, whole = await ask(fake, port, "/v1/completions", **fields)
    asked = fake.scripts["smol"].asked("/infill")
    assert (asked["input_prefix"], asked["input_suffix"], asked["n_predict"]) == ("def f(", "return 1", 9)
    assert asked["temperature"] == 0.5
    assert whole["object"] == "text_completion"
    assert whole["choices"] == [{"text": "Hello there!", "index": 0, "logprobs": None, "finish_reason": "stop"}]
    assert whole["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    _, raw = await ask(fake, port, "/v1/completions", stream=True, **{**fields, "max_tokens": 2})
    assert raw.endswith("data: [DONE]\n\n")
    assert raw.count("[DONE]") == 1
    records = [data for _, data in events(raw)]
    assert "".join(record["choices"][0]["text"] for record in records) == "Hello there"
    assert records[-1]["choices"][0]["finish_reason"] == "length"
    assert {record["id"] for record in records} == {records[0]["id"]}


async def test_fewer_dimensions(fake: Serving, port: str) -> None:
    _, full = await ask(fake, port, "/v1/embeddings", input=["a", "bc"])
    _, short = await ask(fake, port, "/v1/embeddings", input=["a", "bc"], dimensions=3)
    for whole, cut in zip(full["data"], short["data"], strict=True):
        assert sum(value * value for value in cut["embedding"]) == pytest.approx(1)
        ratio = whole["embedding"][1] / cut["embedding"][1]
        assert [value * ratio for value in cut["embedding"]] == pytest.approx(whole["embedding"][:3])
    assert "dimensions" not in fake.scripts["smol"].asked("/v1/embeddings")
    _, packed = await ask(fake, port, "/v1/embeddings", input=["a", "bc"], dimensions=3, encoding_format="base64")
    vector = struct.unpack("<3f", base64.b64decode(packed["data"][0]["embedding"]))
    assert list(vector) == pytest.approx(short["data"][0]["embedding"])
    _, more = await ask(fake, port, "/v1/embeddings", input="a", dimensions=99)
    assert len(more["data"][0]["embedding"]) == len(full["data"][0]["embedding"])


async def test_tokens_and_their_text(fake: Serving, port: str) -> None:
    status, answer = await ask(fake, port, "/tokenize", content="Hi")
    assert (status, answer) == (200, {"tokens": [72, 105]})
    assert await ask(fake, port, "/detokenize", tokens=[72, 105]) == (200, {"content": "Hi"})
    for path, wrong in (("/tokenize", {}), ("/detokenize", {"tokens": [-1]}), ("/detokenize", {"tokens": [True]})):
        assert (await ask(fake, port, path, **wrong))[0] == 400


async def test_reranking(fake: Serving, port: str) -> None:
    fields = {"query": "Oslo", "documents": ["a", "b"]}
    status, answer = await ask(fake, port, "/v1/rerank", model="ranker", **fields)
    assert (status, [each["index"] for each in answer["results"]]) == (200, [0, 1])
    status, answer = await ask(fake, port, "/v1/rerank", **fields)
    assert status == 400
    assert "flags.reranking = true" in answer["error"]["message"]


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*ASK, "/v1/messages/count_tokens"])
async def test_an_error_before_the_answer_has_its_apis_shape(fake: Serving, port: str, path: str) -> None:
    status, answer = await ask(fake, port, path, model="zzz", messages=HI)
    assert status == 404
    if path.startswith("/v1/messages"):
        assert answer["type"] == "error"
        assert answer["error"]["type"] == "not_found_error"
        assert answer["request_id"].startswith("req_")
    else:
        assert set(answer) == {"error"}
        assert answer["error"]["type"] in ("not_found_error", "invalid_request_error")
    assert "zzz" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is required and must be positive"),
        ({"max_tokens": None}, "max_tokens is required and must be positive"),
        ({"messages": []}, "messages is required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 'messages[0].role must be "user" or "assistant"'),
        ({"messages": [{"role": "user", "content": 5}]},
         "messages[0].content must be a string or an array, not number"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages[0].content[0].text must be a string, not null"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]},
         "messages[0].content[0]: documents are not supported (send their text)"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]},
         "smol does not support vision"),
        ({"system": [{"type": "text", "text": 5}]}, "system[0].text must be a string, not number"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name must be a string, not null"),
    ],
)  # fmt: skip
async def test_what_is_wrong_with_a_message(fake: Serving, port: str, body: dict[str, Any], message: str) -> None:
    status, answer = await ask(fake, port, "/v1/messages", **body)
    assert (status, answer["error"]) == (400, {"type": "invalid_request_error", "message": message})


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/v1/chat/completions", {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}),
        ("/v1/responses", {"type": "input_image", "image_url": "file:///etc/passwd"}),
        ("/v1/responses", {"type": "function_call_output", "call_id": "a", "output": [
            {"type": "input_image", "image_url": "http://127.0.0.1:1/x.png"}]}),
        ("/v1/messages", {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/x.png"}}),
        ("/v1/messages", {"type": "tool_result", "tool_use_id": "a", "content": [
            {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/x.png"}}]}),
    ],
)  # fmt: skip
async def test_no_engine_is_sent_for_a_picture(fake: Serving, port: str, path: str, part: dict[str, Any]) -> None:
    key = "input" if path == "/v1/responses" else "messages"
    item = part if part["type"] == "function_call_output" else {"role": "user", "content": [part]}
    status, answer = await ask(fake, port, path, model="sight", **{key: [item]})
    text = answer["error"] if isinstance(answer["error"], str) else answer["error"]["message"]
    wanted = "image URLs are not currently supported, please use base64 encoded data instead"
    assert (status, text) == (400, wanted)
    assert not fake.scripts["sight"].requests()


@pytest.mark.parametrize("path", NAMED)
async def test_an_engine_that_breaks_off_ends_with_an_error_event(fake: Serving, port: str, path: str) -> None:
    fake.scripts["smol"].set(drop="token:2", delay_s=0.01)
    _, raw = await ask(fake, port, path, stream=True)
    name, data = events(raw)[-1]
    assert (name, data["type"]) == ("error", "error")
    if path == "/v1/messages":
        assert data["error"]["type"] == "api_error"
        assert "unexpectedly stopped" in data["error"]["message"]
    else:
        assert data["code"] == "server_error"
        assert "unexpectedly stopped" in data["message"]
    assert fake.finished[-1].error


@pytest.mark.parametrize("path", NAMED)
async def test_an_engines_own_error_event_is_put_into_shape(fake: Serving, port: str, path: str) -> None:
    inner = '{"code":500,"message":"Compute error.","type":"server_error"}'
    written = f"event: error\ndata: {inner}" if path == "/v1/messages" else f'data: {{"error":{inner}}}'
    fake.scripts["smol"].replay(f"{written}\n\n")
    _, raw = await ask(fake, port, path, stream=True)
    ((name, data),) = events(raw)
    assert (name, data["type"]) == ("error", "error")
    assert (data["error"] if path == "/v1/messages" else data)["message"] == "Compute error."
    assert fake.finished[-1].error == "the engine reported an error"


@pytest.mark.parametrize("path", NAMED)
async def test_an_engine_without_the_api_is_told(fake: Serving, port: str, path: str) -> None:
    missing = {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}
    fake.scripts["smol"].set(http_error={"status": 404, "body": missing})
    status, answer = await ask(fake, port, path)
    text = answer["error"] if isinstance(answer["error"], str) else answer["error"]["message"]
    assert status == 400
    assert text == (
        f"the engine of smol does not serve {path}, use /v1/chat/completions instead (it says: File Not Found)"
    )


async def test_an_overloaded_engine_in_anthropics_words(fake: Serving, port: str) -> None:
    busy = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
    fake.scripts["smol"].set(http_error={"status": 503, "body": busy})
    status, answer = await ask(fake, port, "/v1/messages")
    assert (status, answer["error"]["type"]) == (503, "overloaded_error")


# --- compressed bodies ---------------------------------------------------------------------------------------------


def compressed(data: bytes, encoding: str) -> bytes:
    return gzip.compress(data) if encoding == "gzip" else zstd.compress(data)


@pytest.mark.parametrize("path", [*ASK, "/api/chat"])
async def test_half_an_emoji_reaches_no_engine(fake: Serving, path: str) -> None:
    whole = json.dumps({"model": "smol", **ASK.get(path, {"messages": HI})})
    cut = whole.replace("Hi", r"\ud83d cut")
    async with aiohttp.ClientSession(fake.ollama) as session, session.post(path, data=cut) as answer:
        assert answer.status == 200, await answer.text()
    assert "\ufffd cut" in json.dumps(fake.scripts["smol"].asked(), ensure_ascii=False)


@pytest.mark.parametrize("encoding", ["zstd", "gzip"])
async def test_compressed_bodies(fake: Serving, port: str, encoding: str) -> None:
    body = json.dumps({"model": "smol", "input": "Hi " * 1000}).encode()
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    async with aiohttp.ClientSession(fake.url(port)) as session:
        data = compressed(body, encoding)
        async with session.post("/v1/responses", data=data, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
        for broken in (data[: len(data) // 2], b"not compressed at all", data[:20] + b"\xff" * 20):
            async with session.post("/v1/responses", data=broken, headers=headers) as answer:
                assert answer.status == 400, await answer.text()


@pytest.mark.parametrize("encoding", ["zstd", "gzip"])
async def test_a_body_that_unpacks_too_large_is_refused_early(fake: Serving, port: str, encoding: str) -> None:
    bomb = compressed(bytes(120 * 1024**2), encoding)
    before = psutil.Process().memory_info().rss
    headers = {"Content-Encoding": encoding}
    async with (
        aiohttp.ClientSession(fake.url(port)) as session,
        session.post("/v1/messages", data=bomb, headers=headers) as answer,
    ):
        assert answer.status == 413
        assert (await answer.json())["error"]["type"] == "request_too_large"
    assert psutil.Process().memory_info().rss - before < 60 * 1024**2
