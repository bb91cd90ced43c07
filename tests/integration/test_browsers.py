"""Who is let in, over real HTTP: the Host header, pages in a browser, and the key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from serving import Serving, scripted_config, serve
from wire import request_bytes, send

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = "https://chat.example"
ASK = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
STREAMS = [
    ("ollama", "/api/chat"), ("ollama", "/v1/chat/completions"), ("lmstudio", "/v1/chat/completions"),
    ("lmstudio", "/api/v0/chat/completions"),
]  # fmt: skip

PAGES_SEND = [
    "authorization",
    "content-type",
    "user-agent",
    "accept",
    "x-requested-with",
    "openai-beta",
    "x-api-key",
    "anthropic-version",
    "x-stainless-arch",
    "x-stainless-async",
    "x-stainless-custom-poll-interval",
    "x-stainless-helper-method",
    "x-stainless-lang",
    "x-stainless-os",
    "x-stainless-package-version",
    "x-stainless-poll-helper",
    "x-stainless-retry-count",
    "x-stainless-runtime",
    "x-stainless-runtime-version",
    "x-stainless-timeout",
    "anthropic-dangerous-direct-browser-access",
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("browsers")
    config, scripts = scripted_config(folder)
    proxy = {"cors_origins": [PAGE], "allowed_hosts": ["box.lan"]}
    config["proxies"] = {"ollama": proxy, "lmstudio": proxy}
    async with serve(folder / "home", config, scripts) as serving:
        yield serving


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("keyed")
    config, scripts = scripted_config(folder)
    config["proxies"] = {name: {"api_key": "sk-secret", "cors_origins": [PAGE]} for name in ("ollama", "lmstudio")}
    async with serve(folder / "home", config, scripts) as serving:
        yield serving


@pytest.mark.parametrize("name", ["ollama", "lmstudio"])
@pytest.mark.parametrize(
    ("hosts", "admitted"),
    [
        (["localhost"], True), (["127.0.0.1:11434"], True), (["[::1]:99"], True), (["box.lan"], True), ([], False),
        (["localhost", "localhost"], False), (["localhost", "evil.com"], False), (["evil.com"], False),
        (["127.0.0.1.evil.com"], False), ([""], False), (["evil.com\tlocalhost"], False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_the_host_header(served: Serving, name: str, hosts: list[str], admitted: bool, version: str) -> None:
    head = f"GET /v1/models HTTP/{version}\r\n" + "".join(f"Host: {host}\r\n" for host in hosts)
    answer = await send(served.port(name), f"{head}Connection: close\r\n\r\n".encode())
    if admitted:
        assert answer.status == 200
        assert b'"data"' in answer.body
    else:
        assert answer.status in (400, 403)
        assert b'"data"' not in answer.body


async def test_a_target_with_a_foreign_name_counts_for_nothing(served: Serving) -> None:
    answer = await send(served.port("ollama"), b"GET http://evil.com/ HTTP/1.1\r\nHost: evil.com\r\n\r\n")
    assert answer.status == 403
    answer = await send(served.port("ollama"), request_bytes("/api/chat", ASK, host="evil.com"))
    assert (answer.status, answer.body) == (403, b"")
    assert not served.script.requests()


@pytest.mark.parametrize("name", ["ollama", "lmstudio"])
@pytest.mark.parametrize("origin", ["https://evil.com", "null", "http://[::1", "file", "http://localhost.evil.com"])
async def test_a_foreign_page_gets_nothing(served: Serving, name: str, origin: str) -> None:
    before = len(served.finished)
    async with aiohttp.ClientSession(served.url(name), headers={"Origin": origin}) as session:
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("OPTIONS", "/v1/models")):
            async with session.request(method, path, data=b"{}") as answer:
                assert (answer.status, await answer.read()) == (403, b"")
                assert "Access-Control-Allow-Origin" not in answer.headers
    assert len(served.finished) == before


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000", "app://obsidian.md"])
async def test_a_page_may_ask_first(served: Serving, origin: str) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,authorization",
            "Access-Control-Request-Private-Network": "true"}  # fmt: skip
    for name, path in STREAMS:
        async with (
            aiohttp.ClientSession(served.url(name), headers={"Origin": origin}) as session,
            session.options(path, headers=asks) as answer,
        ):
            assert answer.status == 204
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert "POST" in answer.headers["Access-Control-Allow-Methods"]
            allowed = answer.headers["Access-Control-Allow-Headers"].lower()
            assert set(PAGES_SEND) <= set(allowed.split(", "))
            assert answer.headers["Access-Control-Allow-Private-Network"] == "true"


@pytest.mark.parametrize(("name", "path"), STREAMS)
async def test_a_page_may_read_every_answer(served: Serving, name: str, path: str) -> None:
    bodies: list[dict[str, Any] | bytes] = [ASK, {**ASK, "stream": False}, b"nonsense", {**ASK, "model": "nobody"}]
    async with aiohttp.ClientSession(served.url(name), headers={"Origin": PAGE}) as session:
        for body in bodies:
            how: dict[str, Any] = {"data": body} if isinstance(body, bytes) else {"json": body}
            async with session.post(path, **how) as answer:
                assert await answer.read()
                assert answer.headers.getall("Access-Control-Allow-Origin") == [PAGE]
                assert answer.headers.getall("Vary") == ["Origin"]
        for missing in ("/nothing", path):
            async with session.get(missing) as answer:
                assert answer.status in (404, 405)
                assert answer.headers["Access-Control-Allow-Origin"] == PAGE
    async with aiohttp.ClientSession(served.url(name)) as session, session.post(path, json=ASK) as answer:
        assert answer.status == 200
        assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    ("headers", "admitted"),
    [
        ({"Authorization": "Bearer sk-secret"}, True), ({"X-Api-Key": "sk-secret"}, True), ({}, False),
        ({"Authorization": "Bearer sk-secre"}, False), ({"Authorization": "Basic sk-secret"}, False),
        ({"Authorization": "Bearer \xe9"}, False),
    ],
)  # fmt: skip
async def test_the_key(keyed: Serving, headers: dict[str, str], admitted: bool) -> None:
    for name, path in STREAMS:
        async with aiohttp.ClientSession(keyed.url(name), headers=headers) as session:
            async with session.post(path, json=ASK) as answer:
                assert answer.status == (200 if admitted else 401)
                if not admitted:
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                    error = (await answer.json())["error"]
                    if path.startswith("/v1/") or name == "lmstudio":
                        assert error["message"]
                    else:
                        assert error == "unauthorized"
            async with session.get("/nothing") as answer:
                assert answer.status == (404 if admitted else 401), "nor is it told which paths there are"
    async with aiohttp.ClientSession(keyed.ollama) as session:
        for path in ("/", "/api/version"):
            async with session.get(path, headers=headers) as answer:
                assert answer.status == 200


async def test_a_page_may_ask_first_without_the_key(keyed: Serving) -> None:
    async with aiohttp.ClientSession(keyed.ollama, headers={"Origin": PAGE}) as session:
        async with session.options("/api/chat") as answer:
            assert answer.status == 204
        async with session.post("/api/chat", json=ASK) as answer:
            assert answer.status == 401
            assert answer.headers["Access-Control-Allow-Origin"] == PAGE, "so that the page can show the error"


async def test_our_key_is_not_the_engines(keyed: Serving) -> None:
    async with aiohttp.ClientSession(keyed.lmstudio) as session:
        headers = {"Authorization": "Bearer sk-secret", "Cookie": "a=b", "Origin": PAGE}
        async with session.post("/v1/chat/completions", json=ASK, headers=headers) as answer:
            assert answer.status == 200
    sent = keyed.script.requests()[-1]["headers"]
    assert "sk-secret" not in str(sent)
    assert "cookie" not in sent
    assert "origin" not in sent
