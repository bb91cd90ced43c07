"""Libraries built upon Ollama's API, unmodified and in a process of their own, against the built-in engine and a real
model. They are large: `make test-clients` installs and tries them, and `make test` leaves out what is missing."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from serving import Serving, serve

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "smollm2:135m"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> AsyncIterator[Serving]:
    one_thread = {"threads": 1, "threads-batch": 1}
    model = {"path": str(smollm2_path), "context": 512, "embeddings": True, "flags": one_thread}
    config = {"models": {MODEL: model}, "engines": {"default": {"kind": "builtin"}}}
    async with serve(tmp_path_factory.mktemp("real"), config) as serving:
        yield serving


async def calls(real: Serving, script: str, module: str) -> dict[str, Any]:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed (make test-clients)")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__).with_name(script)), real.ollama, MODEL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


async def test_langchain(real: Serving) -> None:
    found = await calls(real, "langchain_calls.py", "langchain_ollama")
    assert "Paris" in found["whole"]
    assert "".join(found["parts"]) == found["whole"]
    assert len(found["parts"]) > 2
    assert found["usage"]["input_tokens"] > 20
    assert found["streamed_tokens"] == found["usage"]["output_tokens"] <= 8
    assert found["done_reason"] in ("stop", "length")
    assert found["system"]
    assert all(found["batch"])
    assert found["city"]["name"] in ("Oslo", "Rome")
    assert "".join(found["completed_parts"]) == found["completed"] != ""
    assert [math.hypot(*vector) for vector in found["vectors"]] == pytest.approx([1, 1], abs=1e-3)
    assert found["vector"] == pytest.approx(found["vectors"][0], abs=1e-4)
    assert found["unknown"].startswith("refused:")
    assert "nobody" in found["unknown"]


async def test_llamaindex(real: Serving) -> None:
    found = await calls(real, "llamaindex_calls.py", "llama_index")
    assert found["context"] == 8192, "what /api/show tells"
    assert "Paris" in found["whole"]
    assert "".join(found["deltas"]) == found["last"] == found["streamed"] == found["whole"]
    assert "".join(found["completed_parts"]) == found["completed"] != ""
    assert [len(vector) for vector in found["vectors"]] == [576, 576]
    assert found["vector"] == pytest.approx(found["vectors"][0], abs=1e-4)
