"""Engines of kind "remote": asking real servers on loopback, good and bad ones, for their models."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.catalog.stores import discover
from llamarunner.config.load import load_config
from llamarunner.config.rules import url_problem
from llamarunner.config.schema import Config, EngineConfig, ModelSettings
from llamarunner.engines import remote
from llamarunner.engines.registry import make_engines
from llamarunner.engines.remote import RemoteEngine, UnreachableError, base_url, list_models, model_ids, models_of
from llamarunner.errors import ConfigError, EngineMissingError

KEY = "sk-remote-4711"
LIST = {"object": "list", "data": [{"id": "llama3:8b"}, {"id": "Qwen/Qwen3-8B", "owned_by": "x"}]}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert runner.addresses
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def answering(body: object, status: int = 200, **arguments: Any) -> Handler:
    text = body if isinstance(body, str) else json.dumps(body)
    arguments.setdefault("content_type", "application/json")

    async def handle(request: web.Request) -> web.Response:
        return web.Response(text=text, status=status, **arguments)

    return handle


def config(url: str, **more: Any) -> EngineConfig:
    return EngineConfig.model_validate({"kind": "remote", "url": url, **more})


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


async def refusal(session: aiohttp.ClientSession, url: str, **more: Any) -> UnreachableError:
    with pytest.raises(UnreachableError) as caught:
        await list_models(session, config(url, **more))
    assert KEY not in f"{caught.value} {caught.value!r}"
    assert caught.value.hint
    return caught.value


class TestAsking:
    @pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/deep/er/v1"])
    async def test_with_and_without_v1(self, session: aiohttp.ClientSession, suffix: str) -> None:
        seen: list[web.Request] = []

        async def handle(request: web.Request) -> web.Response:
            seen.append(request)
            return web.json_response(LIST)

        async with server(handle) as url:
            assert await list_models(session, config(url + suffix, api_key=KEY)) == ("llama3:8b", "Qwen/Qwen3-8B")
            assert await list_models(session, config(url + suffix)) == ("llama3:8b", "Qwen/Qwen3-8B")
        assert seen[0].path == ("/deep/er/v1/models" if "deep" in suffix else "/v1/models")
        assert seen[0].headers["Authorization"] == f"Bearer {KEY}"
        assert "Authorization" not in seen[1].headers

    @pytest.mark.parametrize(
        ("handler", "words"),
        [
            (answering("no", 401), "does not accept the key"),
            (answering("no", 403), "does not accept the key"),
            (answering("no", 404), "has no /v1/models"),
            (answering("no", 500), "status 500"),
            (answering("<html>hello</html>", content_type="text/html"), "a web page"),
            (answering("<html>hello</html>"), "a list of models"),
            (answering("[" * 100_000), "a list of models"),
            (answering({"error": "x"}), "a list of models"),
            (answering({"data": {"id": "x"}}), "a list of models"),
            (answering('{"data": []' + " " * 5 * 1024**2), "endless"),
        ],
    )
    async def test_bad_answers(self, session: aiohttp.ClientSession, handler: Handler, words: str) -> None:
        async with server(handler) as url:
            error = await refusal(session, url, api_key=KEY)
        assert words in error.message
        assert error.message.startswith(url)

    async def test_a_redirect_is_not_followed(self, session: aiohttp.ClientSession) -> None:
        seen: list[web.Request] = []

        async def thief(request: web.Request) -> web.Response:
            seen.append(request)
            return web.json_response(LIST)

        async with server(thief) as elsewhere:
            for status in (301, 302, 307, 308):
                moved = answering("", status, headers={"Location": f"{elsewhere}/v1/models"})
                async with server(moved) as url:
                    assert "redirect" in (await refusal(session, url, api_key=KEY)).message
        assert seen == []

    async def test_one_that_is_down(self, session: aiohttp.ClientSession) -> None:
        with socket.socket() as held:  # bound, and not listening
            held.bind(("127.0.0.1", 0))
            error = await refusal(session, f"http://127.0.0.1:{held.getsockname()[1]}")
        assert "refused" in error.message.lower()

    async def test_one_that_breaks_off(self, session: aiohttp.ClientSession) -> None:
        async def handle(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
            await response.prepare(request)
            await response.write(b'{"data": [')
            assert request.transport is not None
            request.transport.abort()
            return response

        async with server(handle) as url:
            await refusal(session, url)

    @pytest.mark.parametrize("when", ["before", "within"])
    async def test_one_that_is_slow(
        self, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, when: str
    ) -> None:
        monkeypatch.setattr(remote, "ASK_S", 0.2)
        over = asyncio.Event()

        async def handle(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            if when == "within":
                await response.prepare(request)
                await response.write(b'{"data": [')
            await over.wait()
            return response

        async with server(handle) as url:
            begun = time.monotonic()
            error = await refusal(session, url)
            assert time.monotonic() - begun < 5
            over.set()
        assert "did not answer within" in error.message

    async def test_one_that_speaks_something_else(self, session: aiohttp.ClientSession) -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example ESMTP\r\n")
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

        listening = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with listening:
            port = listening.sockets[0].getsockname()[1]
            error = await refusal(session, f"http://127.0.0.1:{port}")
        assert "\n" not in error.message


@pytest.mark.parametrize(
    ("answer", "ids"),
    [
        ({"data": [{"id": "a"}, {"id": "a"}, {"id": "b"}]}, ("a", "b")),
        ({"data": []}, ()),
        ({"data": None}, ()),
        ({"models": [{"name": "a"}, "b"]}, ("a", "b")),
        ([{"id": "a"}, 5, None, {"id": 7}, {}], ("a",)),
        ({"data": [{"id": bad} for bad in ("", " ", "a\x1b[2J", "a\nb", "x" * 500, "a//b", "../..//")]}, ()),
        ({"data": [{"id": str(number)} for number in range(5000)]}, tuple(map(str, range(1000)))),
    ],
)
def test_lists_of_many_shapes(answer: object, ids: tuple[str, ...]) -> None:
    assert model_ids(answer) == ids


@pytest.mark.parametrize("answer", [{}, {"error": {}}, "a", 5, None, {"data": "abc"}])
def test_what_is_no_list(answer: object) -> None:
    with pytest.raises(ValueError, match="not a list"):
        model_ids(answer)


class TestModels:
    def test_names_that_are_taken_get_the_engines_before_them(self) -> None:
        taken = ["Llama3", "box/twice", "box/twice-2"]
        ids = ("llama3:latest", "qwen", "QWEN", "twice", "twice:latest")
        models = models_of("box", ids, ModelSettings(keep_alive=5.0), [*taken, "twice"])
        assert [model.name for model in models] == [
            "box/llama3:latest",
            "qwen",
            "box/QWEN",
            "box/twice-3",
            "box/twice:latest-2",
        ]
        assert [str(model.path) for model in models] == list(ids)
        assert {(model.settings.engine, model.settings.keep_alive, model.source) for model in models} == {
            ("box", 5.0, "box")
        }
        assert not any(model.problem for model in models)

    def test_what_they_can_do(self) -> None:
        chat, embedding = models_of("box", ["qwen", "nomic-EMBED-text"], ModelSettings(), [])
        assert chat.capabilities == {Capability.COMPLETION, Capability.TOOLS}
        assert embedding.is_embedding_only

    def test_of_the_configuration(self, tmp_path: Path) -> None:
        file = tmp_path / "config.toml"
        file.write_text(
            "[engines.box]\nurl = 'http://box:1/v1'\n[discovery]\nfolders = []\n"
            "[models.big]\nengine = 'box'\npath = 'llama3.3:70b'\n[models.other]\nengine = 'box'\npath = 'Q/a/b'\n"
        )
        loaded = load_config(file, environ={})
        assert loaded.warnings == ()
        models = list(discover(loaded.config))
        assert [(model.name, str(model.path), model.problem) for model in models] == [
            ("big", "llama3.3:70b", ""),
            ("other", "Q/a/b", ""),
        ]
        made = make_engines(loaded.config)["box"].plan(models[0], port=1, api_key="ours")
        assert (made.argv, made.port, made.api_key, made.headers) == ((), 0, "", {})
        assert (made.base_url, made.served_model) == ("http://box:1", "llama3.3:70b")


class TestEngine:
    def test_its_plan_never_shows_the_key(self) -> None:
        engine = RemoteEngine("box", config("https://box.example/api/v1", api_key=KEY))
        made = engine.plan(Model("m", Path("x/y"), ModelSettings()), port=9, api_key="not for others")
        assert made.headers == {"Authorization": f"Bearer {KEY}"}
        assert made.base_url == "https://box.example/api"
        assert KEY not in repr(made) + repr(engine) + repr(config("http://h", api_key=KEY))
        assert (engine.kind, engine.is_local) == ("remote", False)

    async def test_what_the_doctor_sees(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        async with server(answering(LIST)) as url:
            info = await asyncio.to_thread(RemoteEngine("box", config(url, api_key=KEY)).info)
            assert (info.command, info.version, info.problem) == (url, "2 models", "")
        gone = await asyncio.to_thread(RemoteEngine("box", config(url, api_key=KEY)).info)
        assert gone.problem.startswith(f"engine 'box': {url} cannot be reached")
        assert gone.hint
        assert KEY not in caplog.text + repr((info, gone))

    def test_without_a_url(self) -> None:
        with pytest.raises(EngineMissingError, match="no url"):
            RemoteEngine("box", EngineConfig(kind="remote")).plan(
                Model("m", Path("m"), ModelSettings()), port=1, api_key=""
            )

    def test_which_it_is(self) -> None:
        engines = {"default": EngineConfig(url="http://h:1"), "b": EngineConfig(kind="remote", url="http://h:1")}
        assert {engine.kind for engine in make_engines(Config(engines=engines)).values()} == {"remote"}

    @pytest.mark.parametrize(
        ("url", "base"),
        [
            ("http://h:1", "http://h:1"),
            ("http://h:1/", "http://h:1"),
            ("http://h/v1/", "http://h"),
            ("https://h/a/v1", "https://h/a"),
            ("https://h/a1v1", "https://h/a1v1"),
        ],
    )
    def test_its_address(self, url: str, base: str) -> None:
        assert base_url(config(url)) == base


class TestConfiguration:
    @pytest.mark.parametrize(
        "url", ["http://h", "https://h:8443/v1", "http://[::1]:80", "http://10.0.0.1:1/a/b", "http://h_x"]
    )
    def test_good_addresses(self, url: str) -> None:
        assert url_problem(url) == ""

    @pytest.mark.parametrize(
        "url",
        [
            "", "h", "h:80", "//h", "ftp://h", "file:///etc/passwd", "unix:///run/x", "http://", "http://:80",
            "http://h:99999", "http://h:x", "http://h:0", "http://[::1", "http://u@h", "http://u:p@h", "http://:p@h",
            "http://@h", "http://h/?k=v", "http://h/#x", "http://h?", "http://h x", "http://h\n", "http://h\tx",
            "javascript:alert(1)", "HTTP//h",
        ],
    )  # fmt: skip
    def test_bad_addresses(self, url: str) -> None:
        assert url_problem(url)

    @pytest.mark.parametrize(
        ("table", "words"),
        [
            ("kind = 'remote'", "url: is missing"),
            ("url = 'http://me:sk-secret-1@h/'", "write the key as api_key"),
            ("url = 'http://h/?key=sk-secret-1'", "leave out what follows"),
            ("url = 'http://h'\napi_key = 'a b'", "api_key: a key of visible ASCII"),
            ('url = "http://h"\napi_key = "sk-secret-1\\n"', "api_key: a key of visible ASCII"),
            ("url = 'http://h'\napi_key = '${NOPE}'", "NOPE is not set"),
            ("kind = 'builtin'\nurl = 'http://h'", 'kind "builtin"'),
            ("url = 'http://localhost:11434'", "this program's own address"),
            ("url = 'http://127.0.0.1:1234/v1'", "this program's own address"),
        ],
    )
    def test_what_is_wrong_is_told_without_secrets(self, tmp_path: Path, table: str, words: str) -> None:
        file = tmp_path / "config.toml"
        file.write_text(f"[engines.box]\n{table}\n", encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_config(file, environ={})
        (problem,) = caught.value.problems
        assert problem.startswith(f"{file}:")
        assert words in problem
        assert "sk-secret" not in problem

    def test_the_key_from_the_environment(self, tmp_path: Path) -> None:
        file = tmp_path / "config.toml"
        file.write_text("[engines.box]\nurl = 'http://${HOST}:1'\napi_key = '${MINE}'")
        box = load_config(file, environ={"MINE": KEY, "HOST": "h"}).config.engines["box"]
        assert box.url == "http://h:1"
        assert box.api_key is not None
        assert box.api_key.get_secret_value() == KEY
        assert KEY not in repr(box)
