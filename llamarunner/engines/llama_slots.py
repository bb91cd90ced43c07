"""What llama.cpp's server says of its slots: prompts, answers, timings. `llama_log.py` hands it the lines that may be.

Every build has named slot and task differently; here each form becomes the same events, keyed by both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llamarunner.engines.log_events import (
    MAX_SLOTS,
    Events,
    SlotGenerating,
    SlotPrompt,
    SlotReleased,
    SlotTimings,
    Truncated,
)


def grammar(pattern: str) -> re.Pattern[str]:
    """A regular expression in which `#` is a whole number and `~` a decimal one, neither of them huge."""
    return re.compile(pattern.replace("#", r"\d{1,15}").replace("~", r"\d{1,15}(?:\.\d{1,15})?"), re.ASCII)


# Since September 2024: "slot update_slots: id  0 | task 7 | ..."; the task is -1 outside of one.
SLOT = grammar(r"slot +[^ :]*: id +(#) \| task (-?#) \| ?(.*)")
_NEW_PROMPT = grammar(r"new prompt, n_ctx_slot = #, .*?(?:task\.n_tokens|n_prompt_tokens) = (#)")
_PROGRESS = grammar(r"prompt processing(?: progress)?, n_(?:past|tokens) = +(#)(?: / (#))?")
_FRACTION = grammar(r", progress = (~)")
_CACHED = grammar(r"(?:kv cache rm|(?:cached )?n_(?:tokens|past) = #, memory_seq_rm) \[(#), end\)")
_PROMPT_DONE = (
    "prompt done",
    "prompt processing done",
    "init sampler",
    "slot decode token",
    "n_gen = ",
    "n_decoded = 1,",
)
_DECODED = grammar(r"n_decoded = +(#), tg = +(~|inf|nan)")
_TRUNCATED = ("slot context shift", "context shift", "input truncated")
_TIMING = grammar(
    r"(prompt eval|generation eval|eval|total) time += +~ ms(?: / +(#) (?:tokens|runs))?"
    r"(?: +\( *~ ms per (?:token|run), +(~) tokens per second\))?"
)

# Until February 2024: "slot 0 : in cache: ..."
_OLD_SLOT = grammar(r"slot (#)(?: ?:)? (.*)")
_OLD_PROCESSING = grammar(r"is processing \[task id: (#)\]")
_OLD_PROMPT = grammar(r"in cache: (#) tokens \| to process: (#) tokens")

_NO_SLOT = -1


@dataclass(slots=True)
class _Slot:
    task: int
    busy: bool = True
    generating: bool = False
    truncated: bool = False
    done: int = 0
    total: int | None = None
    fraction: float | None = None
    prompt: tuple[int | None, float | None] | None = None  # tokens and tokens a second
    output: tuple[int | None, float | None] | None = None


class SlotReader:
    """Holds a few numbers for each slot."""

    def __init__(self) -> None:
        self._slots: dict[int, _Slot] = {}
        self._timings_for: int | None = None  # the slot whose timings follow on lines of their own

    def clear(self) -> None:
        self._slots.clear()
        self._timings_for = None

    def line(self, text: str) -> Events:
        """One that begins with "slot"."""
        match = SLOT.match(text)
        if match is None:
            return self._old_line(text)
        number, task = int(match[1]), int(match[2])
        if number >= MAX_SLOTS or task < 0:
            return ()
        return self._message(number, task, match[3], from_timings=text.startswith("print_timing", 5))

    def fields(self, message: str, fields: Mapping[str, object]) -> Events:
        """A line of the builds, and of ik_llama.cpp, that log a message and fields."""
        number, task = whole(fields, "id_slot", "slot_id"), whole(fields, "id_task", "task_id")
        if number is None or task is None or number >= MAX_SLOTS:
            return ()
        if message == "slot is processing task":
            return self._launched(number, task)
        if message == "slot released":
            return self._released(number, task, truncated=fields.get("truncated") in (True, "true"))
        if message.startswith("kv cache rm [p0, end)"):
            return self._prompt(number, task, whole(fields, "p0"))
        if match := _TIMING.match(message.lstrip()):
            return self._timing(number, task, match)
        return self._message(number, task, message, from_timings=False)

    def timing_line(self, text: str) -> Events:
        """A line of timings without a slot: of the one whose heading came before, else of the only one at work."""
        start = text.find(":") + 1 if "print_timings:" in text[:21] else 0
        match = _TIMING.match(text[start:].lstrip())
        number = self._timings_for
        if match is None:
            return ()
        if number is None and start:
            busy = [number for number, slot in self._slots.items() if slot.busy]
            if len(busy) == 1:
                number = busy[0]
            elif not self._slots or _NO_SLOT in self._slots:  # a program that has none
                number = _NO_SLOT
                self._at(number, _NO_SLOT).busy = False
        if number is None or number not in self._slots:
            return ()
        return self._timing(number, self._slots[number].task, match)

    def _message(self, number: int, task: int, message: str, *, from_timings: bool) -> Events:
        if message.startswith(_PROMPT_DONE):  # the commonest by far: verbose builds tell each token
            return self._generating(number, task)
        if message.startswith("processing task"):
            return self._launched(number, task)
        if message.startswith("stop processing"):
            return self._released(number, task, truncated=message.endswith("truncated = 1"))
        if from_timings:
            if not message.strip():
                self._at(number, task)
                self._timings_for = number
                return ()
            if match := _TIMING.match(message.lstrip()):
                return self._timing(number, task, match)
            if match := _DECODED.match(message):
                self._at(number, task).generating = True
                return (SlotGenerating(number, task, int(match[1]), _rate(match[2])),)
        if match := _PROGRESS.match(message):
            fraction = _FRACTION.search(message, match.end())
            return self._prompt(number, task, match[1], match[2], _rate(fraction[1]) if fraction else None)
        if match := _NEW_PROMPT.match(message):
            return self._prompt(number, task, None, match[1])
        if match := _CACHED.match(message):
            return self._prompt(number, task, match[1])
        if message.startswith(_TRUNCATED):
            return self._truncated(number, task)
        return ()

    def _old_line(self, text: str) -> Events:
        match = _OLD_SLOT.match(text)
        if match is None or int(match[1]) >= MAX_SLOTS:
            return ()
        number, message = int(match[1]), match[2]
        if started := _OLD_PROCESSING.match(message):
            return self._launched(number, int(started[1]))
        slot = self._slots.get(number)
        if slot is None:
            return ()
        if prompt := _OLD_PROMPT.match(message):
            cached = int(prompt[1])
            return self._prompt(number, slot.task, cached, cached + int(prompt[2]))
        if message.startswith("released"):
            return self._released(number, slot.task, truncated=False)
        return self._truncated(number, slot.task) if message.startswith(_TRUNCATED) else ()

    # --- one slot's life -------------------------------------------------------------------------------------------

    def _at(self, number: int, task: int) -> _Slot:
        """The slot's state with this task, which is a new one where the log begins in the middle."""
        slot = self._slots.get(number)
        if slot is None or slot.task != task:
            self._slots[number] = slot = _Slot(task)
        return slot

    def _launched(self, number: int, task: int) -> Events:
        self._slots[number] = _Slot(task)
        return (SlotPrompt(number, task),)

    def _prompt(
        self,
        number: int,
        task: int,
        done: str | int | None,
        total: str | int | None = None,
        fraction: float | None = None,
    ) -> Events:
        slot = self._at(number, task)
        if slot.generating or not slot.busy:
            return ()
        before = (slot.done, slot.total, slot.fraction)
        slot.total = int(total) if total is not None else slot.total
        slot.done = max(slot.done, int(done or 0))
        if fraction is None and slot.total:
            fraction = slot.done / slot.total
        if fraction is not None:
            slot.fraction = max(slot.fraction or 0.0, min(round(fraction, 4), 1.0))
        if before == (slot.done, slot.total, slot.fraction):
            return ()
        return (SlotPrompt(number, task, slot.done, slot.total, slot.fraction),)

    def _generating(self, number: int, task: int) -> Events:
        slot = self._at(number, task)
        if slot.generating or not slot.busy:
            return ()
        slot.generating = True
        return (SlotGenerating(number, task),)

    def _truncated(self, number: int, task: int) -> Events:
        slot = self._at(number, task)
        if slot.truncated:
            return ()
        slot.truncated = True
        return (Truncated(number, task),)

    def _released(self, number: int, task: int, *, truncated: bool) -> Events:
        slot = self._at(number, task)
        events = self._timings(number, slot)
        if truncated:
            events += self._truncated(number, task)
        slot.busy = False
        return (*events, SlotReleased(number, task))

    def _timing(self, number: int, task: int, match: re.Match[str]) -> Events:
        slot = self._at(number, task)
        what, tokens, rate = match.groups()
        figures = (int(tokens) if tokens else None, _rate(rate))
        if what == "prompt eval":
            slot.prompt = figures
        elif what != "total":
            slot.output = figures
        else:
            self._timings_for = None
            return self._timings(number, slot)
        return ()

    def _timings(self, number: int, slot: _Slot) -> Events:
        if slot.prompt is None and slot.output is None:
            return ()
        told = SlotTimings(number, slot.task, *(slot.prompt or (None, None)), *(slot.output or (None, None)))
        slot.prompt = slot.output = None
        return (told,)


def whole(fields: Mapping[str, object], *names: str) -> int | None:
    """The first of the fields that is there, if it is a whole number or the text of one."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15:
            return value
    return None


def _rate(text: str | None) -> float | None:
    return float(text) if text and text[0].isdigit() else None
