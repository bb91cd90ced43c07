"""What NVML says of the GPUs. Every call may block for as long as the driver likes: `hardware.py` asks from a thread.

CUDA is never initialised: NVML alone takes no GPU memory and wakes no card up.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

logger = logging.getLogger(__name__)

_LIBRARY = "libnvidia-ml.so.1"
_NOT_FOUND = f"no NVIDIA driver was found ({_LIBRARY} is not installed)"


@dataclass(frozen=True, slots=True)
class GpuSample:
    """Figures are None where the card does not say. `problem` tells why a card no longer answers; the figures are then
    the last it gave."""

    index: int
    name: str
    uuid: str = ""
    used_bytes: int | None = None  # with what the driver reserves: total - used is what can be had
    total_bytes: int | None = None
    utilization: float | None = None  # 0..1
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    processes: Mapping[int, int] = field(default_factory=dict)  # pid -> bytes, anybody's, as far as the driver tells
    stale: bool = False
    problem: str = ""


@dataclass(slots=True)
class _Device:
    handle: Any
    last: GpuSample


class GpuReader:
    """Not thread-safe: belongs to the one thread that reads. While there is no driver, or a card has a problem, NVML is
    started afresh every `retry_s`: a driver may be loaded, or a card reset, at any time."""

    def __init__(self, *, retry_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._retry_s = retry_s
        self._clock = clock
        self._retry_at: float | None = None  # None: nothing is wrong
        self._nvml: Any = None  # the module, while it is initialised
        self._devices: list[_Device] = []
        self._note = ""

    def read(self) -> tuple[tuple[GpuSample, ...], str]:
        """The cards, and why there are none."""
        due = self._retry_at is not None and self._clock() >= self._retry_at
        if due or (self._nvml is None and self._retry_at is None):
            self._restart()
        for device in self._devices:
            device.last = self._sample(device)
        if self._retry_at is None and any(device.last.problem for device in self._devices):
            self._retry_at = self._clock() + self._retry_s
        return tuple(device.last for device in self._devices), self._note

    def close(self) -> None:
        nvml, self._nvml, self._devices = self._nvml, None, []
        if nvml is not None:
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError as error:
                logger.debug("NVML did not shut down: %s", error)

    def _restart(self) -> None:
        names = {device.last.index: device.last.name for device in self._devices}
        self.close()
        note = self._start(names)
        if note != self._note:
            logger.info("GPUs: %s", note or ", ".join(device.last.name for device in self._devices))
        self._note = note
        self._retry_at = self._clock() + self._retry_s if note else None

    def _start(self, known_names: Mapping[int, str]) -> str:
        """Initialise and list the cards; returns why there are none."""
        if sys.platform == "linux" and not _library_loads():
            return _NOT_FOUND  # spares machines without a driver the import below: 3 MB and 60 ms
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            return _explain(pynvml, error)
        self._nvml = pynvml
        try:
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            self.close()
            return _explain(pynvml, error)
        self._devices = [self._device(index, known_names.get(index, f"GPU {index}")) for index in range(count)]
        if not self._devices:
            self.close()
            return "the NVIDIA driver sees no GPU"
        return ""

    def _device(self, index: int, fallback_name: str) -> _Device:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = self._ask(nvml.nvmlDeviceGetName, handle) or fallback_name
            uuid = self._ask(nvml.nvmlDeviceGetUUID, handle) or ""
        except nvml.NVMLError as error:
            problem = _explain(nvml, error)
            logger.warning("GPU %d: %s", index, problem)
            return _Device(None, GpuSample(index, fallback_name, stale=True, problem=problem))
        return _Device(handle, GpuSample(index, name, uuid))

    def _sample(self, device: _Device) -> GpuSample:
        last, nvml = device.last, self._nvml
        if device.handle is None:
            return last
        try:
            return self._figures(device.handle, last)
        except nvml.NVMLError as error:
            problem = _explain(nvml, error)
            if problem != last.problem:
                logger.warning("GPU %d (%s): %s", last.index, last.name, problem)
            return replace(last, stale=True, problem=problem)

    def _figures(self, handle: Any, last: GpuSample) -> GpuSample:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        load = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        temperature = self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        limit = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        return GpuSample(
            index=last.index,
            name=last.name,
            uuid=last.uuid,
            used_bytes=None if memory is None else int(memory.used),
            total_bytes=None if memory is None else int(memory.total),
            utilization=None if load is None else min(load.gpu / 100, 1.0),
            temperature_c=None if temperature is None else float(temperature),
            power_w=None if power is None else power / 1000,
            power_limit_w=None if limit is None else limit / 1000,
            processes=self._processes(handle, None if memory is None else int(memory.total)),
        )

    def _processes(self, handle: Any, total_bytes: int | None) -> dict[int, int]:
        nvml = self._nvml
        merged: dict[int, int] = {}
        for kind in ("Compute", "Graphics"):  # Vulkan engines are "graphics"; one process may be in both lists
            listed = self._ask(getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v3"), handle)
            if listed is None:  # a driver before R510
                listed = self._ask(getattr(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v2"), handle)
            of_kind: Counter[int] = Counter()  # with MIG, a process has an entry for each instance it uses
            for process in listed or ():
                # the first R535 drivers changed the struct without telling: such entries are nonsense
                plausible = process.usedGpuMemory and (total_bytes is None or process.usedGpuMemory <= total_bytes)
                if process.pid and plausible:
                    of_kind[process.pid] += process.usedGpuMemory
            for pid, used in of_kind.items():
                merged[pid] = max(used, merged.get(pid, 0))
        return merged

    def _ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """None where this card or driver does not say, or does not say it to us; raises when the card is gone."""
        nvml = self._nvml
        try:
            return function(*args)
        except nvml.NVMLError as error:
            silent = (
                nvml.NVML_ERROR_NOT_SUPPORTED,
                nvml.NVML_ERROR_NO_PERMISSION,
                nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
                nvml.NVML_ERROR_NOT_FOUND,
                nvml.NVML_ERROR_NO_DATA,
                nvml.NVML_ERROR_INVALID_ARGUMENT,
                nvml.NVML_ERROR_INSUFFICIENT_SIZE,  # processes appeared between the two calls
            )
            if error.value in silent:
                return None
            raise


def _library_loads() -> bool:
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return False
    return True


def _explain(nvml: Any, error: Any) -> str:
    """An NVML error in words that help."""
    words = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: _NOT_FOUND,
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed but not loaded",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
            "the NVIDIA driver was updated and the running kernel still has the old one: restart the machine"
        ),
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND: "the NVIDIA driver is too old to be read: update it",
        nvml.NVML_ERROR_NO_PERMISSION: "no permission to read the NVIDIA driver",
        nvml.NVML_ERROR_GPU_IS_LOST: "has fallen off the bus, or stopped answering",
        nvml.NVML_ERROR_RESET_REQUIRED: "needs a reset",
    }
    return words.get(error.value, f"the NVIDIA driver reports: {error}")
