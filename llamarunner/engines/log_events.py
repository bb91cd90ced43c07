"""What an engine's log tells, as plain events, and the view of its slots that they add up to. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

MAX_SLOTS = 256  # llama.cpp has no more sequences; a higher number is not believed


@dataclass(frozen=True, slots=True)
class LoadStarted:
    """A load begins, or begins anew: what was told of buffers, layers and slots was of a trial or an earlier load."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    fraction: float  # 0..1 of the weights, never less than before within a load
    stage: str  # "fit_params", "text_model", "spec_model", "mmproj_model", "context", "warmup" or a newer word


@dataclass(frozen=True, slots=True)
class Loaded:
    """Once for each load."""


@dataclass(frozen=True, slots=True)
class BufferSize:
    """A later event of the same (component, device, kind) replaces an earlier one."""

    component: str  # the function that told it; a second model or context in the process has "#2" behind it
    device: str  # the buffer's type as printed: "CUDA0", "CPU_Mapped", "ROCm_Host"
    kind: str  # "model", "KV", "compute", "output" or "RS" (recurrent state)
    bytes: int

    @property
    def gpu(self) -> str:
        """The device that holds it, "" where that is the system's memory."""
        name = re.sub(r"_(?:Mapped|REPACK|Private|Split)$", "", self.device)
        in_ram = name.endswith("_Host") or name.startswith(("CPU_", "CPU-")) or name in ("CPU", "BLAS", "AMX")
        return "" if in_ram else name


@dataclass(frozen=True, slots=True)
class OffloadedLayers:
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    free_bytes: int


@dataclass(frozen=True, slots=True)
class ContextInfo:
    n_ctx_slot: int
    n_slots: int


@dataclass(frozen=True, slots=True)
class SlotPrompt:
    """A slot works on a prompt. Within a task neither figure ever goes back; which of them a build tells differs."""

    slot: int
    task: int
    done_tokens: int = 0
    total_tokens: int | None = None
    fraction: float | None = None


@dataclass(frozen=True, slots=True)
class SlotGenerating:
    slot: int
    task: int
    output_tokens: int | None = None  # so far; builds since 2026 tell it every few seconds
    output_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class SlotTimings:
    slot: int
    task: int
    prompt_tokens: int | None = None  # without those from the cache
    prompt_tokens_per_s: float | None = None
    output_tokens: int | None = None
    output_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class SlotReleased:
    slot: int
    task: int


@dataclass(frozen=True, slots=True)
class Truncated:
    """The context was full: a part of the prompt, of the conversation or of the answer is missing."""

    slot: int
    task: int


@dataclass(frozen=True, slots=True)
class Fatal:
    """The engine says that it ends. One failure may be told by several lines: the first is nearest to the cause."""

    text: str


LogEvent = (
    LoadStarted
    | LoadProgress
    | Loaded
    | BufferSize
    | OffloadedLayers
    | Device
    | ContextInfo
    | SlotPrompt
    | SlotGenerating
    | SlotTimings
    | SlotReleased
    | Truncated
    | Fatal
)
Events = tuple[LogEvent, ...]


class SlotPhase(StrEnum):
    IDLE = "idle"
    PROMPT = "prompt"
    GENERATING = "generating"


@dataclass(frozen=True, slots=True)
class SlotActivity:
    slot: int
    task: int | None = None  # the newest, also when idle
    phase: SlotPhase = SlotPhase.IDLE
    fraction: float | None = None  # of the prompt
    done_tokens: int = 0
    total_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_per_s: float | None = None  # now; of the newest answer when idle

    @property
    def label(self) -> str:
        if self.phase is SlotPhase.PROMPT and self.fraction is not None:
            return f"prompt {self.fraction:.0%}".replace("%", " %")
        return self.phase.value


@dataclass(frozen=True, slots=True)
class Activity:
    """What each slot does, by number. `after` makes the next view; one that changes nothing returns this one."""

    slots: tuple[SlotActivity, ...] = ()

    def after(self, event: LogEvent) -> Activity:
        match event:
            case LoadStarted():
                return Activity() if self.slots else self
            case ContextInfo():
                known = {view.slot: view for view in self.slots}
                count = min(event.n_slots, MAX_SLOTS)
                return Activity(tuple(known.get(number) or SlotActivity(number) for number in range(count)))
            case SlotPrompt():
                view = SlotActivity(
                    event.slot,
                    event.task,
                    SlotPhase.PROMPT,
                    event.fraction,
                    event.done_tokens,
                    event.total_tokens,
                )
            case SlotGenerating():
                view = SlotActivity(
                    event.slot,
                    event.task,
                    SlotPhase.GENERATING,
                    output_tokens=event.output_tokens,
                    output_tokens_per_s=event.output_tokens_per_s,
                )
            case SlotReleased() | SlotTimings():
                old = self._of(event.slot)
                if old is None or (old.task is not None and old.task != event.task):
                    return self  # the slot is already at work on another task
                if isinstance(event, SlotReleased):
                    view = SlotActivity(
                        old.slot,
                        event.task,
                        output_tokens=old.output_tokens,
                        output_tokens_per_s=old.output_tokens_per_s,
                    )
                else:
                    view = SlotActivity(
                        old.slot,
                        event.task,
                        SlotPhase.IDLE if old.phase is SlotPhase.IDLE else SlotPhase.GENERATING,
                        output_tokens=event.output_tokens,
                        output_tokens_per_s=event.output_tokens_per_s,
                    )
            case _:
                return self
        return self._with(view)

    def _of(self, number: int) -> SlotActivity | None:
        return next((view for view in self.slots if view.slot == number), None)

    def _with(self, view: SlotActivity) -> Activity:
        if not 0 <= view.slot < MAX_SLOTS or view in self.slots:
            return self
        others = [other for other in self.slots if other.slot != view.slot]
        return Activity(tuple(sorted([*others, view], key=lambda each: each.slot)))
