"""Pull, create, copy, delete and blobs on Ollama's port, with the official client and on the wire."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import ollama
import pytest
import pytest_asyncio
from gguf_file import model_bytes, write_model
from registry import FakeRegistry, serve_registry
from serving import Serving, scripted_config, serve, soon

pytestmark = pytest.mark.asyncio(loop_scope="module")

SMOL = "smol"
TEXT = b"no model at all"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    home = tmp_path_factory.mktemp("library")
    config, scripts = scripted_config(home, {SMOL: {"context": 2048}})
    folder = home / "folder"
    write_model(folder / "plain.gguf")
    config["engines"]["default"] = scripts[SMOL].engine_config
    config["discovery"] = {"folders": [str(folder)]}
    config["server"] = {"max_body": 64 * 1024}  # bytes that are stored are not bound by it
    async with serve(home, config, scripts) as serving:
        yield serving


@pytest_asyncio.fixture(loop_scope="module")
async def client(serving: Serving) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(serving.ollama) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def http(serving: Serving) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(serving.ollama) as session:
        yield session


@pytest_asyncio.fixture(loop_scope="module")
async def registry() -> AsyncIterator[FakeRegistry]:
    async with serve_registry() as registry:
        yield registry


async def names(client: ollama.AsyncClient) -> set[str]:
    return {model.model or "" for model in (await client.list()).models}


async def lines(response: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    raw = await response.text()
    assert raw.endswith("\n")
    return [json.loads(line) for line in raw.splitlines()]


# --- pull ------------------------------------------------------------------------------------------------------------


async def test_the_client_pulls_and_the_model_is_there_at_once(
    client: ollama.AsyncClient, registry: FakeRegistry, serving: Serving
) -> None:
    registry.add("tiny", model=model_bytes(), params=b'{"temperature":0.1}', system=b"Be brief.", license=b"MIT")
    name = f"{registry.host}/library/tiny"
    statuses = [step.status async for step in await client.pull(name, insecure=True, stream=True)]
    assert statuses[0] == "pulling manifest"
    assert statuses[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
    assert f"{name}:latest" in await names(client)
    model = serving.service.catalog.find(name)
    assert model.preset.parameters == {"temperature": 0.1}
    assert model.preset.system == "Be brief."
    assert not model.problem
    assert (await client.pull(name, insecure=True)).status == "success"
    await client.delete(name)
    assert f"{name}:latest" not in await names(client)


async def test_failed_pulls_on_the_wire(http: aiohttp.ClientSession, registry: FakeRegistry) -> None:
    missing = {"model": f"{registry.host}/library/nothing", "insecure": True}
    async with http.post("/api/pull", json=missing) as response:
        assert response.status == 200
        assert response.content_type == "application/x-ndjson"
        expected = [{"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"}]
        assert await lines(response) == expected
    async with http.post("/api/pull", json={**missing, "stream": False}) as response:
        assert response.status == 500
        assert await response.json() == {"error": "pull model manifest: file does not exist"}
    for body in ({}, {"name": ""}, {"model": "a b"}, {"Model": "../x"}):
        async with http.post("/api/pull", json=body) as response:
            assert (response.status, await response.json()) == (400, {"error": "invalid model name"})
    async with http.post("/api/pull", json={"model": "http://127.0.0.1:1/a/b"}) as response:
        assert (response.status, await response.json()) == (400, {"error": "insecure protocol http"})
    async with http.post("/api/pull", json={"model": "m", "insecure": "yes"}) as response:
        words = "json: cannot unmarshal string into Go struct field PullRequest.insecure of type bool"
        assert (response.status, await response.json()) == (400, {"error": words})


async def test_a_client_that_leaves_cancels_and_the_next_goes_on(
    client: ollama.AsyncClient, registry: FakeRegistry, serving: Serving
) -> None:
    registry.add("long", model=model_bytes() + bytes(2**20), tag="1")
    registry.always = "slow"
    name = f"{registry.host}/library/long:1"

    async def watch() -> None:
        async for _ in await client.pull(name, insecure=True, stream=True):
            pass

    leaving = asyncio.create_task(watch())
    backend = serving.service.backend
    view = await soon(lambda: next((v for v in backend.snapshot().pulls if v.name == name and v.completed), None))
    assert view.state == "running"
    assert view.total > 2**20
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await soon(lambda: next(v for v in backend.snapshot().pulls if v.name == name).state == "cancelled")
    registry.always = ""
    assert (await client.pull(name, insecure=True)).status == "success"
    await client.delete(name)


async def test_who_waits_for_a_model_is_told_when_the_program_stops(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add("endless", model=model_bytes() + bytes(2**20))
    registry.gate = asyncio.Event()
    name = f"{registry.host}/library/endless"
    async with serve(tmp_path, {}) as serving, aiohttp.ClientSession(serving.ollama) as http:
        async with http.post("/api/pull", json={"model": name, "insecure": True}) as response:
            assert json.loads(await response.content.readline()) == {"status": "pulling manifest"}
            await soon(registry.blob_requests)
            stopping = asyncio.create_task(serving.service.stop(0))
            assert (await lines(response))[-1]["error"].startswith(f"the download of {name}:latest was cancelled")
        await stopping


async def test_a_front_end_pulls_and_cancels(registry: FakeRegistry, serving: Serving) -> None:
    backend = serving.service.backend
    assert not (await backend.start_pull("a b")).ok
    outcome = await backend.cancel_pull("m")
    assert not outcome.ok
    assert "not being downloaded" in outcome.message
    before = backend.snapshot().revisions["pulls"]
    started = await backend.start_pull("127.0.0.1:1/library/never")
    assert started.ok
    name = "127.0.0.1:1/library/never:latest"
    view = await soon(lambda: next((v for v in backend.snapshot().pulls if v.name == name and v.problem), None))
    assert "cannot be asked" in view.problem
    assert view.hint
    assert backend.snapshot().revisions["pulls"] > before


# --- create, copy, delete --------------------------------------------------------------------------------------------


async def test_a_preset_copied_shown_and_deleted(client: ollama.AsyncClient, serving: Serving) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    steps = [
        step.status or ""
        async for step in await client.create(
            "me/poet", from_=SMOL, system="Speak in verse.", parameters={"temperature": 0.7, "stop": ["x"]},
            messages=messages, license=["MIT", "BSD"], stream=True,
        )
    ]  # fmt: skip
    assert steps[0].startswith("using existing layer sha256:")
    assert steps[-2:] == ["writing manifest", "success"]
    model = serving.service.catalog.find("me/poet")
    assert model.preset.system == "Speak in verse."
    assert model.preset.parameters == {"temperature": 0.7, "stop": ["x"]}
    assert [dict(each) for each in model.preset.messages] == messages
    assert model.preset.licenses == ("MIT", "BSD")
    await client.copy("me/poet", "bard:v2")
    assert {"me/poet:latest", "bard:v2"} <= await known_names(serving)
    await client.delete("me/poet")
    assert serving.service.catalog.find("bard:v2").preset.system == "Speak in verse."
    assert serving.service.catalog.get("me/poet") is None
    await client.delete("bard:v2")
    assert serving.service.catalog.find(SMOL).path.exists()


async def known_names(serving: Serving) -> set[str]:
    return {name for model in serving.service.catalog for name in (model.name, *model.aliases)}


async def test_a_model_of_uploaded_blobs_larger_than_any_request(
    client: ollama.AsyncClient, serving: Serving, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(model_bytes(padding="x" * 200_000))
    digest = await client.create_blob(path)
    assert digest == digest_of(path.read_bytes())
    assert await client.create_blob(path) == digest  # again
    answer = await client.create("uploaded", files={"model.gguf": digest}, stream=False)
    assert answer.status == "success"
    model = serving.service.catalog.find("uploaded")
    assert not model.problem
    assert model.path.read_bytes() == path.read_bytes()
    await client.delete("uploaded")
    assert not model.path.exists()


async def test_blobs_on_the_wire(http: aiohttp.ClientSession, serving: Serving) -> None:
    data = b"some bytes" * 100_000
    digest = digest_of(data)
    async with http.head(f"/api/blobs/{digest}") as response:
        assert response.status == 404
    async with http.post(f"/api/blobs/{digest}", data=data) as response:
        assert (response.status, await response.read()) == (201, b"")
    async with http.post(f"/api/blobs/{digest}", data=data) as response:
        assert response.status == 200
    async with http.head(f"/api/blobs/{digest}") as response:
        assert response.status == 200
    other = digest_of(b"other")
    async with http.post(f"/api/blobs/{other}", data=b"bytes") as response:
        expected = f'digest mismatch, expected "{other}", got "{digest_of(b"bytes")}"'
        assert (response.status, await response.json()) == (400, {"error": expected})
    for wrong in ("sha256:1", "md5:00", "x"):
        async with http.post(f"/api/blobs/{wrong}", data=b"") as response:
            assert (response.status, await response.json()) == (400, {"error": "invalid digest format"})
    blobs = serving.home / "data/models/blobs"
    assert [path.name for path in blobs.iterdir() if path.name.startswith(".")] == []


async def test_an_upload_that_breaks_off_leaves_nothing(http: aiohttp.ClientSession, serving: Serving) -> None:
    digest, sent = digest_of(b"never"), asyncio.Event()
    blobs = serving.home / "data/models/blobs"

    async def some() -> AsyncIterator[bytes]:
        yield b"ne"
        sent.set()
        await asyncio.sleep(30)

    posting = asyncio.create_task(http.post(f"/api/blobs/{digest}", data=some()).__aenter__())
    await sent.wait()
    await soon(lambda: [path for path in blobs.iterdir() if path.name.startswith(".upload")])
    posting.cancel()
    await asyncio.gather(posting, return_exceptions=True)
    await soon(lambda: not [path for path in blobs.iterdir() if path.name.startswith(".upload")])


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "x"}, 400, "neither 'from' or 'files' was specified"),
        ({"model": "x", "modelfile": "FROM y"}, 400, "neither 'from' or 'files' was specified"),
        ({"from": SMOL}, 400, "invalid model name"),
        ({"model": "a/b/c/d", "from": SMOL}, 400, "invalid model name"),
        ({"model": "x", "from": SMOL, "quantize": "q4_K_M"}, 400, "quantize is not supported"),
        ({"model": "x", "files": {"m.gguf": "sha256:1"}}, 400, "invalid digest format"),
        ({"model": "x", "files": {"m.gguf": f"sha256:{'0' * 64}"}}, 400, "there is no blob sha256:00"),
        ({"model": "x", "files": {"m.gguf": 7}}, 400, "must be the digest"),
        ({"model": "x", "files": {"m": digest_of(TEXT)}}, 400, "not a GGUF"),
        ({"model": "x", "files": []}, 400, "of type map[string]"),
        ({"model": "x", "from": SMOL, "parameters": "hot"}, 400, "of type map[string]interface {}"),
        ({"model": "x", "from": SMOL, "parameters": {"stop": "x"}}, 400, 'option "stop" must be of type array'),
        ({"model": "x", "from": SMOL, "license": [1]}, 400, "license must be"),
        ({"model": "x", "from": SMOL, "messages": [{"content": "x"}]}, 400, "a message needs a role"),
        ({"model": SMOL, "from": SMOL}, 400, "take [models.smol] out of config.toml"),
        ({"model": "plain", "from": SMOL}, 400, "remove the file"),
    ],
)
async def test_what_cannot_be_created(http: aiohttp.ClientSession, body: Any, status: int, words: str) -> None:
    async with http.post(f"/api/blobs/{digest_of(TEXT)}", data=TEXT) as response:
        assert response.status in (200, 201)
    async with http.post("/api/create", json=body) as response:
        assert response.status == status
        assert words in (await response.json())["error"]


async def test_creating_from_what_is_not_here_pulls_it_first(
    client: ollama.AsyncClient, http: aiohttp.ClientSession, registry: FakeRegistry, serving: Serving
) -> None:
    async with http.post("/api/create", json={"model": "x", "from": "127.0.0.1:1/library/base"}) as response:
        first, second = await lines(response)
        assert first == {"status": "pulling manifest"}
        assert second["error"].startswith("pull model manifest: 127.0.0.1:1 cannot be asked")
    assert serving.service.catalog.get("x") is None


async def test_copies_and_deletions_on_the_wire(http: aiohttp.ClientSession) -> None:
    cases: list[tuple[Any, int, str]] = [
        ({"source": "nothing", "destination": "x"}, 404, 'model "nothing" not found'),
        ({"destination": "x"}, 400, 'source "" is invalid'),
        ({"source": SMOL, "destination": "a b"}, 400, 'destination "a b" is invalid'),
        ({"source": SMOL, "destination": "plain"}, 400, "which is only read (remove the file)"),
    ]
    for body, status, words in cases:
        async with http.post("/api/copy", json=body) as response:
            assert response.status == status
            assert words in (await response.json())["error"]
    for body, status, words in (
        ({"model": "nothing"}, 404, "model 'nothing' not found"),
        ({"name": "a b"}, 404, "model 'a b' not found"),
        ({}, 400, 'name "" is invalid'),
        ({"model": SMOL}, 400, "'smol' is set up in the configuration (take [models.smol] out of config.toml)"),
        ({"model": "plain"}, 400, "plain.gguf, which is only read (remove the file)"),
    ):
        async with http.delete("/api/delete", json=body) as response:
            assert response.status == status
            assert words in (await response.json())["error"]
    async with http.post("/api/copy", json={"source": "plain", "destination": "other"}) as response:
        assert (response.status, await response.read()) == (200, b"")
    async with http.delete("/api/delete", json={"name": "other"}) as response:
        assert (response.status, await response.read()) == (200, b"")
    async with http.delete("/api/push") as response:
        assert response.status == 405


async def test_pushing_is_refused(http: aiohttp.ClientSession, client: ollama.AsyncClient) -> None:
    async with http.post("/api/push", json={}) as response:
        assert (response.status, await response.json()) == (400, {"error": "model is required"})
    async with http.post("/api/push", json={"model": "nothing"}) as response:
        assert response.status == 404
    with pytest.raises(ollama.ResponseError, match="pushing to a registry is not supported"):
        async for _ in await client.push(SMOL, stream=True):
            pass


async def test_a_loaded_model_that_is_deleted_is_unloaded_once_it_has_answered(
    client: ollama.AsyncClient, serving: Serving, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(model_bytes(**{"general.basename": "gone"}))
    await client.create("gone", files={"m.gguf": await client.create_blob(path)})
    model = serving.service.catalog.find("gone")
    answer = await client.generate("gone", "hi", stream=True)
    assert (await anext(answer)).model == "gone"
    residence = serving.service.manager.residence(model.name)
    assert residence is not None
    assert residence.runner is not None
    await client.delete("gone")
    with pytest.raises(ollama.ResponseError, match="model 'gone' not found"):
        await client.generate("gone", "hi")
    assert [part.done async for part in answer][-1]
    await soon(lambda: (r := serving.service.manager.residence(model.name)) is None or r.runner is None)


# --- with a real model -----------------------------------------------------------------------------------------------


async def test_smollm2_uploaded_made_a_preset_and_asked(tmp_path: Path, smollm2_path: Path) -> None:
    engine = {"default": {"kind": "builtin"}}
    defaults = {"context": 512, "flags": {"threads": 1, "threads-batch": 1}}
    async with (
        serve(tmp_path, {"engines": engine, "defaults": defaults}) as serving,
        ollama.AsyncClient(serving.ollama) as client,
    ):
        digest = await client.create_blob(smollm2_path)  # larger than server.max_body
        parameters = {"temperature": 0, "num_predict": 8, "seed": 1}
        await client.create("base", files={"smollm2.gguf": digest}, parameters=parameters)
        await client.create("pirate", from_="base", system="You are a pirate. Begin every answer with Arrr.")
        model = serving.service.catalog.find("pirate")
        assert model.preset.parameters == parameters
        assert model.preset.system.startswith("You are a pirate.")
        shown = await client.show("pirate")
        assert "num_predict" in (shown.parameters or "")
        question = {"role": "user", "content": "What is the capital of France? Answer in one word."}
        plain, preset = await client.chat("base", [question]), await client.chat("pirate", [question])
        told = await client.chat("base", [{"role": "system", "content": model.preset.system}, question])
        assert "Paris" in (plain.message.content or "")
        assert preset.message.content == told.message.content
        assert preset.prompt_eval_count == told.prompt_eval_count != plain.prompt_eval_count
        assert all((answer.eval_count or 0) <= 8 for answer in (plain, preset, told))  # as the parameters say
        for name in ("base", "pirate"):
            await client.delete(name)
        assert list(serving.service.catalog) == []
        assert list((tmp_path / "data/models/blobs").iterdir()) == []


async def test_a_preset_is_served_by_the_runner_of_the_file_it_was_made_of(
    client: ollama.AsyncClient, serving: Serving
) -> None:
    await client.create("shared", from_="plain", system="Be brief.")
    for name in ("plain", "shared", "plain"):
        await client.chat(name, [{"role": "user", "content": "hi"}])
    assert serving.starts.count("plain") == 1
    assert "shared:latest" not in serving.starts
    assert [model.model for model in (await client.ps()).models] == ["plain:latest"]
    await client.delete("shared")
    await client.chat("plain", [{"role": "user", "content": "hi"}])
    assert serving.starts.count("plain") == 1, "who goes takes nothing along that another uses"
