"""Compiles `fake_nvml.c` and writes what it reads: GPUs for a child process, through the real NVML bindings.

dlopen looks at LD_LIBRARY_PATH as it was when the process started, so only a new process can see the fake library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_nvml.c")
GIB = 1024**3

DRIVER_NOT_LOADED = 9
GPU_IS_LOST = 15
VERSION_MISMATCH = 18
UNKNOWN = 999
UNSUPPORTED = -1


@dataclass(frozen=True, slots=True)
class FakeGpu:
    """A figure of UNSUPPORTED is one the card does not give; a `code` other than 0 answers every question."""

    total: int
    used: int = 0
    name: str = "Fake GPU"
    load: int = 0  # percent
    temperature: int = 40
    milliwatts: int = 50_000
    limit: int = 300_000
    code: int = 0
    # (kind, pid, bytes): kind "c" computes, "g" draws
    processes: tuple[tuple[str, int, int], ...] = ()


def build(directory: Path, *, old_init: bool = False, old_processes: bool = False) -> Path:
    """Compile the library into `directory` and return it."""
    gcc = shutil.which("gcc")
    if gcc is None:
        raise RuntimeError("gcc is needed to build the fake NVML library: install gcc")
    directory.mkdir(parents=True, exist_ok=True)
    macros = [*(["-DOLD_INIT"] if old_init else []), *(["-DOLD_PROCESSES"] if old_processes else [])]
    library = directory / "libnvidia-ml.so.1"
    command = [gcc, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", *macros, "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return directory


def write_state(
    path: Path,
    gpus: Sequence[FakeGpu],
    *,
    init: int = 0,
    hang_ms: int = 0,
    holds: Path | None = None,
    linger_ms: int = 0,
    is_silent: bool = False,
) -> None:
    """Put the machine in this state, at once for whoever reads it. `holds` is the folder in which scripted engines say
    what they hold; `linger_ms` how long after their end a driver takes to have it back."""
    lines = [f"init {init}", f"hang {hang_ms}", f"linger {linger_ms}", f"silent {int(is_silent)}"]
    lines += [f"holds {holds}"] if holds is not None else []
    for index, gpu in enumerate(gpus):
        figures = f"{gpu.total} {gpu.used} {gpu.load} {gpu.temperature} {gpu.milliwatts} {gpu.limit}"
        lines.append(f"gpu {index} {gpu.code} {figures} GPU-{index:08x} {gpu.name}")
        lines += [f"process {index} {kind} {pid} {used}" for kind, pid, used in gpu.processes]
    written = path.with_name(path.name + ".new")
    written.write_text("\n".join(lines) + "\n")
    written.replace(path)


def environment(library: Path, state: Path) -> dict[str, str]:
    """The environment of a child process that is to see the GPUs of `state`."""
    return os.environ | {"LD_LIBRARY_PATH": str(library), "FAKE_NVML_STATE": str(state)}
