"""What is measured, as the scheduler sees it."""

from __future__ import annotations

import asyncio
import os
import threading
import time

from llamarunner.config.schema import SchedulerConfig
from llamarunner.gauge import HardwareGauge, devices_of
from llamarunner.telemetry.gpus import GpuSample
from llamarunner.telemetry.hardware import HardwareSample, HardwareSampler, HostSample, ProcessSample

GIB = 1024**3
SETTINGS = SchedulerConfig(ram_reserve="1GiB", gpu_reserve="512MiB")


def sample(**more: object) -> HardwareSample:
    host = HostSample(memory_used_bytes=10 * GIB, memory_total_bytes=64 * GIB)
    return HardwareSample(taken=0.0, host=host, **more)  # type: ignore[arg-type]


def test_what_others_use_is_what_is_used_less_our_private_memory() -> None:
    """A mapped model file is in an engine's memory, and in what the system calls available."""
    engine = ProcessSample(20 * GIB, private_bytes=3 * GIB)
    (ram,) = devices_of(sample(processes={7: engine}), SETTINGS, [7])
    assert (ram.id, ram.total_bytes, ram.reserve_bytes) == ("ram", 64 * GIB, GIB)
    assert ram.used_by_others_bytes == 7 * GIB
    (ram,) = devices_of(sample(processes={7: engine}), SETTINGS, [])
    assert ram.used_by_others_bytes == 10 * GIB, "an engine that is gone is ours no more"


def test_a_gpu_counts_what_others_hold_of_it() -> None:
    gpus = (
        GpuSample(0, "A", "GPU-a", used_bytes=10 * GIB, total_bytes=24 * GIB),
        GpuSample(1, "B", "GPU-b", used_bytes=2 * GIB, total_bytes=8 * GIB),
    )
    engine = ProcessSample(GIB, 8 * GIB, GIB, {0: 8 * GIB})
    _, first, second = devices_of(sample(gpus=gpus, processes={7: engine}), SETTINGS, [7])
    assert (first.id, first.uuid, first.used_by_others_bytes) == ("gpu0", "GPU-a", 2 * GIB)
    assert (second.id, second.used_by_others_bytes, second.reserve_bytes) == ("gpu1", 2 * GIB, GIB // 2)


def test_a_gpu_that_is_lost_or_tells_nothing_is_no_device() -> None:
    gpus = (
        GpuSample(0, "lost", used_bytes=0, total_bytes=24 * GIB, stale=True, problem="it fell off the bus"),
        GpuSample(1, "unified"),
    )
    assert [device.id for device in devices_of(sample(gpus=gpus), SETTINGS, [])] == ["ram"]


async def test_a_refresh_brings_newer_figures_soon() -> None:
    sampler = HardwareSampler(lambda: (os.getpid(),), interval_s=60)
    sampler.start()
    gauge = HardwareGauge(sampler, SETTINGS, lambda: (os.getpid(),))
    try:
        for _ in range(3):
            asked = time.monotonic()
            await gauge.refresh()
            assert sampler.latest.taken >= asked
        assert gauge.devices()[0].total_bytes > 0
        assert gauge.used()["ram"] > 0
    finally:
        await asyncio.to_thread(sampler.stop)


async def test_a_refresh_gives_up_on_a_thread_that_hangs() -> None:
    hung = threading.Event()

    def hang() -> tuple[int, ...]:
        hung.wait(10)
        return ()

    sampler = HardwareSampler(hang, interval_s=60)
    sampler.start()
    try:
        async with asyncio.timeout(3):
            await HardwareGauge(sampler, SETTINGS, tuple).refresh()
    finally:
        hung.set()
        await asyncio.to_thread(sampler.stop)


async def test_nothing_is_known_before_the_first_look() -> None:
    assert HardwareGauge(HardwareSampler(tuple), SETTINGS, tuple).devices() == ()
