"""Ollama's prompt templates are written in Go's language. The little of it that prompts of one turn need is understood
here: `{{ .System }}`, `{{ .Prompt }}`, `{{ .Suffix }}`, `{{ .Response }}`, `if`, `else`, `end` and the dashes that
trim. Branches that are not taken may hold anything. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from llamarunner.errors import UnsupportedError

_ACTION = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.DOTALL)
_FIELD = re.compile(r"\.(System|Prompt|Suffix|Response)")
_IF = re.compile(r"(else\s+)?if\s+(?:\.(System|Prompt|Suffix|Response)$)?")
_OPENS = re.compile(r"(?:if|range|with|block|define)\b")
_UNSUPPORTED = "this template uses more of Go's language than is understood here: .System, .Prompt, .Suffix and if"


def render(template: str, system: str, prompt: str, suffix: str = "") -> str:
    """The prompt, up to where the response goes. Raises UnsupportedError for a template that needs more."""
    writer = _Writer({"System": system, "Prompt": prompt, "Suffix": suffix, "Response": ""})
    for text, action in _pieces(template):
        writer.write(text)
        if action is None:
            break
        if action == ".Response" and writer.is_shown:
            return "".join(writer.out)
        writer.act(action)
    if writer.blocks:
        raise UnsupportedError("this template has an `if` without its `end`")
    return "".join(writer.out)


@dataclass(slots=True)
class _Block:
    shown: bool  # its text counts
    settled: bool  # no later branch of it can be taken


@dataclass(slots=True)
class _Writer:
    fields: dict[str, str]
    out: list[str] = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)

    @property
    def is_shown(self) -> bool:
        return all(block.shown for block in self.blocks)

    def write(self, text: str) -> None:
        if self.is_shown:
            self.out.append(text)

    def act(self, action: str) -> None:
        condition = _IF.match(action)
        if action == "end" and self.blocks:
            self.blocks.pop()
        elif action == "else" and self.blocks:
            self._branch(taken=True)
        elif condition and condition[1] and self.blocks:
            self._branch(taken=self._holds(condition[2], needed=not self.blocks[-1].settled))
        elif not self.is_shown:
            if _OPENS.match(action):
                self.blocks.append(_Block(shown=False, settled=True))
        elif condition and not condition[1]:
            taken = self._holds(condition[2], needed=True)
            self.blocks.append(_Block(shown=taken, settled=taken))
        elif found := _FIELD.fullmatch(action):
            self.out.append(self.fields[found[1]])
        elif not action.startswith("/*"):
            raise UnsupportedError(_UNSUPPORTED)

    def _branch(self, *, taken: bool) -> None:
        block = self.blocks[-1]
        block.shown = taken and not block.settled
        block.settled = block.settled or taken

    def _holds(self, name: str | None, *, needed: bool) -> bool:
        if name is None:
            if needed:
                raise UnsupportedError(_UNSUPPORTED)
            return False
        return bool(self.fields[name])


def _pieces(template: str) -> Iterator[tuple[str, str | None]]:
    """Each text and the action after it; after the last one None."""
    at, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip() if trim else text
        yield (text.rstrip() if match[1] else text), match[2]
        at, trim = match.end(), bool(match[3])
    rest = template[at:]
    if "{{" in rest:
        raise UnsupportedError("this template has a `{{` without its `}}`")
    yield (rest.lstrip() if trim else rest), None
