"""`llamarunner doctor`: what this machine offers, what is missing, and what would help. Looks, and changes nothing."""

from __future__ import annotations

import itertools
import os
import platform
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import psutil

from llamarunner import __version__, paths, ports
from llamarunner.catalog.catalog import Model
from llamarunner.catalog.ollama_store import closed_folders
from llamarunner.catalog.stores import discover, kept_headers, places
from llamarunner.config.load import LoadedConfig
from llamarunner.engines.engine import Engine
from llamarunner.engines.registry import make_engines
from llamarunner.errors import EngineError, UnsupportedError
from llamarunner.telemetry.gpus import GpuReader, GpuSample
from llamarunner.units import format_size

_GPU_TIMEOUT_S = 5.0  # a healthy driver answers in milliseconds, one that was asleep in a second or two
_ENGINE_TIMEOUT_S = 30.0  # its program runs once to tell its version, the first time from a cold disk
_LOW_DISK_BYTES = 1024**3
_MOST_SHOWN = 20  # of one section as text, problems aside; the JSON has them all

_T = TypeVar("_T")


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"  # something will not work, the rest will
    FAIL = "fail"  # nothing can be served until this is mended


_MARKS = {Status.OK: "ok  ", Status.WARN: "warn", Status.FAIL: "FAIL"}


@dataclass(frozen=True, slots=True)
class Item:
    """One finding. `remedy` says what would help, where something would."""

    section: str
    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    items: tuple[Item, ...]

    @property
    def can_serve(self) -> bool:
        return all(item.status is not Status.FAIL for item in self.items)


def examine(loaded: LoadedConfig) -> Report:
    """Look at everything. Takes seconds: it runs the engines' programs and asks drivers and ports."""
    engines = make_engines(loaded.config)
    parts = (
        _program(), _configuration(loaded), _engines(loaded, engines), _hardware(), _proxies(loaded),
        _models(loaded, engines),
    )  # fmt: skip
    return Report(tuple(item for part in parts for item in part))


def render(report: Report) -> str:
    lines: list[str] = []
    for section, items in itertools.groupby(report.items, key=lambda item: item.section):
        lines += ["", section] if lines else [section]
        left_out = 0
        for number, item in enumerate(items):
            if item.status is Status.OK and number >= _MOST_SHOWN:
                left_out += 1
                continue
            lines.append(f"  {_MARKS[item.status]}  {item.name}: {item.detail}")
            if item.remedy:
                lines.append(f"        -> {item.remedy}")
        if left_out:
            lines.append(f"        and {left_out} more without problems")
    return "\n".join(lines)


def to_json(report: Report) -> dict[str, Any]:
    return {"can_serve": report.can_serve, "items": [asdict(item) for item in report.items]}


def look_for_gpus(*, timeout_s: float = _GPU_TIMEOUT_S) -> tuple[tuple[GpuSample, ...], str]:
    """The GPUs that NVML knows of, and why there are none."""

    def read() -> tuple[tuple[GpuSample, ...], str]:
        reader = GpuReader()
        try:
            return reader.read()
        finally:
            reader.close()

    found = _within(timeout_s, read)
    return found if found is not None else ((), f"the NVIDIA driver did not answer within {timeout_s:g} seconds")


def _within(timeout_s: float, work: Callable[[], _T]) -> _T | None:
    """What `work` gives, or None if it takes longer: its thread is left behind and cannot keep the program from
    ending. An error of `work` is raised here."""
    outcome: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:  # noqa: BLE001  handed over to the caller's thread
            outcome.put((None, error))

    threading.Thread(target=run, name="doctor", daemon=True).start()
    try:
        result, error = outcome.get(timeout=timeout_s)
    except queue.Empty:
        return None
    if error is not None:
        raise error
    return result


def _program() -> Iterator[Item]:
    version = f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield Item("program", "llamarunner", Status.OK, version)
    for name, folder in (("state", paths.state_dir()), ("logs", paths.log_dir()), ("cache", paths.cache_dir())):
        yield _folder(name, folder)


def _folder(name: str, folder: Path) -> Item:
    """It is made when first needed: what counts is the nearest folder that exists."""
    nearest = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        remedy = f"make {nearest} a folder you may write to, or set LLAMARUNNER_HOME to another"
        return Item("program", name, Status.WARN, f"{folder} cannot be written", remedy)
    free = shutil.disk_usage(nearest).free
    if free < _LOW_DISK_BYTES:
        return Item("program", name, Status.WARN, f"{folder}: only {format_size(free)} left", "make room on that disk")
    return Item("program", name, Status.OK, str(folder))


def _configuration(loaded: LoadedConfig) -> Iterator[Item]:
    profile = f", profile {loaded.profile}" if loaded.profile else ""
    if loaded.path is None:
        detail = f"none, the defaults apply{profile}"
        yield Item("configuration", "file", Status.OK, detail, "`llamarunner init` writes one")
    else:
        yield Item("configuration", "file", Status.OK, f"{loaded.path}{profile}")
    for problem in loaded.warnings:
        if problem.key.endswith(".path"):
            continue  # told once, with the model
        yield Item("configuration", problem.place, Status.WARN, f"{problem.key}: {problem.message}")


def _engines(loaded: LoadedConfig, engines: Mapping[str, Engine]) -> Iterator[Item]:
    found = {name: _within(_ENGINE_TIMEOUT_S, engine.info) for name, engine in engines.items()}
    none_works = all(info is None or info.problem for info in found.values())
    bad = Status.FAIL if none_works else Status.WARN
    for name, info in found.items():
        if info is None:
            detail = f"it did not answer within {_ENGINE_TIMEOUT_S:g} seconds"
            key = "command" if engines[name].is_local else "url"
            yield Item("engines", name, bad, detail, f"see what is wrong with engines.{name}.{key}")
        elif info.problem:
            yield Item("engines", name, bad, info.problem, info.hint)
        else:
            version = f" {info.version}" if info.version else ""
            yield Item("engines", name, Status.OK, f"{info.kind}{version} ({info.command})")


def _hardware() -> Iterator[Item]:
    memory = psutil.virtual_memory()
    cores = f"{psutil.cpu_count(logical=False) or '?'} cores, {psutil.cpu_count() or '?'} threads"
    yield Item("hardware", "CPU", Status.OK, cores)
    free = f"{format_size(memory.available)} free of {format_size(memory.total)}"
    yield Item("hardware", "memory", Status.OK, free)
    gpus, note = look_for_gpus()
    for gpu in gpus:
        if gpu.problem:
            yield Item("hardware", f"GPU {gpu.index}", Status.WARN, f"{gpu.name}: {gpu.problem}", "see `nvidia-smi`")
        else:
            yield Item("hardware", f"GPU {gpu.index}", Status.OK, gpu_line(gpu))
    if not gpus:
        remedy = "models run on the CPU; with an NVIDIA GPU, install its driver and see that `nvidia-smi` works"
        yield Item("hardware", "GPU", Status.WARN, note or "none was found", remedy)


def gpu_line(gpu: GpuSample) -> str:
    """ "NVIDIA RTX 4090, 22.1 GiB free of 24.0 GiB", with as much of it as is known."""
    if gpu.total_bytes is None:
        return gpu.name
    total = format_size(gpu.total_bytes)
    if gpu.used_bytes is None:
        return f"{gpu.name}, {total}"
    return f"{gpu.name}, {format_size(gpu.total_bytes - gpu.used_bytes)} free of {total}"


def _proxies(loaded: LoadedConfig) -> Iterator[Item]:
    config = loaded.config
    proxies = {"ollama": config.proxies.ollama, "lmstudio": config.proxies.lmstudio}
    items = []
    for name, proxy in proxies.items():
        host = config.proxy_host(proxy)
        where = f"{host}:{proxy.port}"
        if not proxy.enabled:
            items.append(Item("proxies", name, Status.OK, "switched off in the configuration"))
        elif not proxy.port or ports.is_free(host, proxy.port):
            items.append(Item("proxies", name, Status.OK, f"{where} is free" if proxy.port else "any free port"))
        else:
            items.append(_taken_port(name, host, proxy.port))
    served = [item for item in items if item.status is Status.OK and proxies[item.name].enabled]
    for item in items:
        status = item.status if served or item.status is Status.OK else Status.FAIL
        yield Item(item.section, item.name, status, item.detail, item.remedy)
    if not any(proxy.enabled for proxy in proxies.values()):
        yield Item("proxies", "all", Status.FAIL, "both are switched off", "set proxies.ollama.enabled = true")


def _taken_port(name: str, host: str, port: int) -> Item:
    holder = ports.holder_of(host, port)
    if holder.startswith("llamarunner"):
        return Item("proxies", name, Status.OK, f"{host}:{port} is served by {holder}")
    other = ports.free_port_near(host, port)
    detail = f"{host}:{port} is held by {holder or 'a program of another user, or is no address of this machine'}"
    remedy = f"stop it, or set proxies.{name}.port = {other}"
    return Item("proxies", name, Status.WARN, detail, remedy)


def _models(loaded: LoadedConfig, engines: Mapping[str, Engine]) -> Iterator[Item]:
    catalog = discover(loaded.config, headers=kept_headers(writes=False))
    if not len(catalog):
        searched = ", ".join(places(loaded.config)) or "no folder (discovery.folders)"
        remedy = 'put a .gguf file into a folder of discovery.folders, or name one as [models.NAME] path = "..."'
        yield Item("models", "none", Status.WARN, f"nothing was found in {searched}", remedy)
    for folder in closed_folders(os.environ) if loaded.config.discovery.ollama else ():
        remedy = "join the group that owns it (sudo usermod -aG ollama $USER), and log in again"
        yield Item("models", "ollama", Status.WARN, f"{folder} may not be read", remedy)
    for model in catalog:
        if model.problem:
            where = "" if str(model.path) in model.problem else f" ({model.path})"
            yield Item("models", model.name, Status.WARN, model.problem + where, model.hint)
        elif wrong := _wrong_flag(model, engines):
            yield Item("models", model.name, Status.WARN, wrong.message, wrong.hint)
        elif model.hint:  # it runs, and cannot do all that one would expect of it
            yield Item("models", model.name, Status.WARN, _about(model), model.hint)
        else:
            yield Item("models", model.name, Status.OK, _about(model))


def _wrong_flag(model: Model, engines: Mapping[str, Engine]) -> UnsupportedError | None:
    """What its engine would not take; the engines have been asked what they know by now."""
    try:
        if engine := engines.get(model.settings.engine):
            engine.plan(model, port=0, api_key="")
    except UnsupportedError as error:
        return error
    except EngineError:  # told with the engines
        return None
    return None


def _about(model: Model) -> str:
    if not model.size_bytes:  # what its engine makes of the path is not ours to read
        return f"{model.path}, by the engine {model.settings.engine}"
    details = (model.details.parameter_size, model.details.quantization)
    source = "" if model.source in ("config", *map(str, model.path.parents)) else f"of {model.source}"
    return ", ".join((format_size(model.size_bytes), *filter(None, (*details, source)))) + f" ({model.path})"
