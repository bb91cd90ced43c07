"""Starting a program that ends when we do, without holding up the event loop for long.

A child may be told to die with its parent only by itself, between fork and exec. To run Python there takes a real fork,
whose copying of page tables and wake-up cost the loop 5 to 30 ms; `setpriv` of util-linux does the same in a process of
its own, which then becomes the program, and can be started with vfork in less than one. It is used where nothing speaks
against it: what cannot be run is to be told as the system tells it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence

_PR_SET_PDEATHSIG = 1
# looked up here: between fork and exec nothing may be imported or allocated that another thread could hold a lock of
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_TRIAL_S = 2.0
_ELF = b"\x7fELF"
_ELF_BYTES = 20  # of the header: what kind of machine it is for
_ELF_KIND = (slice(4, 6), slice(18, 20))  # word size and byte order; machine
_SCRIPT_BYTES = 256


def launch(argv: Sequence[str], env: Mapping[str, str], output: int) -> subprocess.Popen[bytes]:
    """Start `argv` in a session of its own with exactly `env`, everything it writes going to `output`. It gets SIGKILL
    when the thread that calls this ends, where the system can do that. Raises OSError where it cannot be run."""
    setpriv = find_setpriv()
    if setpriv and not any(name.startswith("LD_") for name in env) and is_runnable(argv[0]):
        popen = subprocess.Popen(
            [setpriv, "--pdeathsig", "KILL", "--", *argv],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended already
            resource.prlimit(popen.pid, resource.RLIMIT_CORE, (0, 0))  # a core dump would hold prompts
        return popen
    with warnings.catch_warnings():
        # newer Pythons warn of any preexec_fn in a program with threads; ours does nothing that could wait for one
        warnings.simplefilter("ignore", DeprecationWarning)
        return subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_dies_with(os.getpid()),
        )


@functools.cache
def find_setpriv() -> str:
    """The path of one that knows parent-death signals; "" where there is none. Runs it once, for some milliseconds."""
    found = shutil.which("setpriv") if sys.platform == "linux" else None
    if found is None:
        return ""
    trial = [found, "--pdeathsig", "KILL", "--", found, "--version"]
    try:
        done = subprocess.run(
            trial, stdin=subprocess.DEVNULL, capture_output=True, env={}, timeout=_TRIAL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found if done.returncode == 0 else ""


def is_runnable(path: str) -> bool:
    """Whether the system would surely run it: a program for this kind of machine, or a script of one."""
    try:
        if not os.path.isabs(path) or not os.access(path, os.X_OK):
            return False
        with open(path, "rb") as file:
            head = file.read(_SCRIPT_BYTES)
        if head.startswith(b"#!"):
            interpreter = os.fsdecode(head[2:].split(b"\n")[0].split()[0])
            return not interpreter.endswith(os.path.basename(path)) and is_runnable(interpreter)
        return len(head) >= _ELF_BYTES and head.startswith(_ELF) and _kind(head) == _own_kind()
    except (OSError, IndexError, RecursionError):
        return False


@functools.cache
def _own_kind() -> tuple[bytes, ...]:
    with open("/proc/self/exe", "rb") as file:
        return _kind(file.read(_ELF_BYTES))


def _kind(header: bytes) -> tuple[bytes, ...]:
    return tuple(header[part] for part in _ELF_KIND)


def _dies_with(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if _prctl is not None:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it ended before the signal was set
                os._exit(127)

    return prepare
