"""Bodies, paths and names that are not what they should be, over real HTTP. Nothing here needs an engine to run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson
import psutil
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Serving, scripted_config, serve
from wire import connection, read_answer, read_head, request_bytes, send
from yarl import URL

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 100_000
NAMES = ["模型 七/β🦙", "a/b/c:q4", "with space", "per%cent", "q?x#y", "MiXed"]
GENERATING = {
    "ollama": [
        "/api/chat",
        "/api/generate",
        "/api/embed",
        "/api/embeddings",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
    ],
    "lmstudio": ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/api/v0/chat/completions"],
}
NAMED = ["/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]  # on both ports
POSTED = [(base, path) for base, paths in GENERATING.items() for path in [*paths, *NAMED]] + [("ollama", "/api/show")]
HI = [{"role": "user", "content": "Hi"}]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("bad")
    models: dict[str, Any] = {name: {} for name in NAMES} | {"smol": {"embeddings": True}}
    config, scripts = scripted_config(folder, models)
    config["server"] = {"max_body": LIMIT}
    async with serve(folder / "home", config, scripts) as serving:
        yield serving


async def post(served: Serving, base: str, path: str, body: object, **headers: str) -> tuple[int, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession(served.url(base)) as session, session.post(path, data=raw, headers=headers) as got:
        if got.content_type == "text/plain":
            return got.status, await got.text()
        return got.status, json.loads((await got.read()).splitlines()[-1])


def words(answer: Any) -> str:
    error = answer["error"]
    return str(error if isinstance(error, str) else error["message"])


# --- bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "path"), POSTED)
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "missing request body"),
        (b"hello", "invalid character 'h' looking for beginning of value"),
        (b'{"model":', "unexpected EOF"),
        (b'["model"]', "json: cannot unmarshal array into "),
        ('{"model":"smol"}'.encode("utf-16"), "the request body must be UTF-8, and this looks like UTF-16"),
        (b'{"model":"\xff"}', "the request body is not valid UTF-8"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "json: exceeded max depth"),
    ],
    ids=["empty", "text", "cut", "array", "utf-16", "utf-8", "deep"],
)
async def test_what_is_no_json_object(served: Serving, base: str, path: str, body: bytes, message: str) -> None:
    status, answer = await post(served, base, path, body)
    assert status == 400
    assert words(answer) == message if not message.endswith(" ") else words(answer).startswith(message)


@pytest.mark.parametrize(
    ("base", "path", "body", "status", "message"),
    [
        ("ollama", "/api/chat", {}, 400, "model is required"),
        ("ollama", "/api/show", {}, 400, "model is required"),
        ("ollama", "/api/generate", {}, 404, "model '' not found"),
        ("ollama", "/api/generate", {"model": None}, 404, "model '' not found"),
        ("ollama", "/api/chat", {"model": "smal", "messages": HI}, 404, "model 'smal' not found, did you mean 'smol'?"),
        ("ollama", "/api/show", {"name": "zzz"}, 404, "model 'zzz' not found"),
        ("ollama", "/api/chat", {"model": 5},
         400, "json: cannot unmarshal number into Go struct field ChatRequest.model of type string"),
        ("ollama", "/api/chat", {"model": "smol", "messages": "hi"},
         400, "json: cannot unmarshal string into Go struct field ChatRequest.messages of type []api.Message"),
        ("ollama", "/api/chat", {"model": "smol", "messages": [5]},
         400, "json: cannot unmarshal number into Go struct field ChatRequest.messages of type api.Message"),
        ("ollama", "/api/chat", {"model": "smol", "messages": [{"role": "user", "content": ["x"]}]},
         400, "json: cannot unmarshal array into Go struct field ChatRequest.messages.content of type string"),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "stream": "yes"},
         400, "json: cannot unmarshal string into Go struct field ChatRequest.stream of type bool"),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "options": []},
         400, "json: cannot unmarshal array into Go struct field ChatRequest.options of type map[string]interface {}"),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "options": {"num_ctx": "4096"}},
         500, 'option "num_ctx" must be of type integer'),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "options": {"temperature": "hot"}},
         500, 'option "temperature" must be of type float32'),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "options": {"use_mmap": 1}},
         500, 'option "use_mmap" must be of type boolean'),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "options": {"stop": "x"}},
         500, 'option "stop" must be of type array'),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "options": {"stop": [1]}},
         500, 'option "stop" must be of an array of strings'),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "format": "xml"},
         400, 'invalid format: "xml"; expected "json" or a valid JSON Schema object'),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "think": "hard"},
         400, 'invalid think value: "hard" (must be "high", "medium", "low", "max", true, or false)'),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "top_logprobs": 21},
         400, "top_logprobs must be between 0 and 20"),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "keep_alive": "10"},
         400, 'time: missing unit in duration "10"'),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "keep_alive": "abc"},
         400, 'time: invalid duration "abc"'),
        ("ollama", "/api/chat", {"model": "smol", "messages": HI, "keep_alive": True}, 400, "Unsupported type: 'bool'"),
        ("ollama", "/api/chat", {"model": "smol", "messages": [{"role": "user", "content": "x", "images": ["AA=="]}]},
         400, "smol does not support vision"),
        ("ollama", "/api/generate", {"model": "smol", "prompt": "x", "suffix": "y"},
         400, "smol does not support insert"),
        ("ollama", "/api/generate", {"model": "smol", "prompt": "x", "raw": True, "system": "y"},
         400, "raw mode does not support template, system, or context"),
        ("ollama", "/api/generate", {"model": "smol", "prompt": "x", "raw": True, "context": [1]},
         400, "raw mode does not support template, system, or context"),
        ("ollama", "/v1/chat/completions", {"model": "smol", "messages": []}, 400, "[] is too short - 'messages'"),
        ("ollama", "/v1/chat/completions", {"messages": HI}, 400, "model is required"),
        ("ollama", "/v1/chat/completions", {"model": ["smol"]}, 400, "model must be a string, not array"),
        ("ollama", "/v1/chat/completions", {"model": "smol", "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}]},
         400, "smol does not support vision"),
        ("ollama", "/v1/chat/completions", {"model": "smol", "messages": HI, "reasoning_effort": "hard"},
         400, 'invalid reasoning value: "hard" (must be "high", "medium", "low", "max", or "none")'),
        ("ollama", "/v1/completions", {"model": "smol", "prompt": "x", "suffix": "y"},
         400, "smol does not support insert"),
        ("ollama", "/v1/embeddings", {"model": "smol", "input": "x", "dimensions": 0},
         400, "dimensions must be a positive number"),
        ("ollama", "/v1/responses", {"model": "smol"}, 400, "input must be a string or an array, not null"),
        ("ollama", "/v1/responses", {"model": "smol", "input": [5]}, 400, "input[0] must be an object, not number"),
        ("ollama", "/v1/responses",
         {"model": "smol", "input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400,
         "smol does not support vision"),
        ("ollama", "/v1/responses", {"model": "smol", "input": "x", "previous_response_id": "resp_1"},
         400, "previous_response_id is not supported: no answers are kept (send the whole `input`)"),
        ("lmstudio", "/v1/chat/completions", {"model": "smol"}, 400, "'messages' field is required"),
        ("lmstudio", "/api/v0/chat/completions", {"model": "smol"}, 400, "'messages' field is required"),
        ("lmstudio", "/v1/completions", {"model": "smol"}, 400, "'prompt' field is required"),
        ("lmstudio", "/v1/embeddings", {"model": "smol"}, 400, "'input' field is required"),
        ("lmstudio", "/v1/embeddings", {"model": "MiXed", "input": "x"}, 400,
         "MiXed does not support embeddings (set `embeddings = true` for it in config.toml)"),
        ("lmstudio", "/v1/chat/completions", {"model": "smol", "messages": HI, "ttl": "x"},
         400, "'ttl' must be a number of seconds"),
    ],
)  # fmt: skip
async def test_each_mistake_has_its_words(
    served: Serving, base: str, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    starts = len(served.starts)
    got, answer = await post(served, base, path, body)
    assert (got, words(answer)) == (status, message)
    if path.startswith("/v1/") and base == "ollama":
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert len(served.starts) == starts, "a request that is wrong loads nothing"


async def test_an_unknown_model_in_lm_studios_words(served: Serving) -> None:
    for path in GENERATING["lmstudio"]:
        status, answer = await post(
            served, "lmstudio", path, {"model": "zmol", "messages": HI, "prompt": "", "input": ""}
        )
        assert status == 404
        error = answer["error"]
        assert error["message"].startswith('Model "zmol" not found. Please specify a valid model.')
        assert "Your models:" in error["message"]
        assert NAMES[0] in error["message"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")


def not_surrogate() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | not_surrogate(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(not_surrogate(), inner, max_size=4),
    max_leaves=8,
)
FIELDS = [
    "model", "messages", "prompt", "stream", "options", "keep_alive", "format", "think", "tools", "images", "system",
    "raw", "suffix", "template", "context", "logprobs", "top_logprobs", "input", "ttl", "name", "Model", "truncate",
    "max_tokens", "reasoning", "reasoning_effort", "dimensions", "encoding_format", "_debug_render_only", "shift",
    "width", "verbose",
]  # fmt: skip
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "images", "tool_calls", "thinking", "tool_name", "tool_call_id"]), JSON
)
OPTION = st.sampled_from(["temperature", "seed", "num_ctx", "num_gpu", "num_thread", "use_mmap", "stop", "mirostat"])
BODY = st.fixed_dictionaries(
    {"model": st.just("smol") | JSON},
    optional={name: JSON for name in FIELDS if name != "model"}
    | {"messages": st.lists(MESSAGE | JSON, max_size=3), "options": st.dictionaries(OPTION, JSON) | JSON},
)


async def test_no_json_makes_it_fall(served: Serving) -> None:
    """Whatever the body, the answer is the caller's fault or an answer; 500 is for the types of options alone."""
    served.scripts["smol"].set()
    url = {base: served.url(base) for base in GENERATING}
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession() as session:

        async def ask(base: str, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
            async with session.post(url[base] + path, data=orjson.dumps(_within_64_bits(body))) as answer:
                return answer.status, await answer.read()

        @given(st.sampled_from(POSTED), BODY)
        @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def check(route: tuple[str, str], body: dict[str, Any]) -> None:
            status, raw = asyncio.run_coroutine_threadsafe(ask(*route, body), loop).result(20)
            seen.add(status)
            if status == 500:
                assert raw.startswith(b'{"error":"option \\"'), (route, body, raw)
            else:
                assert status in (200, 400, 404), (route, body, raw)
            if status != 200 and raw[:1] == b"{":
                assert json.loads(raw)["error"]

        seen: set[int] = set()
        await asyncio.to_thread(check)
        assert seen >= {200, 400}


def _within_64_bits(value: Any) -> Any:
    match value:
        case bool():
            return value
        case int():
            return value if -(2**63) <= value < 2**64 else float(value)
        case list():
            return [_within_64_bits(each) for each in value]
        case dict():
            return {key: _within_64_bits(each) for key, each in value.items()}
    return value


async def test_of_duplicate_keys_the_last_counts(served: Serving) -> None:
    raw = b'{"model":"nobody","model":"zmol","messages":[{"role":"user","content":"x"}]}'
    assert (await post(served, "ollama", "/api/chat", raw))[1]["error"].startswith("model 'zmol' not found")


# --- size -----------------------------------------------------------------------------------------------------------

TOO_LARGE = "the request body is larger than 97.7 KiB (raise server.max_body)"


@pytest.mark.parametrize(("base", "path"), POSTED)
async def test_a_gigabyte_is_refused_unread(served: Serving, base: str, path: str) -> None:
    async with connection(served.port(base)) as (reader, writer):
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {1 << 30}\r\n\r\n"
        writer.write(head.encode() + b'{"model":')
        async with asyncio.timeout(2):
            answer = await read_answer(reader)
    assert answer.status == 413
    assert words(json.loads(answer.body)) == TOO_LARGE


@pytest.mark.parametrize(("base", "path"), [("ollama", "/api/chat"), ("lmstudio", "/v1/chat/completions")])
async def test_a_body_without_a_size_is_refused_once_it_is_too_large(served: Serving, base: str, path: str) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    block = b"100000\r\n" + b" " * 0x100000 + b"\r\n"  # 1 MiB
    async with connection(served.port(base)) as (reader, writer):
        writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())

        async def pour() -> None:
            for _ in range(1024):
                writer.write(block)
                await writer.drain()

        pouring = asyncio.create_task(pour())
        async with asyncio.timeout(5):
            answer = await read_answer(reader)
        pouring.cancel()
        await asyncio.gather(pouring, return_exceptions=True)
    assert answer.status == 413
    assert words(json.loads(answer.body)) == TOO_LARGE
    assert process.memory_info().rss - before < 50 * 1024**2


async def test_a_body_that_stops_coming_holds_nothing_up(served: Serving) -> None:
    async with connection(served.port("ollama")) as (_, writer):
        writer.write(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        await writer.drain()
        assert (await post(served, "ollama", "/api/show", {"model": "smol"}))[0] == 200
    async with asyncio.timeout(2):
        while served.service.in_flight:  # noqa: ASYNC110  # the handler's end sets no event of ours
            await asyncio.sleep(0.01)


async def test_a_packed_bomb_is_bounded(served: Serving) -> None:
    import zlib

    packed = zlib.compress(b" " * 50_000_000, 9)
    assert len(packed) < LIMIT
    status, answer = await post(
        served, "ollama", "/api/chat", packed, **{"Content-Encoding": "deflate", "Content-Type": "application/json"}
    )
    assert (status, words(answer)) == (413, TOO_LARGE)


# --- paths and methods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "method", "path", "status", "body"),
    [
        ("ollama", "GET", "/nothing", 404, "404 page not found"),
        ("ollama", "GET", "/v1/nothing", 404, "404 page not found"),
        ("ollama", "POST", "/api/embedded", 404, "404 page not found"),
        ("ollama", "GET", "/api/chat", 405, "405 method not allowed"),
        ("ollama", "POST", "/api/tags", 405, "405 method not allowed"),
        ("ollama", "DELETE", "/", 405, "405 method not allowed"),
        ("lmstudio", "GET", "/nothing", 404, {"error": "Unexpected endpoint or method. (GET /nothing)"}),
        ("lmstudio", "GET", "/v1/chat/completions", 405,
         {"error": "Unexpected endpoint or method. (GET /v1/chat/completions)"}),
        ("lmstudio", "POST", "/api/v0/models", 405, {"error": "Unexpected endpoint or method. (POST /api/v0/models)"}),
    ],
)  # fmt: skip
async def test_unknown_routes(served: Serving, base: str, method: str, path: str, status: int, body: Any) -> None:
    async with aiohttp.ClientSession(served.url(base)) as session, session.request(method, path) as answer:
        assert answer.status == status
        assert answer.content_type == ("text/plain" if isinstance(body, str) else "application/json")
        assert (await answer.text() if isinstance(body, str) else await answer.json()) == body
        if status == 405:
            assert answer.headers["Allow"]


async def test_a_slash_at_the_end_is_no_matter(served: Serving) -> None:
    async with aiohttp.ClientSession() as session:
        for url in ("/api/tags/", "/api/version/", "/api/ps/", "/v1/models/"):
            async with session.get(served.ollama + url) as answer:
                assert answer.status == 200, url
        for url in ("/v1/models/", "/api/v0/models/"):
            async with session.get(served.lmstudio + url) as answer:
                assert answer.status == 200, url
        async with session.post(served.ollama + "/api/show/", json={"model": "smol"}) as answer:
            assert answer.status == 200
        for url in ("/api/tags", "/v1/models", "/"):
            async with session.head(served.ollama + url) as answer:
                assert (answer.status, await answer.read()) == (200, b"")


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
async def test_any_name_is_found_everywhere(served: Serving, name: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{served.ollama}/api/tags") as answer:
            listed = [model["name"] for model in (await answer.json())["models"]]
        (tagged,) = (each for each in listed if each.removesuffix(":latest") == name)
        for asked in (name, tagged, name.swapcase()):
            async with session.post(f"{served.ollama}/api/show", json={"model": asked}) as answer:
                assert answer.status == 200, asked
            for base, path in ((served.ollama, "/v1/models"), (served.lmstudio, "/v1/models"),
                               (served.lmstudio, "/api/v0/models")):  # fmt: skip
                url = f"{base}{path}/{quote(asked, safe='')}"
                async with session.get(URL(url, encoded=True)) as answer:
                    assert answer.status == 200, url
                    assert (await answer.json())["id"].removesuffix(":latest") == name


async def test_a_name_is_answered_as_it_was_asked(served: Serving) -> None:
    name = NAMES[0]
    served.scripts[name].set(tokens=["ja"])
    status, answer = await post(
        served, "ollama", "/api/chat", {"model": f"{name}:latest", "messages": HI, "stream": False}
    )
    assert (status, answer["model"], answer["message"]["content"]) == (200, f"{name}:latest", "ja")
    status, answer = await post(served, "lmstudio", "/v1/chat/completions", {"model": name, "messages": HI})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "ja")


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a\0b", "x" * 50_000, "\n", "💥" * 2000, "%2e%2e"])
async def test_strange_names_are_only_unknown(served: Serving, name: str) -> None:
    begun = time.monotonic()
    status, answer = await post(served, "ollama", "/api/generate", {"model": name, "prompt": "x"})
    assert status == 404
    assert words(answer).startswith(f"model '{name}' not found")
    assert time.monotonic() - begun < 1
    status, _ = await post(served, "lmstudio", "/v1/completions", {"model": name or "zz", "prompt": "x"})
    assert status == 404


# --- HTTP itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Header\r\n\r\n",
        b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"b" * 20_000 + b"\r\n\r\n",
    ],
    ids=["garbage", "version", "header", "negative", "smuggling", "long path", "long header"],
)
async def test_what_is_no_http_is_refused(served: Serving, raw: bytes) -> None:
    async with asyncio.timeout(3):
        assert 400 <= (await send(served.port("ollama"), raw)).status < 500
    assert (await post(served, "ollama", "/api/show", {"model": "smol"}))[0] == 200


async def test_pipelined_requests_are_answered_in_order(served: Serving) -> None:
    one = request_bytes("/api/show", {"model": "smol"}).replace(b"Connection: close\r\n", b"")
    async with connection(served.port("ollama")) as (reader, writer):
        writer.write(one + request_bytes("/api/show", {"model": "zmol"}))
        assert (await read_answer(reader)).status == 200
        assert (await read_head(reader)).status == 404
