"""Shortens a prompt that the engine refused as too long, as Ollama does, and says so.

The engine is asked first, with the whole prompt: it alone knows exactly what fits, and refuses before it works. So an
ordinary request costs nothing more, and only a refused one is counted (/apply-template, /tokenize) and cut.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import orjson

from llamarunner.errors import EngineRefusalError
from llamarunner.proxies.ollama.asking import Question
from llamarunner.proxies.ollama.chat import template_question
from llamarunner.proxies.ollama.messages import Message, text_only
from llamarunner.proxies.ollama.truncate import (
    IMAGE_TOKENS,
    cuts,
    least,
    likely_cut,
    without_middle,
    without_oldest,
)
from llamarunner.proxies.relay import Relay
from llamarunner.runners.manager import Lease

logger = logging.getLogger(__name__)


class Shortening:
    """Of one question: `asked` is the body that was refused."""

    def __init__(self, relay: Relay, question: Question, asked: Mapping[str, Any]) -> None:
        self._relay = relay
        self._fields = question.fields
        self._is_chat = question.is_chat
        self._model = question.model
        self._trace = question.trace
        self._asked = asked

    async def __call__(self, lease: Lease, refusal: EngineRefusalError) -> bytes:
        """The body to ask instead. Raises `refusal` where the prompt must stay whole, or nothing makes it fit."""
        room = refusal.context or lease.runner.context
        if not self._fields.get("truncate", True) or room is None:
            raise refusal
        if "messages" not in self._asked:
            changes = await self._shorter_text(lease, room)
        elif self._is_chat:
            changes = await self._fewer_messages(lease, room, refusal)
        else:
            changes = await self._shorter_prompt(lease, room)
        if changes is None:
            raise refusal
        logger.info("%s: the prompt was longer than its context: left out %s", self._model.name, self._trace.truncated)
        return orjson.dumps({**self._asked, **changes})

    async def _fewer_messages(self, lease: Lease, room: int, refusal: EngineRefusalError) -> dict[str, Any] | None:
        """A conversation without its oldest turns."""
        messages: list[Message] = self._asked["messages"]

        possible = cuts(messages)
        kept: list[Message] = []

        async def fits(index: int) -> bool:
            """Of a cut that the template refuses, the next one that it takes decides."""
            nonlocal kept
            for count in possible[index:]:
                rest = without_oldest(messages, count)
                if (tokens := await self._count(lease, rest)) is not None:
                    kept = rest if tokens < room else kept
                    return tokens < room
            return False

        likely = likely_cut(messages, possible, refusal.prompt_tokens, room)
        if await least(len(possible), fits, likely) is None:
            return None
        self._trace.truncated = f"the oldest {len(messages) - len(kept)} of {len(messages)} messages"
        return {"messages": kept}

    async def _shorter_prompt(self, lease: Lease, room: int) -> dict[str, Any] | None:
        """A prompt of one turn without its middle; what stands around it stays."""
        *before, turn = self._asked["messages"]
        (plain,), _ = text_only([turn])
        around = await self._count(lease, [*before, _with_text(turn, "")])
        tokens = await self._tokens(lease, plain["content"], special=False)
        if around is None or around + 2 >= room:
            return None
        kept = without_middle(tokens, self._asked["n_keep"], room - around)
        text = await self._relay.call(lease, "/detokenize", {"tokens": kept})
        self._say_cut(len(tokens), len(kept))
        return {"messages": [*before, _with_text(turn, text["content"])]}

    async def _shorter_text(self, lease: Lease, room: int) -> dict[str, Any] | None:
        """Raw text without its middle. For an infill, the end of what comes before and the beginning of what follows
        would have to be weighed: the engine does that itself, and what it refuses is refused."""
        prompt = self._asked["prompt"]
        if not prompt or "input_prefix" in self._asked:
            return None
        tokens = await self._tokens(lease, prompt, special=True)
        kept = without_middle(tokens, self._asked["n_keep"], room)
        self._say_cut(len(tokens), len(kept))
        return {"prompt": kept}

    def _say_cut(self, there: int, kept: int) -> None:
        self._trace.truncated = f"{there - kept} of {there} tokens in the middle of the prompt"

    async def _count(self, lease: Lease, messages: list[Message]) -> int | None:
        """Tokens of the prompt that these messages make; None where the template refuses them."""
        plain, files = text_only(messages)
        try:
            rendered = await self._relay.call(lease, "/apply-template", template_question(self._asked, plain))
        except EngineRefusalError:
            return None
        return len(await self._tokens(lease, rendered["prompt"], special=True)) + files * IMAGE_TOKENS

    async def _tokens(self, lease: Lease, text: str, *, special: bool) -> list[int]:
        found = await self._relay.call(lease, "/tokenize", {"content": text, "add_special": special})
        tokens: list[int] = found["tokens"]
        return tokens


def _with_text(message: Message, text: str) -> Message:
    content = message["content"]
    if not isinstance(content, list):
        return {**message, "content": text}
    files = [part for part in content if part["type"] != "text"]
    return {**message, "content": [{"type": "text", "text": text}, *files]}
