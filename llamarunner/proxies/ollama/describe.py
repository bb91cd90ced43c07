"""What Ollama tells of models: tags and ps. Pure: a model and its residence in, JSON objects out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from llamarunner.catalog.catalog import Capability, Model
from llamarunner.events import RunnerState
from llamarunner.runners.place import Residence
from llamarunner.runners.runner import Runner

_FOREVER = timedelta(days=292 * 365)  # Ollama's "never": what its int64 of nanoseconds can hold
_CAPABILITY_ORDER = tuple(Capability)


def tagged(name: str) -> str:
    """Clients expect a tag on every name."""
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


def local_time(moment: datetime) -> str:
    """RFC 3339 in the local time zone, with microseconds."""
    return moment.astimezone().isoformat(timespec="microseconds")


def details(model: Model) -> dict[str, Any]:
    known = model.details
    return {
        "parent_model": "",
        "format": "gguf",
        "family": known.architecture,
        "families": [known.architecture] if known.architecture else [],
        "parameter_size": known.parameter_size,
        "quantization_level": known.quantization,
    }


def capabilities(model: Model) -> list[str]:
    return [str(each) for each in _CAPABILITY_ORDER if each in model.capabilities]


def tags(models: Iterable[Model]) -> dict[str, Any]:
    """GET /api/tags: newest first."""
    usable = sorted((m for m in models if not m.problem), key=lambda m: m.modified_at, reverse=True)
    return {"models": [_tag(model, name) for model in usable for name in listed_names(model)]}


def listed_names(model: Model) -> tuple[str, ...]:
    """A copy of a model is the same one to us, and clients look for it by its own name."""
    return (model.name, *model.aliases) if model.manifest_digest else (model.name,)


def _tag(model: Model, name: str) -> dict[str, Any]:
    lengths = {"context_length": model.details.context_length, "embedding_length": model.details.embedding_length}
    return {
        "name": tagged(name),
        "model": tagged(name),
        "modified_at": local_time(datetime.fromtimestamp(model.modified_at, UTC)),
        "size": model.size_bytes,
        "digest": model.digest,
        "details": details(model) | {name: length for name, length in lengths.items() if length},
        "capabilities": capabilities(model),
    }


def running(
    residences: Iterable[tuple[Model, Residence]], memory_of: Mapping[int, tuple[int, int]], now: datetime
) -> dict[str, Any]:
    """GET /api/ps: longest remaining first. `memory_of` gives (RAM, GPU) bytes by process."""
    loaded = [
        (_expires_at(residence, now), model, residence)
        for model, residence in residences
        if residence.runner is not None and residence.runner.state in (RunnerState.READY, RunnerState.DRAINING)
    ]
    loaded.sort(key=lambda entry: entry[0], reverse=True)
    return {"models": [_running(model, residence, expires, memory_of) for expires, model, residence in loaded]}


def _expires_at(residence: Residence, now: datetime) -> datetime:
    if residence.runner is not None and residence.runner.state is RunnerState.DRAINING:
        return now - timedelta(seconds=1)  # clients show a past time as "Stopping..."
    left = residence.keep_alive_s if residence.idle_left_s is None else residence.idle_left_s
    return now + timedelta(seconds=min(left, _FOREVER.total_seconds()))


def _running(
    model: Model, residence: Residence, expires: datetime, memory_of: Mapping[int, tuple[int, int]]
) -> dict[str, Any]:
    runner = residence.runner
    sizes = [_memory(each.runner, memory_of) for each in residence.replicas or (residence,)]
    ram, vram = sum(ram for ram, _ in sizes), sum(vram for _, vram in sizes)
    return {
        "name": tagged(model.name),
        "model": tagged(model.name),
        "size": ram + vram or model.size_bytes,
        "digest": model.digest,
        "details": details(model),
        "expires_at": local_time(expires),
        "size_vram": vram,
        "context_length": (runner.context if runner is not None else None) or model.context,
    }


def _memory(runner: Runner | None, memory_of: Mapping[int, tuple[int, int]]) -> tuple[int, int]:
    """Bytes of one process in RAM, and on GPUs."""
    if runner is None or runner.pid is None:
        return 0, 0
    ram, vram = memory_of.get(runner.pid, (0, 0))
    # clients show "100% GPU" where both sizes are equal; what its driver holds in RAM is not the model
    return (0, vram) if runner.is_whole_on_gpu and vram > ram else (ram, vram)
