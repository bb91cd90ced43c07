"""What the detail of a model and of a request says, as pairs of a label and a text. Pure."""

from __future__ import annotations

import math
import shlex

from llamarunner.control.snapshot import ModelView, PullView, ReplicaView, RequestView, RunnerState, ShareView, Snapshot
from tui import words
from tui.screens.detail import Fact, Facts

_RECENT = 8  # requests shown with their model
_GAP: Fact = ("", " ", "")


def model_facts(name: str) -> Facts:
    def facts(snapshot: Snapshot) -> list[Fact] | None:
        model = next((model for model in snapshot.models if model.name == name), None)
        return None if model is None else _of_model(model, snapshot)

    return facts


def request_facts(request_id: int) -> Facts:
    def facts(snapshot: Snapshot) -> list[Fact] | None:
        request = next((request for request in snapshot.requests if request.request_id == request_id), None)
        return None if request is None else _of_request(request)

    return facts


def pull_facts(snapshot: Snapshot) -> list[Fact]:
    """All downloads that are remembered."""
    facts: list[Fact] = []
    for pull in snapshot.pulls:
        facts += [_GAP, *_of_pull(pull)] if facts else _of_pull(pull)
    return facts or [("", "Nothing was downloaded since the program started. D begins a download.", "muted")]


def _of_pull(pull: PullView) -> list[Fact]:
    glyph, style = words.pull_state(pull)
    ended = f", at {words.clock(pull.ended_at)}" if pull.ended_at is not None else ""
    facts = [(f"{glyph} {pull.state}", pull.name, style), ("", f"{words.pull_status(pull)}{ended}", "")]
    if pull.total and pull.ended_at is None:
        left = f", {words.countdown(pull.left_s)} left" if pull.left_s is not None else ""
        speed = f", {words.size(pull.bytes_per_s)}/s" if pull.bytes_per_s else ""
        share = words.percent(pull.completed / pull.total)
        facts.append(("", f"{share} of {words.size(pull.total)}{speed}{left}", ""))
    if pull.hint:
        facts.append(("", f"→ {pull.hint}", "accent"))
    return facts


def _of_model(model: ModelView, snapshot: Snapshot) -> list[Fact]:
    sections = (_state(model), _replicas(model), _use(model), _stay(model), _place(model), _kind(model))
    facts: list[Fact] = []
    for section in (*sections, _recent(model, snapshot)):
        told = [fact for fact in section if fact[1]]
        facts += [_GAP, *told] if facts and told else told
    return facts


def _state(model: ModelView) -> list[Fact]:
    state, style = words.model_state(model)
    return [
        ("state", f"{state} for {_whole(model.state_s)}", style),
        ("because", model.reason, "bad" if model.state is RunnerState.FAILED else ""),
        ("problem", model.problem if model.problem != model.reason else "", "bad-strong"),
        ("what helps", model.hint, "accent"),
        ("next try", _next_try(model), "warn"),
        ("runs as", f"{model.runs_as}: both are started alike and share a runner" if model.runs_as else "", ""),
        ("loaded so far", words.percent(model.progress) if model.progress is not None else "", style),
        ("demanded", f"{model.demanded}: as a request asked, not as configured" if model.demanded else "", "accent"),
    ]


def _next_try(model: ModelView) -> str:
    if model.state is not RunnerState.FAILED or not model.failures:
        return ""
    often = words.plural(model.failures, "failure")
    if model.left_alone:
        return f"left alone for {_whole(model.retry_s)} after {often}: press L to try now"
    if model.retry_s:
        return f"in {_whole(model.retry_s)} at the soonest, after {often}: press L to try now"
    return "with the next request, or press L"


def _replicas(model: ModelView) -> list[Fact]:
    if not model.replicas:
        return [
            ("replicas", f"{model.replica_count}, loaded as they are needed" if model.replica_count > 1 else "", "")
        ]
    facts: list[Fact] = []
    for index, replica in enumerate(model.replicas):
        facts.append(("replicas" if index == 0 else "", *_replica(index + 1, replica)))
        facts += [("", ", ".join(replica.activity), ""), ("", replica.problem, "bad")]
    return facts


def _replica(number: int, replica: ReplicaView) -> tuple[str, str]:
    state, style = words.runner_state(replica.state, in_flight=replica.in_flight, hung=replica.hung_s is not None)
    where = f"pid {replica.pid}, port {replica.port}" if replica.pid else replica.url
    answers = f"{replica.in_flight} of {words.plural(replica.slots, 'slot')}" if replica.slots else ""
    parts = (
        where,
        answers,
        f"{replica.queued} waiting" if replica.queued else "",
        _memory(replica.gpu_bytes, replica.memory_bytes),
        f"sits out for {_whole(replica.ejected_s)}, having left requests unanswered" if replica.ejected_s else "",
    )
    engine = f" on {replica.engine}" if replica.engine else ""
    known = ", ".join(filter(None, parts))
    return f"{state} #{number}{engine}{': ' if known else ''}{known}", style


def _use(model: ModelView) -> list[Fact]:
    waiting = f", {model.queued} waiting" if model.queued else ""
    answers = f"{model.in_flight} of {words.plural(model.slots, 'slot')}{waiting}" if model.slots else ""
    return [
        ("answers", answers or waiting.removeprefix(", "), ""),
        ("at work", ", ".join(model.activity) if not model.replicas else "", ""),
        ("speed", f"{words.rate(model.tokens_per_s)} tokens/s" if model.tokens_per_s else "", ""),
        ("context", f"{model.context} tokens a request" if model.context else "", ""),
        ("load took", words.duration(model.load_s) if model.load_s is not None else "", ""),
    ]


def _stay(model: ModelView) -> list[Fact]:
    """Why it stays, and for how long."""
    by = f", by its tag '{model.pinned_by}'" if model.pinned_by else ""
    protected = f"for {_whole(model.protected_s)} yet, though idle: it was loaded a moment ago"
    return [
        ("unloads in", "" if model.idle_left_s is None else words.countdown(model.idle_left_s), ""),
        ("keep alive", _keep_alive(model), ""),
        ("pinned", f"yes{by}: never unloaded to make room" if model.pinned else "", ""),
        ("protected", protected if model.protected_s else "", ""),
        ("priority", f"{model.priority:+}" if model.priority else "", ""),
        ("tags", ", ".join(model.tags), ""),
    ]


def _keep_alive(model: ModelView) -> str:
    if model.pinned:
        return ""
    bounds = [f"no less than {words.duration(model.keep_alive_min_s)}"] if model.keep_alive_min_s else []
    longest = model.keep_alive_max_s
    bounds += [f"no more than {words.duration(longest)}"] if longest is not None and math.isfinite(longest) else []
    asked = f"; requests may ask {' and '.join(bounds)}" if bounds else ""
    return ("for ever" if math.isinf(model.keep_alive_s) else words.duration(model.keep_alive_s)) + asked


def _place(model: ModelView) -> list[Fact]:
    """Where it lies, and what it takes there against what was estimated."""
    facts: list[Fact] = [("memory", _memory(model.gpu_bytes, model.memory_bytes), "")]
    label = "lies on" if model.pid is not None else "would lie on"
    for index, share in enumerate(model.shares):
        facts.append((label if index == 0 else "", _share(share), ""))
    estimated = [share for share in model.shares if share.estimated_bytes is not None]
    if len(model.shares) > 1 and estimated:
        in_all = sum(share.estimated_bytes or 0 for share in estimated)
        measured = [share.measured_bytes for share in estimated if share.measured_bytes is not None]
        is_whole = len(measured) == len(estimated)  # some drivers do not say whose memory it is
        error = _error(in_all, sum(measured) if is_whole else None)
        facts.append(("estimated", f"{words.size(in_all)} in all{error}", ""))
    return facts


def _share(share: ShareView) -> str:
    """ "GPU 0: 33 layers, 18.2G (estimated 17.9G, -2%)"."""
    name = "RAM" if share.device == "ram" else f"GPU {share.device.removeprefix('gpu')}"
    layers = words.plural(share.layers, "layer") if share.layers else ""
    size = words.size(share.measured_bytes) if share.measured_bytes else ""
    estimate = ""
    if share.estimated_bytes:
        estimate = f"estimated {words.size(share.estimated_bytes)}{_error(share.estimated_bytes, share.measured_bytes)}"
    size = f"{size} ({estimate})" if size and estimate else size or estimate
    return f"{name}: {', '.join(filter(None, (layers, size)))}"


def _error(estimated: int, measured: int | None) -> str:
    return f", {estimated / measured - 1:+.0%}" if measured else ""


def _kind(model: ModelView) -> list[Fact]:
    kind = " ".join(part for part in (model.architecture, model.parameter_size, model.quantization) if part)
    process = f"pid {model.pid}, port {model.port}" if model.pid else model.url
    return [
        ("kind", kind, ""),
        ("can do", ", ".join(model.capabilities), ""),
        ("aliases", ", ".join(model.aliases), ""),
        ("file", model.path, ""),
        ("file size", words.size(model.file_bytes) if model.file_bytes else "", ""),
        ("found in", model.source, ""),
        ("engine", model.engine, ""),
        ("process", process if not model.replicas else "", ""),
        ("command", shlex.join(model.argv), ""),
    ]


def _recent(model: ModelView, snapshot: Snapshot) -> list[Fact]:
    recent = [request for request in snapshot.requests if request.model == model.name][:_RECENT]
    facts: list[Fact] = []
    for index, request in enumerate(recent):
        status, style = words.request_state(request)
        who = words.client(request)
        text = f"{status:<10} {words.clock(request.started_at)}  {who}  {words.duration(request.total_s)}"
        facts.append(("requests" if index == 0 else "", text, style))
    return facts


def _memory(gpu_bytes: int | None, memory_bytes: int | None) -> str:
    on_gpu = f"{words.size(gpu_bytes)} on GPU" if gpu_bytes else ""
    in_ram = f"{words.size(memory_bytes)} in RAM" if memory_bytes else ""
    return ", ".join(filter(None, (on_gpu, in_ram)))


def _whole(seconds: float) -> str:
    """Of an age or a countdown, whole seconds."""
    return words.duration(float(int(seconds))) if seconds >= 1 else "0s"


def _of_request(request: RequestView) -> list[Fact]:
    state, style = words.request_state(request)
    facts: list[Fact] = [("status", state, style)]
    if request.error:
        facts.append(("error", request.error, "bad-strong"))
    if request.stripped:
        facts.append(("left out", f"{request.stripped}: the engine cannot do that", "warn"))
    if request.truncated:
        facts.append(("truncated", f"{request.truncated}: the prompt was longer than the context", "warn"))
    if request.ignored:
        facts.append(("ignored", f"unknown options: {request.ignored}", "warn"))
    if request.waiting_for:
        left = f", about {words.duration(request.left_s)} yet" if request.left_s is not None else ""
        facts.append(("turn", f"number {request.position}{left}", "warn"))
        facts.append(("", request.waiting_for, "warn"))
    speed = words.rate(request.output_tokens_per_s)
    prompt = words.rate(request.prompt_tokens_per_s)
    cached = f", {request.cached_tokens} of them cached" if request.cached_tokens else ""
    known: list[tuple[str, str]] = [
        ("model", request.model),
        ("asked", f"{request.dialect} {request.endpoint}{', streamed' if request.stream else ''}"),
        ("client", words.client(request)),
        ("priority", f"{request.priority:+}" if request.priority else ""),
        ("program", request.user_agent),
        ("came at", words.clock(request.started_at)),
        ("", " "),
        ("in the queue", words.duration(request.queue_s)),
        ("loading", words.duration(request.load_s)),
        ("first token", words.duration(request.ttft_s)),
        ("in all", words.duration(request.total_s)),
        ("", " "),
        ("prompt", f"{words.tokens(request.prompt_tokens)} tokens{cached}, {prompt} tokens/s"),
        ("answer", f"{words.tokens(request.output_tokens)} tokens, {speed} tokens/s, {words.size(request.bytes_out)}"),
    ]
    return facts + [(label, text, "") for label, text in known if text]
