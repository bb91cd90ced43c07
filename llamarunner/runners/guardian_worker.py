"""The guardian's own process: reads "add PGID TAG" and "del PGID" from stdin, and when that ends, however it ended,
stops every process group still on its list, and whatever else carries one of the tags in its environment.

Run as `python -I -S guardian_worker.py`; it imports as little as it can, for it sits in memory all day.
"""

from __future__ import annotations

import os
import signal
import sys
import time

_GRACE_S = 0.5  # between SIGTERM and SIGKILL; whoever wanted more is dead already
_POLL_S = 0.02


def serve() -> None:
    # a service manager or a terminal signals us together with the program we guard; its end is what we wait for
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    groups: dict[int, str] = {}
    rest = b""
    while block := os.read(0, 65536):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            verb, pgid, *tag = line.decode().split()
            if verb == "add":
                groups[int(pgid)] = tag[0] if tag else ""
            else:
                groups.pop(int(pgid), None)
    if groups:
        _stop(groups)


def _stop(groups: dict[int, str]) -> None:
    _signal(groups, signal.SIGTERM)
    _repeat(groups, 0)
    _repeat(groups, signal.SIGKILL)


def _repeat(groups: dict[int, str], number: int) -> None:
    """Until nobody is left, or the grace is over."""
    deadline = time.monotonic() + _GRACE_S
    while _signal(groups, number) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _signal(groups: dict[int, str], number: int) -> bool:
    """Whether anyone was left to hear it."""
    heard = False
    for pgid in groups:
        heard |= _kill(-pgid, number)
    for pid in _tagged({tag for tag in groups.values() if tag}):
        heard |= _kill(pid, number)
    return heard


def _tagged(tags: set[str]) -> list[int]:
    """Processes with one of the tags in their environment; none where there is no /proc."""
    wanted = [tag.encode() for tag in tags]
    found = []
    for name in os.listdir("/proc") if wanted and os.path.isdir("/proc") else ():
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    environment = file.read()
            except OSError:  # it ended, or is another user's
                continue
            if any(tag in environment for tag in wanted):
                found.append(int(name))
    return found


def _kill(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    serve()
    sys.exit(0)
