"""LangChain and a model of Ollama's. `python langchain_calls.py BASE MODEL` prints what came back as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM

QUESTION = "What is the capital of France? Answer in one word."
CITY = {
    "title": "City", "type": "object", "properties": {"name": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["name"],
}  # fmt: skip


async def main(base: str, model: str) -> dict[str, Any]:
    where = {"model": model, "base_url": base}
    chat = ChatOllama(**where, temperature=0, num_predict=8, num_ctx=256, keep_alive="5m", validate_model_on_init=True)
    whole = chat.invoke(QUESTION)
    parts = [part async for part in chat.astream(QUESTION)]
    longer = ChatOllama(**where, temperature=0, num_predict=40)
    complete = OllamaLLM(**where, temperature=0, num_predict=8)
    embed = OllamaEmbeddings(**where)
    try:
        unknown = str(ChatOllama(model="nobody", base_url=base, validate_model_on_init=True))
    except ValueError as error:
        unknown = f"refused: {error}"
    return {
        "whole": whole.content,
        "usage": whole.usage_metadata,
        "done_reason": whole.response_metadata["done_reason"],
        "parts": [part.content for part in parts],
        "streamed_tokens": sum((part.usage_metadata or {}).get("output_tokens", 0) for part in parts),
        "system": "".join(part.content for part in chat.stream([("system", "Be short."), ("human", QUESTION)])),
        "batch": [answer.content for answer in await chat.abatch(["Say one.", "Say two."])],
        "city": await longer.with_structured_output(CITY, method="json_schema").ainvoke("Name a city as JSON."),
        "completed": complete.invoke(QUESTION),
        "completed_parts": [part async for part in complete.astream(QUESTION)],
        "vectors": embed.embed_documents(["a cat", "a kitten"]),
        "vector": await embed.aembed_query("a cat"),
        "unknown": unknown,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
