"""Models of another server, and engines that cannot do all: through the whole service."""

from __future__ import annotations

from pathlib import Path

import httpx
from serving import scripted_config, serve, soon

CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": False}


async def test_models_of_another_server_are_listed_and_answer(tmp_path: Path) -> None:
    """One service uses another: its models are listed under their own names, and answer in both dialects."""
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    theirs, their_scripts = scripted_config(tmp_path / "there", {"far": {}})
    ours, our_scripts = scripted_config(tmp_path / "here", {"near": {}})
    their_scripts["far"].set(tokens=["Hello", " from", " afar"])
    async with serve(tmp_path / "there" / "home", theirs, their_scripts) as other:
        ours["engines"]["box"] = {"kind": "remote", "url": other.lmstudio}
        ours["scheduler"] = {"max_loaded": 1}
        async with serve(tmp_path / "here" / "home", ours, our_scripts) as serving, httpx.AsyncClient() as client:
            await soon(lambda: serving.service.catalog.get("far"))
            listed = (await client.get(f"{serving.lmstudio}/v1/models")).json()["data"]
            assert {model["id"] for model in listed} == {"near", "far"}
            circle = await client.get(f"{serving.lmstudio}/v1/models", headers={"User-Agent": "llamarunner/0.1.0"})
            assert [model["id"] for model in circle.json()["data"]] == ["near"], "two that use each other"

            ollama = (await client.post(f"{serving.ollama}/api/chat", json={"model": "far", **CHAT})).json()
            assert ollama["message"]["content"] == "Hello from afar"
            assert ollama["model"] == "far"
            assert ollama["eval_count"] > 0
            openai = (
                await client.post(f"{serving.lmstudio}/v1/chat/completions", json={"model": "far", **CHAT})
            ).json()
            assert openai["choices"][0]["message"]["content"] == "Hello from afar"
            generate = {"model": "far", "prompt": "hi", "stream": False}
            told = (await client.post(f"{serving.ollama}/api/generate", json=generate)).json()
            assert told["response"] == "Hello from afar"
            raw = await client.post(f"{serving.ollama}/api/generate", json={**generate, "raw": True})
            assert (raw.status_code, "raw prompts" in raw.text) == (400, True)

            near = await client.post(f"{serving.ollama}/api/chat", json={"model": "near", **CHAT})
            assert near.status_code == 200
            places = [serving.service.manager.residence(name) for name in ("near", "far")]
            assert all(place is not None and place.runner is not None for place in places), "a remote takes no place"


async def test_a_server_that_goes_away_keeps_its_models_and_says_why_they_fail(tmp_path: Path) -> None:
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    theirs, their_scripts = scripted_config(tmp_path / "there", {"far": {}})
    ours, our_scripts = scripted_config(tmp_path / "here", {"near": {}})
    async with serve(tmp_path / "there" / "home", theirs, their_scripts) as other:
        ours["engines"]["box"] = {"kind": "remote", "url": other.lmstudio}
        here = serve(tmp_path / "here" / "home", ours, our_scripts)
        serving = await here.__aenter__()
        await soon(lambda: serving.service.catalog.get("far"))
    try:
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"{serving.ollama}/api/chat", json={"model": "far", **CHAT})
            assert answer.status_code == 500
            assert "cannot be reached" in answer.json()["error"]
            assert (await client.post(f"{serving.ollama}/api/chat", json={"model": "near", **CHAT})).status_code == 200
    finally:
        await here.__aexit__(None, None, None)


async def test_a_fork_without_tools_is_asked_without_them_and_the_client_is_told(tmp_path: Path) -> None:
    config, scripts = scripted_config(tmp_path)
    config["engines"]["e0"]["supports_tools"] = False
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    chats = ("ollama /api/chat", "ollama /v1/chat/completions")
    chats += ("lmstudio /v1/chat/completions", "lmstudio /api/v0/chat/completions")
    async with serve(tmp_path / "home", config, scripts) as serving, httpx.AsyncClient() as client:
        for proxy, path in (chat.split() for chat in chats):
            for stream in (False, True):
                body = {"model": "smol", **CHAT, "tools": tools, "stream": stream}
                answer = await client.post(serving.url(proxy) + path, json=body)
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-llamarunner-stripped"] == "tools", (proxy, path, stream)
                assert "tools" not in serving.script.asked("/v1/chat/completions")
        plain = await client.post(f"{serving.ollama}/api/chat", json={"model": "smol", **CHAT})
        assert "x-llamarunner-stripped" not in plain.headers
        assert [trace.stripped for trace in serving.finished] == ["tools"] * 8 + [""]
