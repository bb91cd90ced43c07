"""/v1/* on Ollama's port: OpenAI's API with Ollama's defaults and extensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.errors import RequestError
from llamarunner.proxies.body import QuotingError
from llamarunner.proxies.dialect import Dialect
from llamarunner.proxies.ollama import describe
from llamarunner.proxies.ollama.asking import Asking
from llamarunner.proxies.ollama.errors import OptionError
from llamarunner.proxies.ollama.parameters import keep_alive_s, template_kwargs
from llamarunner.proxies.openai import OpenAIRoutes
from llamarunner.proxies.relay import Relay
from llamarunner.proxies.sse import amend_lines
from llamarunner.runners.demand import Demand

_THINK: Mapping[str, str | bool] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "max": "max",
    "xhigh": "max",
    "ultra": "max",
}
"""`think` for each of OpenAI's efforts."""


class OllamaOpenAI(OpenAIRoutes):
    """/v1/* as Ollama has it, with `keep_alive`, `num_ctx` and `options` as extensions."""

    def __init__(self, relay: Relay, dialect: Dialect, asking: Asking) -> None:
        super().__init__(relay, dialect)
        self._asking = asking

    def amend(self, data: bytes) -> bytes:
        return amend_lines(data, b'"reasoning_content"', _name_reasoning)

    def model_record(self, model: Model) -> dict[str, Any]:
        created = int(model.modified_at)
        return {"id": describe.tagged(model.name), "object": "model", "created": created, "owned_by": "library"}

    def model_records(self, model: Model) -> list[dict[str, Any]]:
        record = self.model_record(model)
        return [{**record, "id": describe.tagged(name)} for name in describe.listed_names(model)]

    def keep_alive(self, body: dict[str, Any]) -> float | None:
        return keep_alive_s(body.get("keep_alive"))

    def demand(self, body: dict[str, Any], model: Model) -> Demand:
        options = body.get("options")
        asked = dict(options) if isinstance(options, dict) else {}
        if body.get("num_ctx") is not None:
            asked["num_ctx"] = body["num_ctx"]
        try:
            return self._asking.demand(model, asked)
        except OptionError as error:
            raise RequestError(error.message) from None  # 500 is for Ollama's own API

    def check_chat(self, body: dict[str, Any], model: Model) -> bool:
        if body.get("messages") in (None, []):
            raise RequestError("[] is too short - 'messages'")
        has_preset = super().check_chat(body, model)
        thinks = _set_thinking(body, model)
        return self._with_defaults(body) or thinks or has_preset

    def check_responses(self, body: dict[str, Any], model: Model) -> bool:
        is_changed = super().check_responses(body, model)
        # coding agents ask every model for some effort
        thinks = Capability.THINKING in model.capabilities and _set_thinking(body, model)
        return self._with_defaults(body) or thinks or is_changed

    def check_completion(self, body: dict[str, Any], model: Model) -> bool:
        has_preset = super().check_completion(body, model)
        return self._with_defaults(body) or has_preset

    @staticmethod
    def _with_defaults(body: dict[str, Any]) -> bool:
        """Ollama's defaults here are OpenAI's, neither its own nor llama-server's."""
        missing = [name for name in ("temperature", "top_p") if body.get(name) is None]
        body.update(dict.fromkeys(missing, 1.0))
        return bool(missing)


def _set_thinking(body: dict[str, Any], model: Model) -> bool:
    """OpenAI's words for how much to think, as arguments of the chat template. True where there are any."""
    reasoning = body.get("reasoning")
    effort = body.get("reasoning_effort") or (reasoning.get("effort") if isinstance(reasoning, dict) else None)
    if effort is None:
        return False
    if not isinstance(effort, str) or effort not in _THINK:
        shown = orjson.dumps(effort).decode()
        message = f'invalid reasoning value: {shown} (must be "high", "medium", "low", "max", or "none")'
        raise QuotingError(message, summary="invalid reasoning value")
    found = template_kwargs(_THINK[effort], model, body["model"])
    if found:
        own = body.get("chat_template_kwargs")
        body["chat_template_kwargs"] = {**found, **(own if isinstance(own, dict) else {})}
    return bool(found)


def _name_reasoning(record: dict[str, Any]) -> None:
    """Clients look for a model's thoughts under llama-server's name for them or Ollama's."""
    for choice in record["choices"]:
        part = choice.get("delta") or choice.get("message") or {}
        if "reasoning_content" in part:
            part["reasoning"] = part["reasoning_content"]
