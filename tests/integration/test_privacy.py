"""No text of a prompt or an answer is ever written down: not in a file, not in a log's ring, not in a trace."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from serving import Serving, serve
from wire import send

CANARY = "Zyxomma-Petiolatum"
ANSWERED = "Quetzalcoatlus"
TURN = [{"role": "system", "content": CANARY}, {"role": "user", "content": CANARY}]
TEXTS: list[Any] = [CANARY, {CANARY: 1}, [CANARY], [[CANARY]], 5, None]

WRONG_MESSAGES: list[Any] = [
    [CANARY], [{"role": CANARY}], [{"role": "user", "content": {CANARY: 1}}], [{"role": "user"}, {CANARY: 1}],
    [{"role": "user", "content": [{"type": CANARY, "text": CANARY}]}],
    [{"role": "user", "content": [{"type": "text", "text": {CANARY: 1}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"http://localhost/{CANARY}"}}]}],
    [{"role": "assistant", "tool_calls": [{"a": CANARY}]}],
    [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": [CANARY]}}]}],
    [{"role": "assistant", "content": CANARY}, {"role": "assistant", "content": CANARY}],
    [{"role": "tool", "content": CANARY}], CANARY, {"a": CANARY},
]  # fmt: skip
WRONG_TOOLS: list[Any] = [
    CANARY, [CANARY], [{"type": CANARY}], [{"type": "function", "function": {"name": {CANARY: 1}}}],
    [{"type": "function", "function": {"name": "f", "parameters": CANARY}}],
]  # fmt: skip


async def ask_everything(serving: Serving, model: str) -> int:
    """Every route with the canary in every place, right and wrong; how many answers there were."""
    few = {"num_predict": 2}
    asked: list[tuple[str, str, Any]] = []
    for stream in (True, False):
        asked += [
            ("ollama", "/api/chat", {"messages": TURN, "options": few, "stream": stream}),
            ("ollama", "/api/generate", {"prompt": CANARY, "system": CANARY, "options": few, "stream": stream}),
            ("ollama", "/api/generate", {"prompt": CANARY, "raw": True, "options": few, "stream": stream}),
            ("ollama", "/api/generate", {"prompt": CANARY, "context": [1, 2], "options": few, "stream": stream}),
        ]
        for base in ("ollama", "lmstudio"):
            asked.append((base, "/v1/chat/completions", {"messages": TURN, "max_tokens": 2, "stream": stream}))
            asked.append((base, "/v1/completions", {"prompt": CANARY, "max_tokens": 2, "stream": stream}))
            asked.append((base, "/v1/responses", {"input": CANARY, "max_output_tokens": 2, "stream": stream}))
            asked.append((base, "/v1/messages", {"messages": TURN, "max_tokens": 2, "stream": stream}))
            asked.append((base, "/v1/messages/count_tokens", {"messages": TURN, "system": CANARY}))
        asked.append(("lmstudio", "/api/v0/chat/completions", {"messages": TURN, "max_tokens": 2, "stream": stream}))
    for messages in WRONG_MESSAGES:
        asked.append(("ollama", "/api/chat", {"messages": messages, "options": few}))
        asked.append(("ollama", "/v1/chat/completions", {"messages": messages, "max_tokens": 2}))
        asked.append(("lmstudio", "/api/v0/chat/completions", {"messages": messages, "max_tokens": 2}))
        asked.append(("lmstudio", "/v1/messages", {"messages": messages, "max_tokens": 2}))
        asked.append(("ollama", "/v1/responses", {"input": messages, "max_output_tokens": 2}))
    for tools in WRONG_TOOLS:
        asked.append(("ollama", "/api/chat", {"messages": TURN, "tools": tools, "options": few}))
        asked.append(("lmstudio", "/v1/chat/completions", {"messages": TURN, "tools": tools, "max_tokens": 2}))
        asked.append(("ollama", "/v1/messages", {"messages": TURN, "tools": tools, "max_tokens": 2}))
        asked.append(("ollama", "/v1/responses", {"input": CANARY, "tools": tools, "max_output_tokens": 2}))
    asked += [("ollama", "/v1/completions", {"prompt": text, "max_tokens": 2}) for text in TEXTS]
    asked += [("lmstudio", "/v1/embeddings", {"input": text}) for text in TEXTS]
    asked += [
        ("ollama", "/api/chat", {"messages": [{"role": "user", "content": f"{CANARY} " * 200}]}),
        ("ollama", "/api/chat", {"messages": TURN, "format": CANARY}),
        ("ollama", "/api/chat", {"messages": TURN, "think": CANARY}),
        ("ollama", "/v1/chat/completions", {"messages": TURN, "reasoning_effort": CANARY}),
        ("ollama", "/v1/responses", {"input": CANARY, "previous_response_id": CANARY}),
        ("ollama", "/v1/responses", {"input": [{"type": CANARY, "content": [{"type": CANARY}]}]}),
        ("ollama", "/api/chat", {"messages": TURN, "keep_alive": CANARY}),
        ("ollama", "/api/chat", {"messages": TURN, "options": {"stop": CANARY, CANARY: 1}}),
        ("ollama", "/api/chat", {"messages": TURN, "model": {CANARY: 1}}),
        ("lmstudio", "/v1/chat/completions", {"messages": TURN, "model": {CANARY: 1}}),
        ("lmstudio", "/v1/chat/completions", {"messages": TURN, "temperature": CANARY}),
        ("lmstudio", "/v1/chat/completions", {"messages": TURN, "stream": CANARY}),
    ]
    async with aiohttp.ClientSession() as session:
        for base, path, body in asked:
            async with session.post(serving.url(base) + path, json={"model": model, **body}) as answer:
                await answer.read()
        for raw in (CANARY.encode(), f'{{"model":"{model}","prompt":"{CANARY}'.encode(), f"GET /{CANARY}".encode()):
            async with session.post(f"{serving.ollama}/api/generate", data=raw) as answer:
                assert answer.status == 400
    for broken in (f"{CANARY}\r\n\r\n", f"GET / HTTP/1.1\r\nHost: localhost\r\n{CANARY} x\r\n\r\n"):
        await send(serving.port("ollama"), broken.encode())
    return len(asked)


def written(serving: Serving, *, overflows: bool = False) -> dict[str, str]:
    """Every text that is kept, by where it is. `overflows`: of a ring what it still has will do."""
    texts = {str(path): path.read_text(errors="replace") for path in serving.home.rglob("*") if path.is_file()}
    for source in serving.logs.sources():
        lines, missed = serving.logs.page(source, 0, 100_000)
        assert overflows or not missed
        texts[f"ring of {source}"] = "\n".join(line.text for line in lines)
    texts["traces"] = "\n".join(json.dumps(dataclasses.asdict(trace), default=str) for trace in serving.finished)
    return texts


def assert_private(texts: dict[str, str], word: str) -> None:
    for place, text in texts.items():
        found = [line for line in text.splitlines() if word in line]
        assert not found, f"{place}: {found[:3]}"


async def test_the_real_engine(tmp_path: Path, smollm2_path: Path) -> None:
    models = {
        "smol": {
            "path": str(smollm2_path),
            "context": 256,
            "embeddings": True,
            "flags": {"threads": 1, "threads-batch": 1},
        }
    }
    async with serve(
        tmp_path, {"models": models, "engines": {"default": {"kind": "builtin"}}}, log_files=True
    ) as serving:
        asked = await ask_everything(serving, "smol")
        texts = written(serving)
    assert len(serving.finished) >= asked
    assert {trace.status for trace in serving.finished} >= {200, 400}
    assert "ring of smol" in texts
    assert_private(texts, CANARY)
    files = await asyncio.to_thread(written, serving)
    assert any(name.endswith("smol.log") for name in files)
    assert_private(files, CANARY)


async def test_engines_that_fail(run_service: Any) -> None:
    """What an engine quotes in a refusal goes to the client, and no further."""
    quoting = {"error": {"code": 500, "message": f"Failed to parse: {CANARY}", "type": "server_error"}}
    said = {"choices": [{"delta": {"content": ANSWERED}}]}
    scripts: list[dict[str, Any]] = [
        {"http_error": {"status": 400, "body": quoting}}, {"http_error": {"status": 500, "body": CANARY}},
        {"tokens": [ANSWERED] * 3}, {"tokens": [ANSWERED] * 3, "drop": "token:2"}, {"drop": "prompt"},
        {"raw": {"body": f"data: {json.dumps(quoting)}\n\n"}},
        {"raw": {"body": f"data: {json.dumps(said)}\n\ndata: {json.dumps(quoting)}\n\n"}},
        {"raw": {"body": f"data: {CANARY}\n\n"}}, {"raw": {"body": CANARY, "content_type": "application/json"}},
        {"tool_calls": [{"name": ANSWERED, "arguments": f'{{"{ANSWERED}'}]},
    ]  # fmt: skip
    async with run_service(log_files=True) as serving, aiohttp.ClientSession() as session:
        for script in scripts:
            serving.script.set(**script)
            for base, path in (
                ("ollama", "/api/chat"), ("ollama", "/v1/chat/completions"), ("lmstudio", "/api/v0/chat/completions"),
            ):  # fmt: skip
                for stream in (True, False):
                    ask = {"model": "smol", "messages": TURN, "stream": stream}
                    async with session.post(serving.url(base) + path, json=ask) as answer:
                        await answer.read()
        texts = written(serving)
        assert len(serving.finished) == len(scripts) * 6
    for word in (CANARY, ANSWERED):
        assert_private(texts, word)
        assert_private(await asyncio.to_thread(written, serving), word)


SCHEMAS: list[Any] = [
    {"type": CANARY, "properties": {CANARY: {"type": "weird"}}}, {"$ref": f"#/{CANARY}"},
    {"type": "string", "pattern": f"^{CANARY}\\!$"}, {"type": "object", "properties": {CANARY: {"enum": [CANARY]}}},
]  # fmt: skip
GRAMMARS = [
    f'root ::= "{CANARY}" {CANARY}-x\nsecond {CANARY} line\nerror: {CANARY}\n',
    f'root ::= {CANARY}-undefined\n{CANARY}-other ::= "a{CANARY}"\n',
    f'root ::= "{CANARY}"',
    "[" * 300 + CANARY,
]


@pytest.mark.parametrize("verbosity", [3, 99])
async def test_grammars_and_schemas_that_the_engine_quotes(tmp_path: Path, smollm2_path: Path, verbosity: int) -> None:
    flags = {"threads": 1, "threads-batch": 1, "verbosity": verbosity}
    models = {"smol": {"path": str(smollm2_path), "context": 256, "flags": flags}}
    tool = {"name": CANARY, "description": CANARY, "parameters": SCHEMAS[3]}
    formats = [{"type": "json_schema", "json_schema": {"name": "s", "schema": schema}} for schema in SCHEMAS]
    bodies: list[dict[str, Any]] = [{"response_format": each} for each in [*formats, {"type": CANARY}]]
    bodies += [{"grammar": grammar} for grammar in GRAMMARS]
    bodies += [{"tools": [{"type": "function", "function": tool}], "tool_choice": "required"}]
    async with serve(
        tmp_path, {"models": models, "engines": {"default": {"kind": "builtin"}}}, log_files=True
    ) as serving:
        async with aiohttp.ClientSession() as session:
            for body in bodies:
                whole = {"model": "smol", "messages": TURN, "max_tokens": 4, **body}
                async with session.post(f"{serving.lmstudio}/v1/chat/completions", json=whole) as answer:
                    await answer.read()
            for schema in SCHEMAS:
                whole = {"model": "smol", "messages": TURN, "options": {"num_predict": 4}, "format": schema}
                async with session.post(f"{serving.ollama}/api/chat", json=whole) as answer:
                    await answer.read()
        texts = written(serving, overflows=True)
    assert_private(texts, CANARY)
    files = await asyncio.to_thread(written, serving, overflows=True)
    assert_private(files, CANARY)
    log = next(text for name, text in files.items() if name.endswith("smol.log"))
    assert "parse: error parsing grammar: … (left out: it quotes a request)" in log
    assert "quoting a request" in log
    assert "failed to parse grammar" in log
