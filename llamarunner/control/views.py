"""How what the core keeps becomes what a front end may show. Pure but for the clock."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from llamarunner.catalog.catalog import Model
from llamarunner.catalog.pull import Pull
from llamarunner.control.snapshot import (
    GpuView,
    HostView,
    ModelView,
    ProxyView,
    PullView,
    ReplicaView,
    RequestView,
    RunnerState,
    ShareView,
    UseView,
)
from llamarunner.engines.log_events import SlotPhase
from llamarunner.errors import EngineError, LlamaRunnerError
from llamarunner.events import RequestTrace
from llamarunner.runners.outlook import Outlook
from llamarunner.runners.place import LOADING, Residence
from llamarunner.runners.placement import RAM, Device
from llamarunner.runners.runner import Runner
from llamarunner.telemetry.hardware import HardwareSample
from llamarunner.units import format_duration

NO_DEVICES: Mapping[str, Device] = MappingProxyType({})
_MOST_TOLD, _MOST_ESTIMATED = 0.99, 0.95  # of a load that is not over


class ProxyState(Protocol):
    """What is told of a proxy."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def is_enabled(self) -> bool: ...

    @property
    def is_running(self) -> bool: ...

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...

    @property
    def problem(self) -> LlamaRunnerError | None: ...


def model_view(model: Model, residence: Residence | None, hardware: HardwareSample, rate: float | None) -> ModelView:
    details, settings = model.details, model.settings
    runner = residence.runner if residence is not None else None
    failure = residence.failure if residence is not None else None
    plan = runner.plan if runner is not None else None
    replicas = replica_views(residence, hardware)
    memory = _memory_of(runner, hardware) if not replicas else _added(replicas)
    return ModelView(
        name=model.name,
        state=_state(runner, failure),
        reason=runner.reason if runner is not None else failure.message if failure is not None else "",
        path=str(model.path),
        engine=settings.engine,
        aliases=model.aliases,
        source=model.source,
        architecture=details.architecture,
        parameter_size=details.parameter_size,
        quantization=details.quantization,
        file_bytes=model.size_bytes,
        capabilities=tuple(sorted(model.capabilities)),
        problem=model.problem or (failure.message if failure is not None else _hung_text(residence)),
        hint=model.hint or (failure.hint if failure is not None else ""),
        pinned=residence.pinned if residence is not None else settings.pin,
        pinned_by=residence.pinned_by if residence is not None else "",
        tags=tuple(settings.tags),
        priority=settings.priority,
        keep_alive_s=residence.keep_alive_s if runner is not None and residence is not None else settings.keep_alive,
        keep_alive_min_s=settings.keep_alive_min,
        keep_alive_max_s=settings.keep_alive_max,
        runs_as=model.runs_as,
        replica_count=settings.replicas + len(settings.also_on),
        replicas=replicas,
        runner_id=runner.runner_id if runner is not None else None,
        pid=runner.pid if runner is not None else None,
        port=plan.port if plan is not None else None,
        url=plan.url if plan is not None else "",
        argv=plan.argv if plan is not None else (),
        memory_bytes=memory[0],
        gpu_bytes=memory[1],
        shares=share_views(residence) if residence is not None else (),
        demanded=residence.demanded if residence is not None else "",
        context=runner.context if runner is not None else None,
        slots=residence.slots if residence is not None else None,
        in_flight=residence.in_flight if residence is not None else 0,
        queued=residence.queued if residence is not None else 0,
        tokens_per_s=rate,
        state_s=_state_s(residence),
        load_s=runner.load_s if runner is not None else None,
        progress=load_progress(runner, residence.load_s) if runner is not None and residence is not None else None,
        activity=activity_of(runner) if runner is not None else (),
        idle_left_s=residence.idle_left_s if residence is not None else None,
        protected_s=residence.protected_s if residence is not None else 0.0,
        hung_s=residence.hung_s if residence is not None else None,
        retry_s=residence.retry_s if residence is not None else 0.0,
        failures=residence.failures if residence is not None else 0,
        left_alone=residence is not None and residence.is_left_alone,
    )


def replica_views(residence: Residence | None, hardware: HardwareSample) -> tuple[ReplicaView, ...]:
    return tuple(_replica_view(each, hardware) for each in residence.replicas) if residence is not None else ()


def _replica_view(residence: Residence, hardware: HardwareSample) -> ReplicaView:
    runner, failure = residence.runner, residence.failure
    plan = runner.plan if runner is not None else None
    memory_bytes, gpu_bytes = _memory_of(runner, hardware)
    return ReplicaView(
        name=residence.name,
        state=_state(runner, failure),
        engine=residence.engine,
        pid=runner.pid if runner is not None else None,
        port=plan.port if plan is not None else None,
        url=plan.url if plan is not None else "",
        in_flight=residence.in_flight,
        queued=residence.queued,
        slots=residence.slots,
        memory_bytes=memory_bytes,
        gpu_bytes=gpu_bytes,
        problem=failure.message if failure is not None and runner is None else _hung_text(residence),
        state_s=_state_s(residence),
        hung_s=residence.hung_s,
        activity=activity_of(runner) if runner is not None else (),
        ejected_s=residence.ejected_s,
    )


def share_views(residence: Residence) -> tuple[ShareView, ...]:
    return tuple(ShareView(s.device, s.layers, s.estimated, s.measured) for s in residence.shares)


def _state(runner: Runner | None, failure: EngineError | None) -> RunnerState:
    if runner is not None:
        return runner.state
    return RunnerState.FAILED if failure is not None else RunnerState.STOPPED


def _state_s(residence: Residence | None) -> float:
    if residence is None:
        return 0.0
    return time.monotonic() - residence.runner.state_since if residence.runner is not None else residence.failed_s


def _memory_of(runner: Runner | None, hardware: HardwareSample) -> tuple[int | None, int | None]:
    """In RAM, and on GPUs."""
    measured = hardware.processes.get(runner.pid) if runner is not None and runner.pid is not None else None
    return (None, None) if measured is None else (measured.memory_bytes, measured.gpu_bytes)


def _added(replicas: Sequence[ReplicaView]) -> tuple[int | None, int | None]:
    in_ram = [each.memory_bytes for each in replicas if each.memory_bytes is not None]
    on_gpus = [each.gpu_bytes for each in replicas if each.gpu_bytes is not None]
    return sum(in_ram) if in_ram else None, sum(on_gpus) if on_gpus else None


def _hung_text(residence: Residence | None) -> str:
    if residence is None or residence.hung_s is None:
        return ""
    return f"no sign of life for {format_duration(float(int(residence.hung_s)))}"


def load_progress(runner: Runner, last_s: float | None) -> float | None:
    """By the engine's own word, else by the time the last load took; None where neither is known."""
    if runner.state not in LOADING:
        return None
    if runner.progress is not None:
        return round(min(runner.progress, _MOST_TOLD), 2)
    if not last_s or runner.load_begun is None:
        return None
    return round(min((time.monotonic() - runner.load_begun) / last_s, _MOST_ESTIMATED), 2)


def activity_of(runner: Runner) -> tuple[str, ...]:
    busy = (slot for slot in runner.activity.slots if slot.phase is not SlotPhase.IDLE)
    return tuple(f"slot {slot.slot}: {slot.label}" for slot in busy)


def gpu_views(hardware: HardwareSample, devices: Mapping[str, Device] = NO_DEVICES) -> tuple[GpuView, ...]:
    """`devices` by their id."""
    return tuple(
        GpuView(
            index=gpu.index,
            use=use_view(devices.get(f"gpu{gpu.index}")),
            name=gpu.name,
            used_bytes=gpu.used_bytes or 0,
            total_bytes=gpu.total_bytes or 0,
            utilization=gpu.utilization,
            temperature_c=gpu.temperature_c,
            power_w=gpu.power_w,
            power_limit_w=gpu.power_limit_w,
            stale=gpu.stale,
        )
        for gpu in hardware.gpus
    )


def use_view(device: Device | None) -> UseView | None:
    if device is None:
        return None
    return UseView(device.used_by_ours_bytes, device.used_by_others_bytes, device.reserve_bytes, device.free_bytes)


def host_view(hardware: HardwareSample, devices: Mapping[str, Device] = NO_DEVICES) -> HostView:
    host = hardware.host
    return HostView(
        use=use_view(devices.get(RAM)),
        cpu=host.cpu,
        cores=host.cores,
        load_1m=host.load_1m,
        memory_used_bytes=host.memory_used_bytes,
        memory_total_bytes=host.memory_total_bytes,
        own_memory_bytes=host.own_memory_bytes,
        gpu_note=hardware.gpu_note,
    )


def request_view(trace: RequestTrace, outlook: Outlook | None = None) -> RequestView:
    now = trace.finished if trace.finished is not None else time.monotonic()
    granted = trace.granted if trace.granted is not None else now
    load_started = trace.load_started
    return RequestView(
        request_id=trace.request_id,
        dialect=trace.dialect,
        endpoint=trace.endpoint,
        client=trace.client,
        model=trace.model,
        phase=trace.phase,
        started_at=trace.started_at,
        stream=trace.stream,
        user_agent=trace.user_agent,
        client_name=trace.client_name,
        priority=trace.priority,
        status=trace.status,
        error=trace.error,
        queue_s=(load_started if load_started is not None else granted) - trace.started,
        load_s=granted - load_started if load_started is not None else None,
        ttft_s=trace.first_byte - trace.started if trace.first_byte is not None else None,
        total_s=now - trace.started,
        prompt_tokens=trace.prompt_tokens,
        cached_tokens=trace.cached_tokens,
        output_tokens=trace.output_tokens,
        prompt_tokens_per_s=trace.prompt_tokens_per_s,
        output_tokens_per_s=trace.output_tokens_per_s,
        bytes_out=trace.bytes_out,
        stripped=trace.stripped,
        truncated=trace.truncated,
        ignored=trace.ignored,
        position=outlook.position if outlook is not None else None,
        waiting_for=outlook.reason if outlook is not None else "",
        left_s=outlook.left_s if outlook is not None else None,
    )


def pull_view(pull: Pull) -> PullView:
    rate, left = pull.bytes_per_s, pull.total - pull.completed
    return PullView(
        name=pull.name.short,
        state=pull.state,
        status=pull.status,
        completed=pull.completed,
        total=pull.total,
        bytes_per_s=rate,
        left_s=left / rate if rate and pull.total else None,
        problem=pull.error.message if pull.error is not None else "",
        hint=pull.error.hint if pull.error is not None else "",
        ended_at=pull.ended_at,
    )


def proxy_view(proxy: ProxyState) -> ProxyView:
    problem = proxy.problem
    return ProxyView(
        name=proxy.name,
        title=proxy.title,
        enabled=proxy.is_enabled,
        running=proxy.is_running,
        host=proxy.host,
        port=proxy.port,
        problem=problem.message if problem is not None else "",
        hint=problem.hint if problem is not None else "",
    )
