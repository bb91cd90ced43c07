"""/v1/* on Ollama's port: OpenAI's API with Ollama's defaults and extensions."""

from __future__ import annotations

from typing import Any

from llamarunner.catalog.catalog import Model
from llamarunner.errors import RequestError
from llamarunner.proxies.ollama import describe
from llamarunner.proxies.ollama.parameters import keep_alive_s
from llamarunner.proxies.openai import OpenAIRoutes
from llamarunner.proxies.sse import amend_lines


class OllamaOpenAI(OpenAIRoutes):
    """/v1/* as Ollama has it, with its `keep_alive` as an extension."""

    def amend(self, data: bytes) -> bytes:
        return amend_lines(data, b'"reasoning_content"', _name_reasoning)

    def model_record(self, model: Model) -> dict[str, Any]:
        created = int(model.modified_at)
        return {"id": describe.tagged(model.name), "object": "model", "created": created, "owned_by": "library"}

    def keep_alive(self, body: dict[str, Any]) -> float | None:
        return keep_alive_s(body.get("keep_alive"))

    def check_chat(self, body: dict[str, Any], model: Model) -> bool:
        if body.get("messages") in (None, []):
            raise RequestError("[] is too short - 'messages'")
        super().check_chat(body, model)
        return self._with_defaults(body)

    def check_completion(self, body: dict[str, Any], model: Model) -> bool:
        super().check_completion(body, model)
        return self._with_defaults(body)

    @staticmethod
    def _with_defaults(body: dict[str, Any]) -> bool:
        """Ollama's defaults here are OpenAI's, neither its own nor llama-server's."""
        missing = [name for name in ("temperature", "top_p") if body.get(name) is None]
        body.update(dict.fromkeys(missing, 1.0))
        return bool(missing)


def _name_reasoning(record: dict[str, Any]) -> None:
    """Clients look for a model's thoughts under llama-server's name for them or Ollama's."""
    for choice in record["choices"]:
        part = choice.get("delta") or choice.get("message") or {}
        if "reasoning_content" in part:
            part["reasoning"] = part["reasoning_content"]
