"""What Ollama's clients may ask beyond a chat, against the built-in engine and a real model: embeddings, prompts longer
than the context, prompts shown, a client that leaves."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import ollama
import pytest
import pytest_asyncio
from serving import Serving, serve, soon

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "smol"
GREEDY = {"temperature": 0, "num_predict": 6}
TOO_LONG = (
    "the prompt is longer than the context length currently available to the model; shorten the prompt, adjust the "
    "context length in settings, or use a model with a longer context length"
)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> AsyncIterator[Serving]:
    model: dict[str, Any] = {"path": str(smollm2_path), "context": 256, "flags": {"threads": 1, "threads-batch": 1}}
    shifting = {**model, "flags": {**model["flags"], "context-shift": True}}
    models = {MODEL: model, "shifting": shifting, "embedder": {**model, "embeddings": True, "parallel": 2}}
    home = tmp_path_factory.mktemp("real")
    async with serve(home, {"models": models, "engines": {"default": {"kind": "builtin"}}}) as serving:
        yield serving


@pytest_asyncio.fixture(loop_scope="module")
async def client(real: Serving) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(real.ollama) as client:
        yield client


async def post(real: Serving, path: str, body: object) -> tuple[int, Any, Any]:
    async with aiohttp.ClientSession(real.ollama) as session, session.post(path, json=body) as answer:
        return answer.status, await answer.json(content_type=None), answer.headers


def length(vector: Any) -> float:
    return math.hypot(*vector)


def likeness(one: Any, other: Any) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


# --- embeddings -----------------------------------------------------------------------------------------------------


async def test_a_batch_is_embedded_in_its_order(client: ollama.AsyncClient) -> None:
    texts = [f"Number {n} is a number." for n in range(12)]
    batch = await client.embed("embedder", texts)
    assert [length(vector) for vector in batch.embeddings] == pytest.approx([1.0] * 12)
    for index in (0, 7, 11):
        (alone,) = (await client.embed("embedder", texts[index])).embeddings
        assert likeness(alone, batch.embeddings[index]) == pytest.approx(1.0, abs=1e-3)
    assert batch.prompt_eval_count is not None
    assert batch.prompt_eval_count >= 12 * 5
    assert batch.total_duration
    assert batch.load_duration
    assert batch.model == "embedder"


async def test_fewer_dimensions_have_length_one_again(client: ollama.AsyncClient) -> None:
    (whole,) = (await client.embed("embedder", "a text")).embeddings
    (cut,) = (await client.embed("embedder", "a text", dimensions=64)).embeddings
    assert len(cut) == 64
    assert length(cut) == pytest.approx(1.0)
    assert likeness(cut, [each / length(whole[:64]) for each in whole[:64]]) == pytest.approx(1.0, abs=1e-3)
    (same,) = (await client.embed("embedder", "a text", dimensions=10_000)).embeddings
    assert len(same) == len(whole)


async def test_a_text_that_is_too_long_is_cut_or_refused(real: Serving) -> None:
    long = "word " * 900
    status, answer, headers = await post(real, "/api/embed", {"model": "embedder", "input": ["short", long]})
    assert status == 200, answer
    assert [length(vector) for vector in answer["embeddings"]] == pytest.approx([1.0, 1.0])
    assert headers["X-LlamaRunner-Truncated"] == "the end of 1 of 2 inputs"
    assert real.finished[-1].truncated == "the end of 1 of 2 inputs"
    refused = await post(real, "/api/embed", {"model": "embedder", "input": long, "truncate": False})
    assert refused[:2] == (400, {"error": "the input length exceeds the context length"})
    status, answer, _ = await post(real, "/api/embeddings", {"model": "embedder", "prompt": long})
    assert status == 200
    assert length(answer["embedding"]) == pytest.approx(1.0)


async def test_nothing_to_embed_only_loads(real: Serving) -> None:
    for given in ("", [], None):
        assert (await post(real, "/api/embed", {"model": "embedder", "input": given}))[:2] == (
            200, {"model": "embedder", "embeddings": []},
        )  # fmt: skip
    assert (await post(real, "/api/embeddings", {"model": "embedder"}))[:2] == (200, {"embedding": []})


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/api/embed", {"model": MODEL, "input": "x"}, 400, "smol does not support embeddings"),
        ("/api/embeddings", {"model": MODEL, "prompt": "x"}, 400, "smol does not support embeddings"),
        ("/api/embed", {"model": "embedder", "input": 7}, 400, "invalid input type"),
        ("/api/embed", {"model": "embedder", "input": ["x", 7]}, 400, "invalid input type"),
        ("/api/embed", {"model": "llama9", "input": "x"}, 404, 'model "llama9" not found, try pulling it first'),
        ("/api/embed", {"input": "x"}, 404, "model '' not found"),
        ("/api/embeddings", {"prompt": "x"}, 400, "model is required"),
    ],
)
async def test_what_cannot_be_embedded(real: Serving, path: str, body: Any, status: int, error: str) -> None:
    assert (await post(real, path, body))[:2] == (status, {"error": error})


# --- prompts longer than the context --------------------------------------------------------------------------------


def turns(count: int) -> list[dict[str, str]]:
    names = ("user", "assistant")
    return [{"role": names[n % 2], "content": f"Message {n}: " + "many words " * 10} for n in range(count)]


async def test_the_oldest_turns_are_left_out_and_it_is_said(real: Serving) -> None:
    messages = [{"role": "system", "content": "You speak of Zebras."}, *turns(15)]
    body = {"model": MODEL, "messages": messages, "options": GREEDY, "stream": False}
    status, answer, headers = await post(real, "/api/chat", body)
    assert status == 200, answer
    assert answer["prompt_eval_count"] < 256
    what = headers["X-LlamaRunner-Truncated"]
    assert real.finished[-1].truncated == what
    left_out = int(what.split()[2])
    assert what == f"the oldest {left_out} of 16 messages"
    assert 5 < left_out < 15
    # with one message more it would not have fitted, so that no more was left out than needed
    kept = [messages[0], *messages[left_out + 1 :]]
    more = [messages[0], *messages[left_out:]]
    whole = {**body, "truncate": False}
    assert (await post(real, "/api/chat", {**whole, "messages": kept}))[0] == 200
    assert (await post(real, "/api/chat", {**whole, "messages": more}))[:2] == (400, {"error": TOO_LONG})


async def test_a_stream_says_so_before_its_first_line(real: Serving) -> None:
    body = {"model": MODEL, "messages": turns(15), "options": GREEDY}
    async with aiohttp.ClientSession(real.ollama) as session, session.post("/api/chat", json=body) as answer:
        assert answer.headers["X-LlamaRunner-Truncated"].startswith("the oldest ")
        assert b'"done":true' in await answer.read()
    _, _, headers = await post(real, "/api/chat", {**body, "messages": turns(1), "stream": False})
    assert "X-LlamaRunner-Truncated" not in headers


async def test_one_message_that_is_too_long_is_refused(real: Serving) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "word " * 600}]}
    assert (await post(real, "/api/chat", body))[:2] == (400, {"error": TOO_LONG})


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "templated"])
async def test_a_long_prompt_loses_its_middle(real: Serving, raw: bool) -> None:
    prompt = "Beginning. " + "word " * 600 + "one two three four"
    body = {"model": MODEL, "prompt": prompt, "raw": raw, "options": GREEDY, "stream": False}
    status, answer, headers = await post(real, "/api/generate", body)
    assert status == 200, answer
    assert 100 < answer["prompt_eval_count"] < 256
    assert headers["X-LlamaRunner-Truncated"].endswith(" tokens in the middle of the prompt")
    assert (await post(real, "/api/generate", {**body, "truncate": False}))[:2] == (400, {"error": TOO_LONG})


# --- the rest -------------------------------------------------------------------------------------------------------


async def test_a_prompt_may_only_be_rendered(real: Serving) -> None:
    ask = {"model": MODEL, "_debug_render_only": True}
    _, chat, _ = await post(real, "/api/chat", {**ask, "messages": [{"role": "user", "content": "Hi"}]})
    assert chat["_debug_info"]["rendered_template"].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    _, generated, _ = await post(real, "/api/generate", {**ask, "prompt": "Hi", "system": "Be kind"})
    assert "Be kind" in generated["_debug_info"]["rendered_template"]
    _, raw, _ = await post(real, "/api/generate", {**ask, "prompt": "As is", "raw": True})
    assert raw["_debug_info"] == {"rendered_template": "As is"}


async def test_a_preset_counts_wherever_it_is_asked(real: Serving, client: ollama.AsyncClient) -> None:
    begun = [{"role": "user", "content": "Ahoy?"}, {"role": "assistant", "content": "Arr."}]
    await client.create("pirate", from_=MODEL, system="You are a pirate.", messages=begun,
                        parameters={"num_predict": 3, "temperature": 0, "stop": ["zzz"]})  # fmt: skip
    ask = {"model": "pirate", "_debug_render_only": True}
    _, chat, _ = await post(real, "/api/chat", {**ask, "messages": [{"role": "user", "content": "Hi"}]})
    _, generated, _ = await post(real, "/api/generate", {**ask, "prompt": "Hi"})
    prompt = chat["_debug_info"]["rendered_template"]
    assert prompt == generated["_debug_info"]["rendered_template"]
    texts = ["system\nYou are a pirate.", "user\nAhoy?", "assistant\nArr.", "user\nHi"]
    assert prompt == "".join(f"<|im_start|>{text}<|im_end|>\n" for text in texts) + "<|im_start|>assistant\n"
    answer = await client.chat("pirate", [{"role": "user", "content": "Hi"}])
    assert (answer.eval_count, answer.done_reason) == (3, "length")
    body = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}]}
    _, v1, _ = await post(real, "/v1/chat/completions", body)
    assert v1["usage"]["completion_tokens"] == 3
    assert v1["usage"]["prompt_tokens"] == answer.prompt_eval_count
    async with httpx.AsyncClient(base_url=real.lmstudio, timeout=60) as other_port:
        for path in ("/v1/chat/completions", "/api/v0/chat/completions"):
            usage = (await other_port.post(path, json=body)).json()["usage"]
            assert (usage["completion_tokens"], usage["prompt_tokens"]) == (3, answer.prompt_eval_count), path
        for base in (real.ollama, real.lmstudio):
            response = {"model": "pirate", "input": body["messages"][0]["content"]}
            usage = (await other_port.post(f"{base}/v1/responses", json=response)).json()["usage"]
            assert (usage["output_tokens"], usage["input_tokens"]) == (3, answer.prompt_eval_count)
            count = (await other_port.post(f"{base}/v1/messages/count_tokens", json=body)).json()
            assert count == {"input_tokens": answer.prompt_eval_count}
    shown = await client.show("pirate")
    assert 'stop                           "zzz"' in (shown.parameters or "")


async def test_show_tells_of_tensors_where_asked(real: Serving) -> None:
    _, shown, _ = await post(real, "/api/show", {"NAME": MODEL, "Verbose": True})
    assert len(shown["tensors"]) == 272
    assert {"name": "token_embd.weight", "type": "Q8_0", "shape": [576, 49152]} in shown["tensors"]
    assert shown["model_info"]["tokenizer.ggml.tokens"] is None
    _, short, _ = await post(real, "/api/show", {"model": MODEL})
    assert "tensors" not in short


async def test_tools_need_a_model_that_has_them(real: Serving) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body = {"model": MODEL, "messages": turns(1), "tools": [tool]}
    assert (await post(real, "/api/chat", body))[:2] == (400, {"error": "smol does not support tools"})


async def test_the_end_of_the_context_ends_the_answer_unless_it_is_to_shift(real: Serving) -> None:
    ask = {"prompt": "word " * 200, "raw": True, "stream": False, "options": {"num_predict": 120, "temperature": 0}}
    counts: dict[str, int] = {}
    for model in (MODEL, "shifting"):
        _, answer, _ = await post(real, "/api/generate", {"model": model, **ask})
        assert answer["done_reason"] == "length"
        counts[model] = answer["eval_count"]
    assert counts[MODEL] < 60 < counts["shifting"] == 120
    refused = await post(real, "/api/generate", {"model": "shifting", **ask, "shift": False})
    assert refused[:2] == (400, {"error": "shifting always shifts its context: shift cannot be false"})


async def test_options_of_the_load_load_again(real: Serving, client: ollama.AsyncClient) -> None:
    before = len(real.starts)
    options = {**GREEDY, "num_batch": 64, "use_mmap": False, "num_ctx": 300}
    for _ in range(2):
        assert (await client.generate(MODEL, "Hi", options=options)).response
    await client.generate(MODEL, "Hi", options=GREEDY)
    assert len(real.starts) == before + 1
    residence = real.service.manager.residence(MODEL)
    assert residence is not None
    assert residence.runner is not None
    assert residence.runner.plan is not None
    argv = " ".join(residence.runner.plan.argv)
    for flag in ("--ctx-size 300", "--batch-size 64", "--ubatch-size 64", "--load-mode none"):
        assert flag in argv


async def test_generation_stops_when_the_client_leaves(real: Serving) -> None:
    body = {"model": MODEL, "prompt": "Count.", "raw": True, "options": {"num_predict": -1, "temperature": 2.0}}
    async with aiohttp.ClientSession(real.ollama) as session:
        async with session.post("/api/generate", json=body) as answer:
            await answer.content.readline()
        left = time.monotonic()
        residence = real.service.manager.residence(MODEL)
        assert residence is not None
        assert residence.runner is not None
        plan = residence.runner.plan
        assert plan is not None

        async def is_idle() -> bool:
            async with session.get(f"{plan.base_url}/slots", headers=plan.headers) as slots:
                return not any(slot["is_processing"] for slot in await slots.json())

        while not await is_idle():
            assert time.monotonic() - left < 1.0, "it still generates"
            await asyncio.sleep(0.02)
    await soon(lambda: real.finished[-1].phase == "cancelled")
