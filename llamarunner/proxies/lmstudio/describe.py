"""What LM Studio tells of models and answers in its REST API v0. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamarunner import __version__
from llamarunner.catalog.catalog import Capability, Model
from llamarunner.events import RunnerState
from llamarunner.runners.place import Residence

_STATES = {
    RunnerState.STARTING: "loading",
    RunnerState.LOADING: "loading",
    RunnerState.READY: "loaded",
    RunnerState.DRAINING: "loaded",
}
_STOP_REASONS = {"length": "maxPredictedTokensReached", "tool_calls": "toolCalls"}


def model_v0(model: Model, residence: Residence | None) -> dict[str, Any]:
    """One item of GET /api/v0/models."""
    runner = residence.runner if residence is not None else None
    state = _STATES.get(runner.state, "not-loaded") if runner is not None else "not-loaded"
    record: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "type": kind(model),
        "publisher": publisher(model),
        "arch": model.details.architecture or "unknown",
        "compatibility_type": "gguf",
        "quantization": model.details.quantization or "unknown",
        "state": state,
        "max_context_length": model.details.context_length or model.context,
    }
    if runner is not None and state == "loaded":
        record["loaded_context_length"] = runner.context or model.context
    capabilities = {"tool_use": Capability.TOOLS, "vision": Capability.VISION}
    record["capabilities"] = [name for name, needed in capabilities.items() if needed in model.capabilities]
    return record


def kind(model: Model) -> str:
    if model.is_embedding_only:
        return "embeddings"
    return "vlm" if Capability.VISION in model.capabilities else "llm"


def publisher(model: Model) -> str:
    """The first part of a name such as "publisher/model"."""
    first, slash, _ = model.name.partition("/")
    return first if slash and first else "local"


def model_info(model: Model, context: int | None) -> dict[str, Any]:
    return {
        "arch": model.details.architecture or "unknown",
        "quant": model.details.quantization or "unknown",
        "format": "gguf",
        "context_length": context or model.context,
    }


def runtime(engine: str) -> dict[str, Any]:
    return {"name": f"llamarunner-{engine}", "version": __version__, "supported_formats": ["gguf"]}


def stats(timings: Mapping[str, Any], first_token_s: float, finish_reason: str, context: int | None) -> dict[str, Any]:
    """Times are seconds. `finish_reason` is OpenAI's, which does not tell a stop string from the end of the text."""
    generated = timings.get("predicted_n") or 0
    in_all = (timings.get("cache_n") or 0) + (timings.get("prompt_n") or 0) + generated
    reason = _STOP_REASONS.get(finish_reason, "eosFound")
    if finish_reason == "length" and context and in_all >= context:
        reason = "contextLengthReached"
    return {
        "tokens_per_second": timings.get("predicted_per_second") or 0.0,
        "time_to_first_token": first_token_s,
        "generation_time": (timings.get("predicted_ms") or 0.0) / 1000,
        "stop_reason": reason,
    }
