"""Golden samples: streams as llama-server writes them (`sse`, or `answer` where it does not stream), and the lines that
Ollama's clients get of them (`ndjson`, `whole` where the client does not stream). Files in tests/proxies/golden."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from serving import Serving, scripted_config, serve
from wire import Answer, exchange

pytestmark = pytest.mark.asyncio(loop_scope="module")

FOLDER = Path(__file__).parents[1] / "proxies" / "golden"
SAMPLES = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}
CHANGING = ("created_at", "total_duration", "load_duration", "context")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ASK: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": [{"role": "user", "content": "?"}]},
    "/api/generate": {"prompt": "?"},
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def fake(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("golden")
    config, scripts = scripted_config(folder, {"golden": {"keep_alive": -1}})
    async with serve(folder / "home", config, scripts) as serving:
        yield serving


async def replayed(fake: Serving, sample: dict[str, Any], *, stream: bool, chunk_bytes: int = 0) -> Answer:
    body = {"model": "golden", "stream": stream, **ASK[sample["endpoint"]]}
    if "answer" in sample:
        body |= {"tools": [TOOL], "logprobs": True}
        fake.script.replay(json.dumps(sample["answer"]), content_type="application/json", chunk_bytes=chunk_bytes)
    else:
        fake.script.replay(sample["sse"], chunk_bytes=chunk_bytes)
    answer = await exchange(fake.port("ollama"), sample["endpoint"], body)
    if "answer" in sample:
        assert fake.script.asked()["stream"] is False
    return answer


def steady(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in CHANGING}


@pytest.mark.parametrize("name", SAMPLES)
async def test_lines(fake: Serving, name: str) -> None:
    """However the engine's bytes are cut: each write is whole lines, and they are the same."""
    sample = SAMPLES[name]
    for chunk_bytes in (0, 7, 1):
        answer = await replayed(fake, sample, stream=True, chunk_bytes=chunk_bytes)
        assert answer.status == sample.get("status", 200)
        if answer.status == 200:
            assert answer.headers["content-type"] == "application/x-ndjson"
            assert all(chunk.endswith(b"\n") for chunk in answer.chunks)
        lines = answer.body.removesuffix(b"\n").split(b"\n")
        assert [steady(json.loads(line)) for line in lines] == sample["ndjson"]


@pytest.mark.parametrize("name", SAMPLES)
async def test_whole(fake: Serving, name: str) -> None:
    sample = SAMPLES[name]
    answer = await replayed(fake, sample, stream=False)
    assert answer.status == sample.get("whole_status", 200)
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert steady(json.loads(answer.body)) == sample["whole"]
