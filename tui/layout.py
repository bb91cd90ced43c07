"""Which panes are on the screen at a given size. Their geometry is in `app.tcss`, by the same breakpoints."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    TINY = "tiny"  # a message that more room is needed
    SINGLE = "single"  # one pane at a time
    COMPACT = "compact"  # hardware in a few rows, models, and requests or logs
    FULL = "full"  # all four
    WIDE = "wide"  # all four, requests beside logs


HARDWARE, MODELS, REQUESTS, LOGS = PANES = ("hardware", "models", "requests", "logs")

WIDTHS = [(0, "-w-tiny"), (32, "-w-narrow"), (110, "-w-normal"), (180, "-w-wide")]
HEIGHTS = [(0, "-h-tiny"), (8, "-h-short"), (18, "-h-medium"), (34, "-h-tall")]


def mode_for(width: int, height: int) -> Mode:
    across = sum(width >= least for least, _ in WIDTHS[1:])
    down = sum(height >= least for least, _ in HEIGHTS[1:])
    if not across or not down:
        return Mode.TINY
    if down == 1:
        return Mode.SINGLE
    if across == 1 or down == 2:
        return Mode.COMPACT
    return Mode.WIDE if across == 3 else Mode.FULL


def visible_panes(mode: Mode, active: str, lower: str, zoomed: bool) -> frozenset[str]:
    """`lower` is the one of requests and logs that was used last."""
    match mode:
        case Mode.TINY:
            return frozenset()
        case Mode.SINGLE:
            return frozenset({active})
        case _ if zoomed:
            return frozenset({active})
        case Mode.COMPACT:
            return frozenset({HARDWARE, MODELS, lower})
        case _:
            return frozenset(PANES)
