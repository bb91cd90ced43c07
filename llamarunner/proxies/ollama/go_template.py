"""Ollama's prompt templates are written in Go's language. The little of it that prompts of one turn need is understood
here: `{{ .System }}`, `{{ .Prompt }}`, `{{ .Suffix }}`, `{{ .Response }}`, `if`, `else`, `end` and the dashes that
trim. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from llamarunner.errors import UnsupportedError

_ACTION = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.DOTALL)
_FIELD = re.compile(r"\.(System|Prompt|Suffix|Response)")
_IF = re.compile(r"if\s+\.(System|Prompt|Suffix|Response)")
_UNSUPPORTED = "this template uses more of Go's language than is understood here: .System, .Prompt, .Suffix and if"


def render(template: str, system: str, prompt: str, suffix: str = "") -> str:
    """The prompt, up to where the response goes. Raises UnsupportedError for a template that needs more."""
    fields = {"System": system, "Prompt": prompt, "Suffix": suffix, "Response": ""}
    out: list[str] = []
    shown = [True]  # for each block that is open, whether its text counts
    for text, action in _pieces(template):
        if all(shown):
            out.append(text)
        if action is None:
            break
        if action == ".Response" and all(shown):
            return "".join(out)
        _act(action, fields, shown, out)
    if len(shown) != 1:
        raise UnsupportedError("this template has an `if` without its `end`")
    return "".join(out)


def _act(action: str, fields: Mapping[str, str], shown: list[bool], out: list[str]) -> None:
    if condition := _IF.fullmatch(action):
        shown.append(bool(fields[condition[1]]))
    elif action == "else" and len(shown) > 1:
        shown[-1] = not shown[-1]
    elif action == "end" and len(shown) > 1:
        shown.pop()
    elif field := _FIELD.fullmatch(action):
        if all(shown):
            out.append(fields[field[1]])
    elif not action.startswith("/*"):
        raise UnsupportedError(_UNSUPPORTED)


def _pieces(template: str) -> Iterator[tuple[str, str | None]]:
    """Each text and the action after it; after the last one None."""
    at, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip() if trim else text
        yield (text.rstrip() if match[1] else text), match[2]
        at, trim = match.end(), bool(match[3])
    rest = template[at:]
    yield (rest.lstrip() if trim else rest), None
