"""What is noted of an answer: tokens, rates, and what went wrong, in words that quote nobody."""

from __future__ import annotations

from typing import Any

from llamarunner.errors import EngineRefusalError, LlamaRunnerError
from llamarunner.events import RequestTrace
from llamarunner.proxies.body import QuotingError

_MOST = 2**53  # what JSON's numbers hold exactly


def loggable(error: LlamaRunnerError) -> str:
    """What may be kept of `error`: an engine quotes what it refuses, and that may be the prompt."""
    match error:
        case EngineRefusalError(status=status, kind=kind):
            return f"the engine refused it: status {status} {kind}".rstrip()
        case QuotingError(summary=summary):
            return summary
        case _:
            return str(error)


def numbers(figures: object) -> dict[str, Any]:
    """Of the figures that an engine sends those which are any; servers elsewhere send all sorts."""
    if not isinstance(figures, dict):
        return {}
    return {
        name: value
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST
    }


def note_figures(trace: RequestTrace, answer: dict[str, Any]) -> None:
    """Tokens and rates of a whole answer, or of a stream's event that carries them."""
    for part in (answer, answer.get("response"), answer.get("message")):
        if isinstance(part, dict) and (usage := numbers(part.get("usage"))):
            _note_usage(trace, usage)
    if timings := numbers(answer.get("timings")):
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
