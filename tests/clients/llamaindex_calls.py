"""LlamaIndex and a model of Ollama's. `python llamaindex_calls.py BASE MODEL` prints what came back as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.llms.ollama import Ollama

QUESTION = "What is the capital of France? Answer in one word."


async def main(base: str, model: str) -> dict[str, Any]:
    turns = [ChatMessage(role="user", content=QUESTION)]
    llm = Ollama(
        model=model, base_url=base, temperature=0, request_timeout=60, additional_kwargs={"num_predict": 8},
        context_window=256,
    )  # fmt: skip
    asked = [part async for part in await llm.astream_chat(turns)]
    embed = OllamaEmbedding(model_name=model, base_url=base)
    return {
        "context": Ollama(model=model, base_url=base, request_timeout=60).get_context_window(),
        "whole": llm.chat(turns).message.content,
        "deltas": [part.delta or "" for part in asked],
        "last": asked[-1].message.content,
        "streamed": list(llm.stream_chat(turns))[-1].message.content,
        "completed": (await llm.acomplete(QUESTION)).text,
        "completed_parts": [part.delta for part in llm.stream_complete(QUESTION)],
        "vectors": embed.get_text_embedding_batch(["a cat", "a kitten"]),
        "vector": await embed.aget_query_embedding("a cat"),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
