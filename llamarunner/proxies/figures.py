"""What is noted of an answer: tokens, rates, and what went wrong, in words that quote nobody."""

from __future__ import annotations

from typing import Any

from llamarunner.errors import EngineRefusalError, LlamaRunnerError
from llamarunner.events import RequestTrace
from llamarunner.proxies.body import QuotingError


def loggable(error: LlamaRunnerError) -> str:
    """What may be kept of `error`: an engine quotes what it refuses, and that may be the prompt."""
    match error:
        case EngineRefusalError(status=status, kind=kind):
            return f"the engine refused it: status {status} {kind}".rstrip()
        case QuotingError(summary=summary):
            return summary
        case _:
            return str(error)


def note_figures(trace: RequestTrace, answer: dict[str, Any]) -> None:
    """Tokens and rates of a whole answer, or of a stream's event that carries them."""
    for part in (answer, answer.get("response"), answer.get("message")):
        if isinstance(part, dict) and isinstance(part.get("usage"), dict):
            _note_usage(trace, part["usage"])
    timings = answer.get("timings")
    if isinstance(timings, dict):
        cached = timings.get("cache_n") or 0
        trace.prompt_tokens = cached + (timings.get("prompt_n") or 0)
        trace.cached_tokens = cached
        trace.output_tokens = timings.get("predicted_n", trace.output_tokens)
        trace.prompt_tokens_per_s = timings.get("prompt_per_second")
        trace.output_tokens_per_s = timings.get("predicted_per_second")


def _note_usage(trace: RequestTrace, usage: dict[str, Any]) -> None:
    """OpenAI's names, those of its responses, and Anthropic's, which does not count what was cached as input."""
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    if prompt is not None:
        trace.prompt_tokens = prompt + (usage.get("cache_read_input_tokens") or 0)
    trace.output_tokens = usage.get("completion_tokens", usage.get("output_tokens", trace.output_tokens))
