"""All that a front end may show, as plain immutable data. Made by the service, read by the TUI; it holds no objects of
the program, no secrets and no prompt or answer text.

Wherever a number is not known it is None. `*_s` are seconds, `*_bytes` bytes, `*_at` unix time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llamarunner.events import PullState, RequestPhase, RunnerState

__all__ = [
    "GpuView",
    "HostView",
    "LogLine",
    "LogPage",
    "ModelView",
    "ProxyView",
    "PullState",
    "PullView",
    "ReplicaView",
    "RequestPhase",
    "RequestView",
    "RunnerState",
    "ShareView",
    "Snapshot",
    "UseView",
]


@dataclass(frozen=True, slots=True)
class ShareView:
    """What a model has of one device, or last had; of all its replicas, where there are several."""

    device: str  # "ram", "gpu0", ...
    layers: int | None = None  # of the model; None for replicas
    estimated_bytes: int | None = None  # told from its header before it ran
    measured_bytes: int | None = None  # while it is ready


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One of several runners of a model."""

    name: str  # the model's, or "NAME#2"
    state: RunnerState
    engine: str = ""
    pid: int | None = None
    port: int | None = None
    url: str = ""  # where it is a server elsewhere
    in_flight: int = 0
    queued: int = 0
    slots: int | None = None
    memory_bytes: int | None = None
    gpu_bytes: int | None = None
    problem: str = ""  # why it failed
    state_s: float = 0.0
    hung_s: float | None = None
    activity: tuple[str, ...] = ()  # what each busy slot does
    ejected_s: float = 0.0  # until requests go to it again


@dataclass(frozen=True, slots=True)
class ModelView:
    """One row: a model of the catalogue and, where there is one, its runner. Of replicas it tells of one that is ready;
    memory, slots and requests are those of all of them."""

    name: str
    state: RunnerState  # stopped where it has no runner
    reason: str = ""  # why it is in this state, for a person
    path: str = ""
    engine: str = ""  # name of its engine
    aliases: tuple[str, ...] = ()
    source: str = ""
    architecture: str = ""
    parameter_size: str = ""
    quantization: str = ""
    file_bytes: int = 0
    capabilities: tuple[str, ...] = ()
    problem: str = ""  # the model cannot run: why
    hint: str = ""  # and what would help
    tags: tuple[str, ...] = ()
    priority: int = 0
    pinned: bool = False
    pinned_by: str = ""  # the tag it is pinned by
    keep_alive_s: float = 0.0  # in force: what the newest request asked, else what is configured
    keep_alive_min_s: float = 0.0  # bounds of what requests may ask
    keep_alive_max_s: float | None = None
    runs_as: str = ""  # the model whose runner serves it too: they are started alike
    replica_count: int = 1  # configured
    replicas: tuple[ReplicaView, ...] = ()  # where there are several, and it was loaded once
    # of the runner
    runner_id: int | None = None
    pid: int | None = None
    port: int | None = None
    url: str = ""  # where its engine is a server elsewhere
    argv: tuple[str, ...] = ()
    memory_bytes: int | None = None  # resident in RAM
    gpu_bytes: int | None = None  # in GPU memory
    shares: tuple[ShareView, ...] = ()  # GPUs first
    demanded: str = ""  # by a request, beyond the configuration: "context 16384"
    context: int | None = None  # tokens for each request, as the engine reports it once ready
    slots: int | None = None
    in_flight: int = 0  # requests being answered now
    queued: int = 0  # requests waiting for it
    tokens_per_s: float | None = None  # of the newest finished answer
    state_s: float = 0.0  # since it came into this state
    load_s: float | None = None  # how long its load took
    progress: float | None = None  # of the load, 0..1, in steps of a hundredth: as told by the engine, or estimated
    activity: tuple[str, ...] = ()  # what each busy slot does: "slot 0: prompt 42 %"
    idle_left_s: float | None = None  # until it is unloaded; None while busy, inf when never
    protected_s: float = 0.0  # until it may leave to make room, though it is idle
    failures: int = 0  # lately
    retry_s: float = 0.0  # after these, until requests have it tried again
    left_alone: bool = False  # it failed so often that only time or a person has it tried again
    hung_s: float | None = None  # its engine owes an answer and gives no sign of life for so long


@dataclass(frozen=True, slots=True)
class UseView:
    """What the memory of one device is used for, as the scheduler counts."""

    ours_bytes: int  # held by loaded models, or promised to them
    others_bytes: int
    reserve_bytes: int  # kept free
    free_bytes: int  # for models


@dataclass(frozen=True, slots=True)
class GpuView:
    index: int
    name: str
    used_bytes: int
    total_bytes: int
    utilization: float | None = None  # 0..1
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    stale: bool = False  # the driver stopped answering; these are the last figures
    use: UseView | None = None


@dataclass(frozen=True, slots=True)
class HostView:
    cpu: float | None = None  # 0..1 over all cores
    cores: int = 0
    load_1m: float | None = None
    memory_used_bytes: int = 0
    memory_total_bytes: int = 0
    own_memory_bytes: int = 0  # of this program, without engines
    gpu_note: str = ""  # why there are no GPUs to show
    use: UseView | None = None


@dataclass(frozen=True, slots=True)
class RequestView:
    request_id: int
    dialect: str
    endpoint: str
    client: str
    model: str
    phase: RequestPhase
    started_at: float
    stream: bool = False
    user_agent: str = ""
    client_name: str = ""  # as the configuration calls whoever asks
    priority: int = 0  # of that client
    status: int | None = None
    error: str = ""
    queue_s: float | None = None  # waiting for room
    load_s: float | None = None  # waiting for its model's load
    ttft_s: float | None = None  # from arrival to the first content
    total_s: float = 0.0  # so far, or in all
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_per_s: float | None = None
    output_tokens_per_s: float | None = None
    bytes_out: int = 0
    stripped: str = ""  # taken out of it because its engine cannot do it: "tools"
    truncated: str = ""  # left out because the prompt was too long: "the oldest 4 of 9 messages"
    ignored: str = ""  # options nobody knows: "num_cxt, foo"
    # while it waits
    position: int | None = None  # 1 is next
    waiting_for: str = ""  # "waiting for qwen3-32b: 2 answers running"
    left_s: float | None = None  # an estimate of the wait


@dataclass(frozen=True, slots=True)
class ProxyView:
    name: str  # "ollama"
    title: str  # "Ollama"
    enabled: bool
    running: bool
    host: str = ""
    port: int = 0
    problem: str = ""  # why it does not run though enabled
    hint: str = ""


@dataclass(frozen=True, slots=True)
class PullView:
    """A model on its way here, or one that has just come or failed to."""

    name: str
    state: PullState
    status: str = ""  # "pulling 6a0746a1ec1a", in the words of Ollama's clients
    completed: int = 0  # bytes
    total: int = 0  # 0 while unknown
    bytes_per_s: float | None = None
    left_s: float | None = None  # at that rate
    ended_at: float | None = None  # None while it runs or waits
    problem: str = ""  # why it failed
    hint: str = ""


@dataclass(frozen=True, slots=True)
class LogLine:
    number: int  # rises by one within a source, never reused
    at: float
    text: str  # control characters already removed
    level: str = "info"  # debug, info, warning, error


@dataclass(frozen=True, slots=True)
class LogPage:
    """Lines of one source after a number. `missed` were pushed out of the ring before they were asked for."""

    lines: tuple[LogLine, ...]
    missed: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`revisions` counts the changes of each part ("models", "hardware", "requests", "proxies", "pulls", "logs"): a
    pane whose number has not moved need not be painted again. Ages and countdowns move with time alone and are not
    counted."""

    taken_at: float
    version: str  # of LlamaRunner
    started_at: float
    stopping: bool = False
    profile: str = ""
    config_path: str = ""  # "" where there is no file
    proxies: tuple[ProxyView, ...] = ()
    models: tuple[ModelView, ...] = ()
    gpus: tuple[GpuView, ...] = ()
    host: HostView = field(default_factory=HostView)
    requests: tuple[RequestView, ...] = ()  # live ones first, then finished, newest first; bounded
    pulls: tuple[PullView, ...] = ()  # those that run first, then those that ended lately, newest first; bounded
    log_sources: tuple[str, ...] = ("llamarunner",)  # the program, then each runner that has a log
    tokens_per_s: float = 0.0  # of all answers being streamed now
    revisions: dict[str, int] = field(default_factory=dict)
