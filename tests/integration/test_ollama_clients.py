"""Every call of Ollama's own clients, Python and npm, unmodified, against the built-in engine and a real model."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import ollama
import pytest
import pytest_asyncio
from gguf_file import model_bytes
from registry import FakeRegistry, serve_registry
from serving import Serving, serve

pytestmark = pytest.mark.asyncio(loop_scope="module")

NPM = Path(__file__).with_name("npm")
MODEL = "smollm2:135m"
CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
GREEDY = {"temperature": 0, "num_predict": 8, "seed": 7}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> AsyncIterator[Serving]:
    one_thread = {"threads": 1, "threads-batch": 1}
    model = {"path": str(smollm2_path), "context": 512, "embeddings": True, "flags": one_thread}
    config = {"models": {MODEL: model}, "engines": {"default": {"kind": "builtin"}}}
    async with serve(tmp_path_factory.mktemp("real"), config) as serving:
        yield serving


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def registry() -> AsyncIterator[FakeRegistry]:
    async with serve_registry() as registry:
        yield registry


Call = Callable[..., Awaitable[Any]]


@contextlib.asynccontextmanager
async def calling(base: str, kind: str) -> AsyncIterator[Call]:
    """`await call("chat", ...)` on the client of that kind; of a stream, the list of its parts."""

    def in_thread(name: str, *args: Any, **kwargs: Any) -> Any:
        answer = getattr(sync, name)(*args, **kwargs)
        return list(answer) if kwargs.get("stream") else answer

    async def call(name: str, *args: Any, **kwargs: Any) -> Any:
        if kind == "sync":
            return await asyncio.to_thread(in_thread, name, *args, **kwargs)
        answer = await getattr(unsync, name)(*args, **kwargs)
        return [part async for part in answer] if kwargs.get("stream") else answer

    with ollama.Client(base) as sync:
        async with ollama.AsyncClient(base) as unsync:
            yield call


@pytest_asyncio.fixture(loop_scope="module", params=["sync", "async"])
async def call(request: pytest.FixtureRequest, real: Serving) -> AsyncIterator[Call]:
    async with calling(real.ollama, request.param) as call:
        yield call


async def names(call: Call) -> set[str]:
    return {model.model for model in (await call("list")).models}


async def test_answers(call: Call) -> None:
    whole = await call("chat", MODEL, CAPITAL, options=GREEDY)
    parts = await call("chat", MODEL, CAPITAL, options=GREEDY, stream=True)
    assert "Paris" in whole.message.content
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert (whole.message.role, whole.done_reason, whole.eval_count > 0) == ("assistant", parts[-1].done_reason, True)
    whole = await call("generate", MODEL, "Say yes.", options=GREEDY)
    parts = await call("generate", MODEL, "Say yes.", options=GREEDY, stream=True)
    assert "".join(part.response for part in parts) == whole.response
    assert parts[-1].context == whole.context


async def test_embeddings(call: Call) -> None:
    batch = await call("embed", MODEL, ["a cat", "a kitten"])
    assert [math.hypot(*vector) for vector in batch.embeddings] == pytest.approx([1, 1], abs=1e-3)
    assert batch.prompt_eval_count > 2
    short = await call("embed", MODEL, "a cat", dimensions=32)
    assert len(short.embeddings[0]) == 32
    older = await call("embeddings", MODEL, "a cat")
    assert older.embedding == pytest.approx(batch.embeddings[0], abs=1e-4)


async def test_what_there_is(call: Call) -> None:
    await call("generate", MODEL, "", keep_alive=600)
    assert MODEL in await names(call)
    shown = await call("show", MODEL)
    assert shown.modelinfo["llama.context_length"] == 8192
    assert "completion" in shown.capabilities
    (running,) = (await call("ps")).models
    assert (running.model, running.context_length) == (MODEL, 512)


async def test_models_made_copied_and_deleted(call: Call, tmp_path: Path) -> None:
    progress = await call("create", "pirate", from_=MODEL, system="Talk like a pirate.", parameters={"temperature": 0},
                          stream=True)  # fmt: skip
    assert progress[-1].status == "success"
    assert (await call("copy", "pirate", "corsair")).status == "success"
    assert {"pirate:latest", "corsair:latest"} <= await names(call)
    shown = await call("show", "corsair")
    assert "temperature" in shown.parameters
    assert "pirate" in shown.modelfile
    file = tmp_path / "tiny.gguf"
    file.write_bytes(model_bytes())
    digest = await call("create_blob", file)
    assert digest == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert (await call("create", "tiny", files={"tiny.gguf": digest})).status == "success"
    for name in ("pirate", "corsair", "tiny"):
        assert (await call("delete", name)).status == "success"
    assert not {"pirate:latest", "corsair:latest", "tiny:latest"} & await names(call)
    with pytest.raises(ollama.ResponseError) as gone:
        await call("delete", "pirate")
    assert gone.value.status_code == 404


async def test_pulls(call: Call, registry: FakeRegistry) -> None:
    data = model_bytes()
    registry.add("pulled", model=data)
    name = f"{registry.host}/library/pulled"
    for stream in (True, False):
        answer = await call("pull", name, insecure=True, stream=stream)
        assert (answer[-1] if stream else answer).status == "success"
    assert any(part.total == len(data) for part in await call("pull", name, insecure=True, stream=True))
    assert any("pulled" in listed for listed in await names(call))
    await call("delete", name)
    with pytest.raises(ollama.ResponseError, match="file does not exist"):
        await call("pull", f"{registry.host}/library/nothing", insecure=True)


async def test_what_is_not_offered(call: Call) -> None:
    with pytest.raises(ollama.ResponseError) as push:
        await call("push", MODEL)
    assert "push" in push.value.error
    with pytest.raises(ollama.ResponseError) as unknown:
        await call("systemone", MODEL, "state", {})
    assert (unknown.value.status_code, unknown.value.error) == (404, "404 page not found")


# --- npm -----------------------------------------------------------------------------------------------------------


async def run(*command: str, cwd: Path) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    out, error = await process.communicate()
    return process.returncode or 0, out.decode(), error.decode()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("there is no node, or no npm")
    folder = tmp_path_factory.mktemp("npm") / "npm"
    shutil.copytree(NPM, folder, ignore=shutil.ignore_patterns("node_modules"))
    status, _, error = await run(npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=folder)
    if status:
        pytest.skip(f"npm could not install the client: {error.strip().splitlines()[-1:]}")
    return folder


async def test_the_npm_client(real: Serving, npm_folder: Path) -> None:
    status, out, error = await run("node", "calls.mjs", real.ollama, MODEL, "from-node", cwd=npm_folder)
    assert status == 0, error
    found = json.loads(out)
    assert found["version"]["version"].count(".") == 2
    assert "Paris" in found["chat"]["message"]["content"]
    assert found["chatStream"]["said"] == found["chat"]["message"]["content"]
    assert found["chatStream"]["parts"] > 2
    assert found["chatStream"]["last"]["done"] is True
    assert found["generateStream"]["said"] == found["generate"]["response"]
    assert found["generate"]["context"]
    assert found["accents"]["said"]
    assert "\ufffd" not in found["accents"]["said"]
    assert [len(vector) for vector in found["embed"]["embeddings"]] == [576, 576]
    assert found["embeddings"]["embedding"] == pytest.approx(found["embed"]["embeddings"][0], abs=1e-4)
    assert MODEL in [model["model"] for model in found["list"]["models"]]
    assert found["ps"]["models"][0]["model"] == MODEL
    assert found["show"]["model_info"]["general.architecture"] == "llama"
    assert found["created"]["said"].splitlines()[-1] == "success"
    assert found["copied"]["status"] == "success"
    assert [each["status"] for each in found["deleted"]] == ["success", "success"]
    assert found["unknown"] == {"name": "ResponseError", "message": "model 'nobody' not found", "status": 404}
    assert "push" in found["pushed"]["message"]
    assert found["aborted"]["name"] == "AbortError"
