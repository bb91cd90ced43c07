"""One engine process and everything it starts: spawned so that it cannot outlive us, its output pumped in blocks, and
ended as a whole tree. Knows nothing of models or HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence

import psutil

from llamarunner.runners.guardian import Guardian
from llamarunner.runners.launch import find_setpriv, launch

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 64 * 1024
_LAST_BLOCKS = 64  # read at most so many after the end: a grandchild may go on writing for ever
_POLL_S = 0.05
_KILL_S = 10.0  # SIGKILL cannot be refused, but a driver can keep a process from ending
_CLEAN_LOOKS = 2  # in a row: one look at all processes can miss a fork that happens meanwhile
TAG = "LLAMARUNNER_ENGINE"  # in the environment of the process, and so of whatever it starts
_HAS_PROC = os.path.exists("/proc/self/environ")


class EngineProcess:
    """Use `spawn`. An owner task sees the process to its end and cleans up behind it, whether `stop` was asked for or
    it ended by itself."""

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        pipe: int,
        tag: str,
        on_output: Callable[[bytes], None],
        guardian: Guardian,
    ) -> None:
        self.pid = popen.pid
        self.returncode: int | None = None  # negative for a signal
        self._popen = popen
        self._pipe = pipe
        self._tag = tag
        self._on_output = on_output
        self._guardian = guardian
        self._grace_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._stopping = False
        self._wake = asyncio.Event()  # it ended, or shall end
        os.set_blocking(pipe, False)
        self._loop.add_reader(pipe, self._pump)
        self._watch_end()
        self._owner = asyncio.create_task(self._own(), name=f"engine process {self.pid}")

    @classmethod
    async def spawn(
        cls,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        on_output: Callable[[bytes], None],
        guardian: Guardian,
        name: str = "",
    ) -> EngineProcess:
        """Start `argv` with exactly `env`; `on_output` is called on the loop with each block of stdout and stderr;
        `name` is for those who read of it.

        Raises OSError where the program cannot be run. Must be called in the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            # the parent-death signal comes when the thread that spawned the child ends
            raise RuntimeError("an engine must be spawned from the main thread")
        await asyncio.to_thread(find_setpriv)  # which runs something, the first time
        tag = secrets.token_hex(16)
        read_end, write_end = os.pipe()
        try:
            popen = launch(argv, {**env, TAG: tag}, write_end)
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        guardian.add(popen.pid, tag, name)
        return cls(popen, read_end, tag, on_output, guardian)

    async def wait(self) -> int:
        """Until the process itself has ended; all that it wrote has been given to `on_output` by then."""
        return await asyncio.shield(self._ended)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, after `grace_s` SIGKILL, to the process and whatever it started; returns when all are gone.

        Goes on to its end where the caller is cancelled. A second call waits for the first.
        """
        if not self._stopping:
            self._stopping, self._grace_s = True, grace_s
            self._wake.set()
        await asyncio.shield(self._owner)

    def family_pids(self) -> list[int]:
        """Of the process and all that it started. Reads all of /proc: call it in a thread."""
        return [self.pid, *(member.pid for member in self._family())]

    # --- output ----------------------------------------------------------------------------------------------------

    def _pump(self) -> bool:
        """Read one block; false when there is none."""
        try:
            block = os.read(self._pipe, _BLOCK_BYTES)
        except BlockingIOError:
            return False
        if not block:
            self._close_pipe()
            return False
        try:
            self._on_output(block)
        except Exception:
            # the pipe must be drained all the same, or the engine would hang writing to it
            logger.exception("an engine's output could not be handled; dropping the rest of it")
            self._on_output = _drop
        return True

    def _close_pipe(self) -> None:
        if self._pipe >= 0:
            self._loop.remove_reader(self._pipe)
            os.close(self._pipe)
            self._pipe = -1

    # --- the end ---------------------------------------------------------------------------------------------------

    def _watch_end(self) -> None:
        try:
            handle = os.pidfd_open(self.pid)
        except (AttributeError, OSError):  # no Linux, or none that has it
            threading.Thread(target=self._wait_in_thread, name=f"wait {self.pid}", daemon=True).start()
            return

        def on_end() -> None:
            self._loop.remove_reader(handle)
            os.close(handle)
            self._note_end()

        self._loop.add_reader(handle, on_end)

    def _wait_in_thread(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._note_end)

    def _note_end(self) -> None:
        # WNOWAIT: until it is reaped its number stays its own, so that signals to its group cannot hit a stranger
        result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert result is not None  # without WNOHANG there always is one
        for _ in range(_LAST_BLOCKS):
            if self._pipe < 0 or not self._pump():
                break
        self.returncode = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        self._ended.set_result(self.returncode)
        self._wake.set()

    async def _own(self) -> None:
        family: set[psutil.Process] = set()
        try:
            await self._wake.wait()
            asked = self._stopping and self._grace_s > 0
            deadline = self._loop.time() + self._grace_s
            if asked:
                self._signal_group(signal.SIGTERM)  # it ends while we look for what else there is
            family = await asyncio.to_thread(self._family)
            if asked:
                await self._terminate(family, deadline)
        finally:
            # also when the loop is being torn down and this task is cancelled
            self._signal_group(signal.SIGKILL)
            await self._clean_up(family)

    async def _terminate(self, family: set[psutil.Process], deadline: float) -> None:
        for member in family:
            if not self._is_in_group(member):  # llama-server takes a second one for impatience
                _signal_process(member, signal.SIGTERM)
        await asyncio.wait({self._ended}, timeout=max(deadline - self._loop.time(), 0.0))
        # a wrapper may end before the engine that it started
        while self._loop.time() < deadline:
            if not await asyncio.to_thread(_living, family):
                break
            await asyncio.sleep(_POLL_S)

    async def _clean_up(self, family: set[psutil.Process]) -> None:
        """After SIGKILL to the group: whoever left the group, the zombie, the pipe."""
        deadline, clean = self._loop.time() + _KILL_S, 0
        while clean < _CLEAN_LOOKS and self._loop.time() < deadline:
            # one that is ending loses its environment before its files and devices: those once seen are followed
            family = await asyncio.to_thread(lambda known: _living(known | self._family()), family)
            for member in family:
                _signal_process(member, signal.SIGKILL)
            if family:
                await asyncio.sleep(_POLL_S)
            clean = 0 if family else clean + 1
        done, _ = await asyncio.wait({self._ended}, timeout=max(deadline - self._loop.time(), _POLL_S))
        self._close_pipe()
        if done and clean:
            self._popen.wait()  # reaps at once
            self._guardian.remove(self.pid)
        else:
            logger.error("engine process %d or what it started does not end after SIGKILL", self.pid)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _is_in_group(self, member: psutil.Process) -> bool:
        try:
            return os.getpgid(member.pid) == self.pid
        except ProcessLookupError:
            return True

    def _family(self) -> set[psutil.Process]:
        """Live processes that ours started, however they detached themselves: the tag in their environment stays."""
        family = set()
        for pid in psutil.pids():
            if pid != self.pid and environment_has(pid, self._tag):
                with contextlib.suppress(psutil.Error):  # it ended meanwhile
                    family.add(psutil.Process(pid))
        return family


def environment_has(pid: int, tag: str) -> bool:
    """False also for those that ended, zombies, and other users' processes."""
    try:
        if _HAS_PROC:
            # as psutil does, at a fifth of the price: there may be thousands of processes to look at
            with open(f"/proc/{pid}/environ", "rb") as file:
                return tag.encode() in file.read()
        return psutil.Process(pid).environ().get(TAG) == tag
    except (psutil.Error, OSError):
        return False


def _living(processes: set[psutil.Process]) -> set[psutil.Process]:
    """Those that are neither gone nor zombies."""
    living = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                living.add(process)
    return living


def _signal_process(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def _drop(block: bytes) -> None:
    """Takes output that nobody can use any more."""
