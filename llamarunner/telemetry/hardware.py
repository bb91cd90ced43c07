"""The machine's figures: CPU, RAM, GPUs, and what each engine takes of them.

One thread of its own asks, once a second, and publishes one immutable sample; whoever reads it never waits. A GPU
driver that hangs stops that thread and nothing else: the reader sees the sample grow old.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from llamarunner.telemetry.gpus import GpuReader, GpuSample
from llamarunner.units import format_size

logger = logging.getLogger(__name__)

_TREE_S = 5.0  # how often children of engines are looked for: that reads the whole process table
_STOP_S = 2.0
_STALE_AFTER = 3  # intervals without a new sample


@dataclass(frozen=True, slots=True)
class HostSample:
    cpu: float | None = None  # 0..1 over all cores
    cores: int = 0
    load_1m: float | None = None
    memory_used_bytes: int = 0  # what cannot be had: total - available
    memory_total_bytes: int = 0
    own_memory_bytes: int = 0  # of this program, without engines


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """An engine and its children. Pages they share, such as a mapped model file, count for each of them."""

    memory_bytes: int
    gpu_bytes: int | None = None  # over all GPUs; None where the driver names no process of it
    private_bytes: int = 0  # of `memory_bytes`, what is no mapped file: a mapped model counts as free memory
    by_gpu: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HardwareSample:
    taken: float  # time.monotonic()
    host: HostSample = field(default_factory=HostSample)
    gpus: tuple[GpuSample, ...] = ()
    gpu_note: str = ""  # why there are no GPUs
    processes: Mapping[int, ProcessSample] = field(default_factory=dict)  # by the engine's pid
    stale: bool = False  # nothing was measured for a while; these are the last figures


class HardwareReader:
    """Measures when asked, and blocks meanwhile. Belongs to one thread; for a single look use it with `closing`."""

    def __init__(self, *, retry_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._gpus = GpuReader(retry_s=retry_s, clock=clock)
        self._own = psutil.Process()
        self._cores = psutil.cpu_count() or 1
        self._cpu_asked = False
        self._pids: frozenset[int] = frozenset()
        self._tree: dict[psutil.Process, int] = {}  # each process of an engine -> the engine's pid
        self._tree_at = -_TREE_S

    def read(self, pids: Iterable[int] = ()) -> HardwareSample:
        taken = self._clock()
        gpus, note = self._gpus.read()
        return HardwareSample(taken, self.read_host(), gpus, note, self._processes(frozenset(pids), gpus))

    def read_host(self) -> HostSample:
        cpu = psutil.cpu_percent(None) / 100
        first, self._cpu_asked = not self._cpu_asked, True  # there is no load before the second look
        memory = psutil.virtual_memory()
        return HostSample(
            cpu=None if first else cpu,
            cores=self._cores,
            load_1m=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            own_memory_bytes=self._own.memory_info().rss,
        )

    def close(self) -> None:
        self._gpus.close()

    def _processes(self, pids: frozenset[int], gpus: tuple[GpuSample, ...]) -> dict[int, ProcessSample]:
        if pids != self._pids or self._clock() - self._tree_at >= _TREE_S:
            self._pids, self._tree_at = pids, self._clock()
            self._tree = _find_tree(self._own, pids) if pids else {}
        samples: dict[int, ProcessSample] = {}
        for process, engine in self._tree.items():
            try:
                memory = process.memory_info()
            except psutil.Error:
                continue  # it has ended
            on_gpus = {gpu.index: gpu.processes[process.pid] for gpu in gpus if process.pid in gpu.processes}
            samples[engine] = _plus(samples.get(engine, ProcessSample(0)), memory, on_gpus)
        return samples


class HardwareSampler:
    """`pids` gives the engines' process ids; it is called in the sampler's thread, so it must hand out a finished
    tuple or set, not a view of something that changes."""

    def __init__(
        self, pids: Callable[[], Iterable[int]], interval_s: float = 1.0, *, gpu_retry_s: float = 60.0
    ) -> None:
        self._pids = pids
        self._interval_s = interval_s
        self._gpu_retry_s = gpu_retry_s
        self._sample = HardwareSample(time.monotonic())
        self._changes = 0
        self._stopping = threading.Event()
        self._hurried = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is not None:
            return
        self._stopping = threading.Event()
        self._sample = replace(self._sample, taken=time.monotonic())
        # a daemon: a driver that never answers must not keep the program from ending
        self._thread = threading.Thread(target=self._run, args=(self._stopping,), name="hardware", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Waits two seconds at most; a thread that hangs in the driver is left behind and publishes no more."""
        thread, self._thread = self._thread, None
        self._stopping.set()
        self._hurried.set()
        if thread is not None:
            thread.join(_STOP_S)

    def hurry(self) -> None:
        """Measure now rather than when it is time; the figures are in `latest` a moment later."""
        self._hurried.set()

    @property
    def latest(self) -> HardwareSample:
        sample = self._sample
        if not self._is_old(sample):
            return sample
        return replace(sample, stale=True, gpus=tuple(replace(gpu, stale=True) for gpu in sample.gpus))

    @property
    def version(self) -> int:
        """Rises when `latest` would look different on a screen, becoming stale included."""
        return 2 * self._changes + self._is_old(self._sample)

    def _is_old(self, sample: HardwareSample) -> bool:
        return time.monotonic() - sample.taken > _STALE_AFTER * self._interval_s

    def _run(self, stopping: threading.Event) -> None:
        reader = HardwareReader(retry_s=self._gpu_retry_s)
        first = HardwareSample(time.monotonic(), reader.read_host(), gpu_note="the GPU driver has not answered yet")
        self._publish(first, stopping)
        failure = ""
        while not stopping.is_set():
            started = time.monotonic()
            try:
                self._publish(reader.read(self._pids()), stopping)
                failure = ""
            except Exception as error:
                if repr(error) != failure:  # once, not every second
                    logger.exception("the hardware could not be measured")
                failure = repr(error)
            self._hurried.wait(max(0.0, started + self._interval_s - time.monotonic()))
            self._hurried.clear()
        reader.close()

    def _publish(self, sample: HardwareSample, stopping: threading.Event) -> None:
        if stopping.is_set():
            return
        if self._is_old(self._sample) or _shown(sample) != _shown(self._sample):
            self._changes += 1
        self._sample = sample


def _plus(so_far: ProcessSample, memory: Any, on_gpus: Mapping[int, int]) -> ProcessSample:
    """An engine's figures with one more process of it."""
    gpu_bytes = (so_far.gpu_bytes or 0) + sum(on_gpus.values()) if on_gpus else so_far.gpu_bytes
    private = memory.rss - getattr(memory, "shared", 0)  # only Linux says
    by_gpu = {index: so_far.by_gpu.get(index, 0) + on_gpus.get(index, 0) for index in {*so_far.by_gpu, *on_gpus}}
    return ProcessSample(so_far.memory_bytes + memory.rss, gpu_bytes, so_far.private_bytes + private, by_gpu)


def _find_tree(own: psutil.Process, pids: frozenset[int]) -> dict[psutil.Process, int]:
    """Engines are our children, so one walk from ourselves finds the processes of all of them."""
    found: dict[psutil.Process, int] = {}
    engine_of: dict[int, int] = {}
    for process in own.children(recursive=True):  # parents come before their children
        try:
            engine = process.pid if process.pid in pids else engine_of.get(process.ppid())
        except psutil.Error:
            continue
        if engine is not None:
            engine_of[process.pid] = engine
            found[process] = engine
    return found


def _shown(sample: HardwareSample) -> tuple[object, ...]:
    """The sample as coarse as a screen shows it."""
    host = sample.host
    return (
        sample.gpu_note,
        _percent(host.cpu),
        None if host.load_1m is None else round(host.load_1m, 1),
        format_size(host.memory_used_bytes),
        format_size(host.own_memory_bytes),
        tuple(_shown_gpu(gpu) for gpu in sample.gpus),
        tuple((pid, format_size(one.memory_bytes), one.gpu_bytes) for pid, one in sample.processes.items()),
    )


def _shown_gpu(gpu: GpuSample) -> tuple[object, ...]:
    watts = None if gpu.power_w is None else round(gpu.power_w)
    used = None if gpu.used_bytes is None else format_size(gpu.used_bytes)
    return gpu.index, gpu.name, used, gpu.total_bytes, _percent(gpu.utilization), gpu.temperature_c, watts, gpu.problem


def _percent(share: float | None) -> int | None:
    return None if share is None else round(share * 100)
