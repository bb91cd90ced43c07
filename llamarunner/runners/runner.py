"""One model's engine, from its start to its end: the only place that changes a runner's state.

    stopped → starting → loading → ready → draining → stopping → stopped, and failed from starting, loading, ready

Nothing here decides what to load or when; the manager does, and counts the leases.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import Protocol

import aiohttp

from llamarunner.catalog.catalog import Model
from llamarunner.engines import remote
from llamarunner.engines.engine import Engine, LaunchPlan
from llamarunner.engines.log_events import Activity
from llamarunner.errors import EngineError, EngineGoneError, EngineMissingError, LoadError, ModelFileError
from llamarunner.events import EventBus, RunnerChanged, RunnerState
from llamarunner.runners.answers import Answers
from llamarunner.runners.crash import CauseKind, classify
from llamarunner.runners.guardian import Guardian
from llamarunner.runners.health import KeyRefusedError, Props, StrangerError, ask_health, read_props, until_lost
from llamarunner.runners.log_view import LogView
from llamarunner.runners.process import EngineProcess
from llamarunner.units import format_duration

logger = logging.getLogger(__name__)

STALLED = "stalled"
STOPPED = "stopped"
UNREACHABLE = "unreachable"
KEY_REFUSED = "key_refused"
"""Causes of a LoadError beside those of `crash.CauseKind`."""

_PORT_TRIES = 3
_POLL_LEAST_S, _POLL_MOST_S = 0.02, 0.25
_POLL_SHARE = 0.05  # of the time a load has taken: so little may pass until it is seen to be over
_PROBE_S = 2.0
_CHECK_S = 10.0  # between looks at a server elsewhere
_TAIL_LINES = 20  # given with an error
_CAUSE_LINES = 200  # looked through for its cause
_OWN_ENV = "LLAMARUNNER_"

_runner_ids = itertools.count(1)

_NEXT = {
    RunnerState.STOPPED: {RunnerState.STARTING},
    RunnerState.STARTING: {RunnerState.LOADING, RunnerState.STOPPING, RunnerState.FAILED},
    RunnerState.LOADING: {RunnerState.READY, RunnerState.STARTING, RunnerState.STOPPING, RunnerState.FAILED},
    RunnerState.READY: {RunnerState.DRAINING, RunnerState.STOPPING, RunnerState.FAILED},
    RunnerState.DRAINING: {RunnerState.STOPPING, RunnerState.FAILED},
    RunnerState.STOPPING: {RunnerState.STOPPED},
    RunnerState.FAILED: set[RunnerState](),
}


class EngineLog(Protocol):
    """Where an engine's output goes."""

    on_line: Callable[[str], None] | None
    """Called with each line that has ended, and with an unfinished row of dots as it grows."""

    def feed(self, block: bytes) -> None: ...

    def tail(self, lines: int) -> tuple[str, ...]:
        """The newest lines, oldest first, without control characters."""
        ...

    def close(self) -> None: ...


class Runner:
    """Starts once and stops once; another load of the model is another runner."""

    def __init__(
        self,
        model: Model,
        engine: Engine,
        *,
        log: EngineLog,
        bus: EventBus,
        guardian: Guardian,
        session: aiohttp.ClientSession,
        name: str = "",
        stop_grace_s: float = 10.0,
        check_s: float = _CHECK_S,
    ) -> None:
        """`name` is what it is called before people, if not as its model."""
        self.runner_id = next(_runner_ids)
        self.model = model
        self.name = name or model.name
        self.state = RunnerState.STOPPED
        self.reason = ""
        self.state_since = time.monotonic()
        self.plan: LaunchPlan | None = None
        self.pid: int | None = None
        self.load_begun: float | None = None
        self.answers = Answers()
        self.spoke_at = 0.0  # its engine last logged anything but our own questions
        self.load_s: float | None = None
        self.context: int | None = None
        self.slots: int | None = None
        self.error: EngineError | None = None
        self.on_ended: Callable[[Runner], None] | None = None
        """Called once when the engine has ended by itself after it was ready, and has been cleaned up behind; or when
        a server elsewhere does not answer any more."""
        self._engine = engine
        self._log = log
        self._log_view = LogView()
        log.on_line = self._log_view.take
        self._bus = bus
        self._guardian = guardian
        self._session = session
        self._stop_grace_s = stop_grace_s
        self._check_s = check_s
        self._process: EngineProcess | None = None
        self._progress_at = 0.0
        self._mark = ""
        self._loading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._over = asyncio.Event()

    @property
    def progress(self) -> float | None:
        """How far the load is by the engine's own word, 0..1; None where it does not say, or does not load."""
        return self._log_view.progress if self.state in (RunnerState.STARTING, RunnerState.LOADING) else None

    @property
    def is_whole_on_gpu(self) -> bool:
        """Whether its engine said that every layer is there."""
        return self._log_view.is_whole_on_gpu

    @property
    def activity(self) -> Activity:
        """What each slot does, by the engine's own word; empty where it does not say, or is not ready."""
        return self._log_view.activity if self.state in (RunnerState.READY, RunnerState.DRAINING) else Activity()

    async def start(self) -> None:
        """From stopped to ready. Raises EngineError, mostly LoadError, when that fails or `stop` comes between; by
        then nothing is left of the process. To be called once; cancelling it stops the runner."""
        if self._stopping is not None:
            raise self._unloaded()
        if self._loading is not None:
            raise RuntimeError("a runner starts once")
        self._loading = asyncio.create_task(self._load(), name=f"load {self.name}")
        try:
            await asyncio.wait({self._loading})
        except asyncio.CancelledError:
            await self.stop("its start was cancelled")
            raise
        if self._loading.cancelled():
            raise self._unloaded() from self.error
        self._loading.result()
        if self._stopping is not None:
            raise self._unloaded()

    def drain(self, reason: str) -> None:
        """Take no new leases; without effect unless it is ready."""
        if self.state is RunnerState.READY:
            self._become(RunnerState.DRAINING, reason)

    async def stop(self, reason: str) -> None:
        """From any state; ends as stopped, or stays failed. Goes on where the caller is cancelled; a second call waits
        for the first."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(reason), name=f"stop {self.name}")
        await asyncio.shield(self._stopping)

    async def wait_ended(self) -> None:
        """Until it is stopped or failed, and nothing is left of its process."""
        await self._over.wait()

    # --- start -----------------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        self.load_begun = begun = time.monotonic()
        self._become(RunnerState.STARTING, "requested")
        try:
            if self.model.problem:
                raise ModelFileError(f"{self.name} cannot run: {self.model.problem}", hint=self.model.hint)
            props = await self._bring_up()
        except asyncio.CancelledError:
            raise  # by `stop`, which cleans up
        except BaseException as error:
            self.error = error if isinstance(error, EngineError) else EngineError(f"{self.name}: {error!r}")
            await self._end_process()
            self._become(RunnerState.FAILED, self.error.message)
            self._finish()
            raise
        self.context, self.slots = props.context, props.slots
        self.load_s = time.monotonic() - begun
        self._become(RunnerState.READY, f"loaded in {format_duration(self.load_s)}")
        watch = self._watch_remote() if self._process is None else self._watch(self._process)
        self._watching = asyncio.create_task(watch, name=f"watch {self.name}")

    async def _bring_up(self) -> Props:
        for attempt in itertools.count(1):
            try:
                return await self._try_port(attempt)
            except LoadError as error:
                if error.cause != CauseKind.PORT_TAKEN or attempt == _PORT_TRIES:
                    raise
                logger.info("%s: port %d was taken, trying another", self.name, self.plan.port if self.plan else 0)
            await self._end_process()
            if self.state is RunnerState.LOADING:
                self._become(RunnerState.STARTING, "its port was taken; trying another")
        raise AssertionError("unreachable")

    async def _try_port(self, attempt: int) -> Props:
        plan = self._engine.plan(self.model, port=_free_port(), api_key=secrets.token_urlsafe(32))
        self.plan = plan
        self._mark = f"--- starting {self.name}: runner {self.runner_id}, attempt {attempt} ---"
        self._note(self._mark)
        self._log_view.begin()
        self._progress_at = time.monotonic()
        if plan.url:
            return await self._reach(plan)
        try:
            process = await EngineProcess.spawn(
                plan.argv,
                _environment(plan),
                on_output=self._on_output,
                guardian=self._guardian,
                name=self.name,
            )
        except OSError as error:
            raise EngineMissingError(
                f"{plan.argv[0]} cannot be run: {error.strerror}", hint="see the engine's `command`"
            ) from error
        self._process, self.pid = process, process.pid
        polling = asyncio.create_task(self._poll(plan, process), name=f"health {self.name}")
        ended = asyncio.create_task(_ended(process), name=f"end {self.name}")
        try:
            await asyncio.wait({polling, ended}, return_when=asyncio.FIRST_COMPLETED)
            if process.returncode is not None:
                raise self._load_error(process.returncode)
            return polling.result()
        except StrangerError:
            message = f"{self.name} could not be loaded: another program answered on its port {plan.port}"
            raise LoadError(message, cause=CauseKind.PORT_TAKEN, log_tail=self._tail(_TAIL_LINES)) from None
        except KeyRefusedError:
            key = "does not accept the key it was given" if plan.api_key else "wants a key, and was given none"
            message = f"{self.name} could not be loaded: its engine {key}"
            hint = "see the api_key of its engine, and ${api_key} in the engine's env"
            raise LoadError(message, hint=hint, cause=KEY_REFUSED, log_tail=self._tail(_TAIL_LINES)) from None
        finally:
            polling.cancel()
            ended.cancel()
            await asyncio.gather(polling, ended, return_exceptions=True)

    async def _reach(self, plan: LaunchPlan) -> Props:
        """A server elsewhere is there or it is not: nothing is gained by waiting for it."""
        self._become(RunnerState.LOADING, f"asking {plan.url}")
        try:
            await remote.ask_models(self._session, plan.base_url, plan.headers, min(remote.ASK_S, plan.load_timeout_s))
        except remote.UnreachableError as error:
            self._note(error.message)
            raise LoadError(
                f"{self.name} could not be loaded: {error.message}", hint=error.hint, cause=UNREACHABLE
            ) from None
        return Props()

    async def _poll(self, plan: LaunchPlan, process: EngineProcess) -> Props:
        """Until it is ready. Raises StrangerError, and LoadError where there is no progress for too long."""
        begun, last = time.monotonic(), None
        while (left := self._progress_at + plan.load_timeout_s - time.monotonic()) > 0:
            answer = await ask_health(self._session, plan, process, min(_PROBE_S, left))
            if answer != last:
                self._progress_at, last = time.monotonic(), answer
            if answer is not None and self.state is RunnerState.STARTING:
                self._become(RunnerState.LOADING, "the engine is reading the model")
            if answer is not None and 200 <= answer < 300:
                return await read_props(self._session, plan, process)
            elapsed = time.monotonic() - begun
            await asyncio.sleep(min(max(_POLL_SHARE * elapsed, _POLL_LEAST_S), _POLL_MOST_S))
        tail = self._tail(_TAIL_LINES)
        raise LoadError(
            f"{self.name} could not be loaded: no progress for {format_duration(plan.load_timeout_s)}",
            hint="the log has its last lines; a slow disk may need a longer load_timeout",
            cause=STALLED,
            log_tail=tail,
        )

    def _load_error(self, exit_code: int) -> LoadError:
        cause = classify(exit_code, self._tail(_CAUSE_LINES))
        return LoadError(
            f"{self.name} could not be loaded: {cause.summary}",
            hint=cause.hint,
            cause=cause.kind,
            exit_code=exit_code,
            log_tail=self._tail(_TAIL_LINES),
        )

    def _unloaded(self) -> LoadError:
        return LoadError(f"{self.name} was unloaded while loading", cause=STOPPED)

    # --- output ----------------------------------------------------------------------------------------------------

    def _on_output(self, block: bytes) -> None:
        # some builds log each of our own questions, which is no progress
        path = self.plan.health_path if self.plan else "/health"
        own = (path if path != "/" else "GET / ").encode()
        if any(line.strip() and own not in line and b"GET /slots" not in line for line in block.split(b"\n")):
            self._progress_at = self.spoke_at = time.monotonic()
        self._log.feed(block)

    def _note(self, line: str) -> None:
        self._log.feed(f"{line}\n".encode())

    def _tail(self, lines: int) -> tuple[str, ...]:
        """Of this attempt alone: the log may hold what an earlier one died of."""
        tail = self._log.tail(lines)
        for index in range(len(tail) - 1, -1, -1):
            if self._mark in tail[index]:
                return tail[index + 1 :]
        return tail

    # --- end -------------------------------------------------------------------------------------------------------

    async def _watch(self, process: EngineProcess) -> None:
        """While it is ready."""
        code = await process.wait()
        if self.state is not RunnerState.READY and self.state is not RunnerState.DRAINING:
            return  # `stop` ended it
        cause = classify(code, self._tail(_CAUSE_LINES))
        await self._lose(EngineGoneError(f"the engine of {self.name} ended: {cause.summary}", hint=cause.hint))

    async def _watch_remote(self) -> None:
        """Likewise, of a server elsewhere. What it still answers is not cut: those connections are its clients' own."""
        assert self.plan is not None  # it is ready by it
        error = await until_lost(self._session, self.plan, self._check_s, self._note)
        await self._lose(EngineGoneError(f"the server of {self.name} is lost: {error.message}", hint=error.hint))

    async def _lose(self, error: EngineGoneError) -> None:
        self.error = error
        logger.warning("%s", self.error)
        self._become(RunnerState.FAILED, self.error.message)
        await self._end_process()
        self._finish()
        if self.on_ended is not None:
            self.on_ended(self)

    async def _stop(self, reason: str) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait({self._loading})
        if self.state not in (RunnerState.STOPPED, RunnerState.FAILED):
            self._become(RunnerState.STOPPING, reason)
        await self._end_process()
        if self._watching is not None:
            if self.plan is not None and self.plan.url:  # nothing ends there that it could notice
                self._watching.cancel()
            await asyncio.wait({self._watching})
        if self.state is RunnerState.STOPPING:
            self._become(RunnerState.STOPPED, reason)
        self._finish()

    async def _end_process(self) -> None:
        if self._process is not None:
            await self._process.stop(0.0 if self._process.returncode is not None else self._stop_grace_s)
        self._process = self.pid = None

    def _finish(self) -> None:
        if not self._over.is_set():
            self._log.close()
            self._over.set()

    def _become(self, new: RunnerState, reason: str) -> None:
        old = self.state
        if new not in _NEXT[old]:
            raise RuntimeError(f"runner {self.runner_id} ({self.name}) cannot go from {old} to {new}")
        self.state, self.reason, self.state_since = new, reason, time.monotonic()
        self._bus.publish(RunnerChanged(self.name, self.runner_id, old, new, reason))


async def _ended(process: EngineProcess) -> Props:
    await process.wait()
    return Props()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(plan: LaunchPlan) -> dict[str, str]:
    """Ours without our own settings, which hold keys, and the plan's over it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OWN_ENV)}
    return inherited | dict(plan.env)
