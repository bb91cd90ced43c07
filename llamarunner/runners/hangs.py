"""Looks after one ready runner with a `Watch`, and says when its engine hangs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

import aiohttp

from llamarunner.errors import EngineGoneError
from llamarunner.events import RunnerState
from llamarunner.runners.health import ask_slots
from llamarunner.runners.place import Place
from llamarunner.runners.runner import Runner
from llamarunner.runners.watchdog import Signs, Watch
from llamarunner.units import format_duration

logger = logging.getLogger(__name__)

_ANSWERING = (RunnerState.READY, RunnerState.DRAINING)


async def watch_for_hang(
    place: Place,
    runner: Runner,
    session: aiohttp.ClientSession,
    on_hung: Callable[[Place, Runner, EngineGoneError], None],
) -> None:
    """Until the runner is ready no more. Keeps `place.hung_s`; calls `on_hung` each time that a hang begins."""
    timeout_s, plan = place.model.settings.hang_timeout, runner.plan
    if not timeout_s or plan is None:
        return
    watch = Watch(timeout_s, has_slots=plan.is_llama_cpp)
    try:
        while runner.state in _ANSWERING:
            watch.see(_signs(place, runner))
            if watch.wants_slots:
                look = await ask_slots(session, plan)
                watch.see(_signs(place, runner))  # what came meanwhile counts
                watch.hear(look)
            before, place.hung_s = place.hung_s, watch.hung_s
            if before is None and place.hung_s is not None:
                error = EngineGoneError(
                    f"the engine of {place.model.name} hangs: no sign of life for {format_duration(timeout_s)}",
                    hint="the log has its last lines; a slow machine may need a longer hang_timeout",
                )
                logger.warning("%s", error.message)
                on_hung(place, runner, error)
            elif before is not None and place.hung_s is None:
                logger.info("the engine of %s hangs no longer", place.model.name)
            with suppress(TimeoutError):
                await asyncio.wait_for(runner.wait_ended(), watch.look_s)
    finally:
        place.hung_s = None


def _signs(place: Place, runner: Runner) -> Signs:
    answers = runner.answers
    return Signs(
        at=time.monotonic(),
        owes=answers.owed > 0 or place.leases > len(answers),  # the others wait for their answer to begin
        all_streamed=place.unstreamed == 0,
        received=answers.received,
        spoke_at=runner.spoke_at,
    )
