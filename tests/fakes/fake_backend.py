"""A backend that serves scripted snapshots, for tests of the terminal and to see it without a model:

    python tests/fakes/fake_backend.py [SCENE] [--theme NAME] [--ascii] [--asyncio] [--beat FILE]

SCENE is busy, live, idle, cpu, empty, trouble, pulls or crash; `live` moves, `crash` raises in the third second, the
others stand still. With `--beat` the loop writes down every 100 ms how late it ran at worst, and after a lost screen
or a crash it goes on until SIGTERM, as the servers do.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from llamarunner.control.backend import Outcome
from llamarunner.control.snapshot import (
    GpuView,
    HostView,
    LogLine,
    LogPage,
    ModelView,
    ProxyView,
    PullState,
    PullView,
    ReplicaView,
    RequestPhase,
    RequestView,
    RunnerState,
    ShareView,
    Snapshot,
    UseView,
)

GIB = 1024**3
NOW = 1_790_000_000.0  # a fixed moment, so that pictures do not change

PROXIES = (
    ProxyView("ollama", "Ollama", True, True, "127.0.0.1", 11434),
    ProxyView("lmstudio", "LM Studio", True, True, "127.0.0.1", 1234),
)


def use(total: float, ours: float, others: float, reserve: float) -> UseView:
    """In GiB."""
    free = max(0.0, total - ours - others - reserve)
    return UseView(int(ours * GIB), int(others * GIB), int(reserve * GIB), int(free * GIB))


HOST = HostView(
    cpu=0.23, cores=32, load_1m=4.2, memory_used_bytes=41 * GIB, memory_total_bytes=128 * GIB,
    use=use(128, 2.0, 39, 2),
)  # fmt: skip
GPUS = (
    GpuView(0, "NVIDIA GeForce RTX 4090", int(18.2 * GIB), 24 * GIB, 0.87, 71, 312, 450, use=use(24, 17.4, 0.8, 0.5)),
    GpuView(1, "NVIDIA GeForce RTX 3090", int(9.4 * GIB), 24 * GIB, 0.34, 58, 164, 350, use=use(24, 3.1, 6.3, 0.5)),
)


def model(name: str, state: RunnerState = RunnerState.STOPPED, **more: object) -> ModelView:
    facts: dict[str, object] = {
        "path": f"/home/ada/models/{name}.gguf",
        "engine": "default",
        "source": "folder",
        "architecture": "qwen3",
        "parameter_size": "8.2B",
        "quantization": "Q4_K_M",
        "file_bytes": 5 * GIB,
        "capabilities": ("completion", "tools"),
    }
    return ModelView(name, state, **(facts | more))  # type: ignore[arg-type]  # the fields by name


def busy_models() -> tuple[ModelView, ...]:
    argv = ("llama-server", "--model", "/home/ada/models/qwen3-14b.gguf", "--port", "40213", "--ctx-size", "131072",
            "--parallel", "4", "--n-gpu-layers", "999", "--cache-type-k", "q8_0")  # fmt: skip
    return (
        model("qwen3-14b", RunnerState.READY, reason="asked for by a request", gpu_bytes=int(11.3 * GIB),
              memory_bytes=int(0.9 * GIB), context=32768, slots=4, in_flight=3, queued=1, tokens_per_s=58.4,
              state_s=421.0, load_s=6.8,
              activity=("slot 0: generating", "slot 1: generating", "slot 3: prompt 42 %"), pid=41822, port=40213,
              argv=argv, parameter_size="14.8B", aliases=("qwen",), pinned=True, pinned_by="chat", priority=2,
              tags=("chat", "large"), keep_alive_s=math.inf, demanded="context 32768",
              shares=(ShareView("gpu0", 38, int(11.0 * GIB), int(11.3 * GIB)),
                      ShareView("ram", 3, int(0.8 * GIB), int(0.9 * GIB)))),
        model("llama-3.2-3b-instruct", RunnerState.READY, gpu_bytes=int(6.2 * GIB), memory_bytes=int(0.4 * GIB),
              context=8192, slots=8, in_flight=1, tokens_per_s=142.7, state_s=95.0, load_s=2.1, pid=41901, port=40377,
              architecture="llama", parameter_size="3.2B", quantization="Q8_0", replica_count=3, keep_alive_s=300.0,
              keep_alive_min_s=60.0, keep_alive_max_s=3600.0, protected_s=3.0,
              replicas=(
                  ReplicaView("llama-3.2-3b-instruct", RunnerState.READY, "default", 41901, 40377, in_flight=1,
                              slots=4, gpu_bytes=int(3.1 * GIB), memory_bytes=int(0.2 * GIB),
                              activity=("slot 2: generating",)),
                  ReplicaView("llama-3.2-3b-instruct#2", RunnerState.READY, "default", 41950, 40391, slots=4,
                              gpu_bytes=int(3.1 * GIB), memory_bytes=int(0.2 * GIB), ejected_s=26.0),
                  ReplicaView("llama-3.2-3b-instruct#3", RunnerState.FAILED, "attic", url="http://192.168.1.9:8080",
                              problem="cannot reach http://192.168.1.9:8080: connection refused")),
              shares=(ShareView("gpu1", None, int(6.0 * GIB), int(6.2 * GIB)),
                      ShareView("ram", None, int(0.5 * GIB), int(0.4 * GIB)))),
        model("nomic-embed-text", RunnerState.READY, memory_bytes=int(0.3 * GIB), context=2048, slots=2, state_s=600.0,
              load_s=0.6, idle_left_s=187.0, architecture="nomic-bert", parameter_size="137M", quantization="F16",
              capabilities=("embedding",)),
        model("gemma-3-27b-it", RunnerState.LOADING, reason="asked for by 127.0.0.1:52114", queued=2, state_s=8.4,
              progress=0.43, architecture="gemma3", parameter_size="27B", file_bytes=16 * GIB),
        model("mistral-small-24b", RunnerState.FAILED, reason="out of memory", state_s=31.0, architecture="llama",
              problem="the engine ran out of GPU memory while loading: needs 15.1 GiB, 5.8 GiB are free",
              hint="set a smaller context, or fewer gpu_layers", parameter_size="24B", file_bytes=14 * GIB,
              failures=6, retry_s=240.0, left_alone=True),
        model("通义千问 7b 🦙/chat", architecture="qwen2", parameter_size="7.6B", source="ollama"),
    )  # fmt: skip


def request(number: int, phase: RequestPhase, name: str, **more: object) -> RequestView:
    facts: dict[str, object] = {
        "dialect": "ollama" if number % 2 else "lmstudio",
        "endpoint": "/api/chat" if number % 2 else "/v1/chat/completions",
        "client": f"127.0.0.1:5{2100 + number}",
        "model": name,
        "phase": phase,
        "started_at": NOW - number * 7.0,
        "stream": True,
        "user_agent": "ollama-python/0.6.1" if number % 2 else "OpenAI/Python 2.8.0",
    }
    return RequestView(request_id=1000 - number, **(facts | more))  # type: ignore[arg-type]  # the fields by name


def busy_requests() -> tuple[RequestView, ...]:
    live, done = RequestPhase.STREAMING, RequestPhase.DONE
    return (
        request(1, live, "qwen3-14b", ttft_s=0.31, total_s=7.2, prompt_tokens=1840, output_tokens=402,
                output_tokens_per_s=58.4, status=200, queue_s=0.0, prompt_tokens_per_s=5900.0),
        request(2, live, "qwen3-14b", ttft_s=0.44, total_s=4.1, prompt_tokens=212, output_tokens=188,
                output_tokens_per_s=51.0, status=200, queue_s=0.0, client="192.168.1.44:50233", client_name="ada",
                priority=5),
        request(3, live, "llama-3.2-3b-instruct", ttft_s=0.09, total_s=1.4, prompt_tokens=96, output_tokens=171,
                output_tokens_per_s=142.7, status=200, queue_s=0.0),
        request(4, RequestPhase.PROMPT, "qwen3-14b", total_s=0.6, queue_s=0.0, client="192.168.1.44:50240"),
        request(5, RequestPhase.LOADING, "gemma-3-27b-it", total_s=8.4, queue_s=0.2, load_s=8.2),
        request(6, RequestPhase.QUEUED, "gemma-3-27b-it", total_s=2.9, queue_s=2.9, client="192.168.1.50:41022",
                client_name="batch", priority=-5, position=2, waiting_for="loading gemma-3-27b-it", left_s=11.0),
        request(7, done, "nomic-embed-text", total_s=0.018, ttft_s=0.017, prompt_tokens=512, status=200,
                endpoint="/v1/embeddings", stream=False),
        request(8, done, "qwen3-14b", ttft_s=0.28, total_s=21.6, prompt_tokens=3120, output_tokens=1204,
                output_tokens_per_s=56.1, status=200, cached_tokens=2900, ignored="num_cxt"),
        request(9, RequestPhase.CANCELLED, "qwen3-14b", ttft_s=0.35, total_s=3.0, prompt_tokens=77, output_tokens=120,
                output_tokens_per_s=45.2),
        request(10, RequestPhase.FAILED, "mistral-small-24b", total_s=4.4, load_s=4.4, status=500,
                error="the engine ran out of GPU memory while loading"),
    )  # fmt: skip


LOG = (
    ("info", "LlamaRunner 0.1.0 serves Ollama on 127.0.0.1:11434 and LM Studio on 127.0.0.1:1234"),
    ("info", "found 6 models: 4 in /home/ada/models, 2 in the store of Ollama"),
    ("info", "qwen3-14b: stopped -> starting: asked for by 127.0.0.1:52108"),
    ("info", "qwen3-14b: ready after 6.8s on port 40213"),
    ("info", "nomic-embed-text: ready after 0.6s on port 40291"),
    ("warning", "mistral-small-24b: estimated at 15.1 GiB, 5.8 GiB are free on GPU 0"),
    ("error", "mistral-small-24b: failed: the engine ran out of GPU memory while loading (exit code 1)"),
    ("info", "llama-3.2-3b-instruct: ready after 2.1s on port 40377"),
    ("info", "gemma-3-27b-it: stopped -> starting: asked for by 127.0.0.1:52105"),
    ("debug", "gemma-3-27b-it: load_tensors: offloading 62 layers to GPU [=====>    ]"),
    ("info", "POST /v1/chat/completions 200 21.6s qwen3-14b 3120→1204 tokens"),
)


def pulls() -> tuple[PullView, ...]:
    """One in each state."""
    return (
        PullView("llama3.2:1b", PullState.RUNNING, "pulling 74701a8c35f6", int(0.57 * GIB), int(1.32 * GIB),
                 48.3 * 2**20, 16.0),
        PullView("hf.co/bartowski/Qwen2.5-Coder-32B-Instruct-GGUF:Q4_K_M", PullState.WAITING, "pulling manifest"),
        PullView("gemma3:27b", PullState.FAILED, "pulling manifest", ended_at=NOW - 40, hint="see `ollama.com/library`",
                 problem="gemma3:27b was not found in registry.ollama.ai: pull model manifest: file does not exist"),
        PullView("nomic-embed-text", PullState.DONE, "success", 274 * 2**20, 274 * 2**20, ended_at=NOW - 12),
        PullView("qwen3:4b", PullState.CANCELLED, "pulling manifest", ended_at=NOW - 9000),
    )  # fmt: skip


def scene(name: str) -> Snapshot:
    base = Snapshot(
        taken_at=NOW,
        version="0.1.0",
        started_at=NOW - 11_640,
        profile="",
        config_path="/home/ada/.config/llamarunner/config.toml",
        proxies=PROXIES,
        host=HOST,
        gpus=GPUS,
        revisions={"models": 1, "hardware": 1, "requests": 1, "proxies": 1, "logs": 1},
    )
    sources = ("llamarunner", "qwen3-14b", "llama-3.2-3b-instruct", "nomic-embed-text")
    match name:
        case "busy" | "live" | "crash":
            return replace(
                base, models=busy_models(), requests=busy_requests(), tokens_per_s=252.1, log_sources=sources
            )
        case "idle":
            resting = [replace(m, in_flight=0, queued=0, idle_left_s=250.0) for m in busy_models()[:3]]
            return replace(base, models=(*resting, busy_models()[5]), requests=busy_requests()[6:], log_sources=sources)
        case "cpu":
            host = replace(HOST, cpu=0.61, cores=2, memory_total_bytes=8 * GIB, memory_used_bytes=3 * GIB,
                           use=use(8, 0, 3, 1), gpu_note="no NVIDIA driver was found")  # fmt: skip
            return replace(base, models=(model("smollm2-135m"),), gpus=(), host=host)
        case "empty":
            return replace(base, gpus=(), host=replace(HOST, gpu_note="no NVIDIA driver was found"))
        case "pulls":
            return replace(scene("busy"), pulls=pulls())
        case "trouble":
            taken = replace(PROXIES[0], running=False, problem="127.0.0.1:11434 is taken by ollama (pid 812)",
                            hint="stop it, or set another port")  # fmt: skip
            return replace(scene("busy"), proxies=(taken, PROXIES[1]))
        case _:
            raise ValueError(f"there is no scene '{name}'")


@dataclass
class FakeBackend:
    """Serves `current`, after `script` had a look at it; does what it is told to models."""

    current: Snapshot
    script: Callable[[Snapshot, int], Snapshot] | None = None
    pulls: int = 0
    commands: list[tuple[str, str]] = field(default_factory=list)
    lines: dict[str, list[LogLine]] = field(default_factory=dict)
    answer: Outcome | None = None  # given to every command instead of doing it
    gate: asyncio.Event | None = None  # commands wait for it

    @classmethod
    def of(cls, name: str) -> FakeBackend:
        backend = cls(scene(name), script={"live": live, "crash": crash}.get(name))
        if name != "empty":
            for level, text in LOG:
                backend.log("llamarunner", text, level)
            for index in range(40):
                backend.log(
                    "qwen3-14b", f"slot {index % 4} | task {1200 + index} | n_decoded = {index * 17}, tg = 58.4 t/s"
                )
        return backend

    def snapshot(self) -> Snapshot:
        self.pulls += 1
        if self.script is not None:
            self.current = self.script(self.current, self.pulls)
        return self.current

    def log(self, source: str, text: str, level: str = "info") -> None:
        lines = self.lines.setdefault(source, [])
        number = lines[-1].number + 1 if lines else 1
        lines.append(LogLine(number, NOW + number * 1.7, text, level))
        del lines[:-4000]

    def logs(self, source: str, after: int = 0, limit: int = 500) -> LogPage:
        newer = [line for line in self.lines.get(source, []) if line.number > after]
        shown = newer[-limit:]
        return LogPage(tuple(shown), shown[0].number - after - 1 if shown else 0)

    def change(self, name: str, **changes: object) -> None:
        models = tuple(replace(m, **changes) if m.name == name else m for m in self.current.models)  # type: ignore[arg-type]
        self.current = replace(self.current, models=models)

    async def load(self, model: str) -> Outcome:
        self.commands.append(("load", model))
        if self.gate is not None:
            await self.gate.wait()
        if self.answer is not None:
            return self.answer
        self.change(model, state=RunnerState.READY, slots=4, context=8192, idle_left_s=math.inf, problem="", hint="",
                    failures=0, retry_s=0.0, left_alone=False)  # fmt: skip
        return Outcome(True, "loaded")

    async def unload(self, model: str, *, force: bool = False) -> Outcome:
        self.commands.append(("unload now" if force else "unload", model))
        if self.gate is not None:
            await self.gate.wait()
        if self.answer is not None:
            return self.answer
        self.change(model, state=RunnerState.STOPPED, in_flight=0, slots=None, idle_left_s=None)
        return Outcome(True, "unloaded")

    async def start_pull(self, model: str) -> Outcome:
        self.commands.append(("pull", model))
        if self.answer is not None:
            return self.answer
        pulls = (PullView(model, PullState.RUNNING, "pulling manifest"), *self.current.pulls)
        self.current = replace(self.current, pulls=pulls)
        return Outcome(True, f"{model} is being downloaded")

    async def cancel_pull(self, model: str) -> Outcome:
        self.commands.append(("cancel pull", model))
        if self.answer is not None:
            return self.answer
        pulls = tuple(
            replace(pull, state=PullState.CANCELLED, ended_at=NOW) if pull.name == model else pull
            for pull in self.current.pulls
        )
        self.current = replace(self.current, pulls=pulls)
        return Outcome(True, f"the download of {model} was cancelled")


def live(snapshot: Snapshot, step: int) -> Snapshot:
    """One second later on a busy machine."""
    gpus = tuple(
        replace(gpu, utilization=0.5 + 0.4 * math.sin(step / 5 + gpu.index), power_w=200 + 90 * math.sin(step / 4),
                temperature_c=60 + 8 * math.sin(step / 20))
        for gpu in snapshot.gpus
    )  # fmt: skip
    requests = tuple(
        replace(r, total_s=r.total_s + 1, output_tokens=(r.output_tokens or 0) + 50)
        if r.phase is RequestPhase.STREAMING
        else r
        for r in snapshot.requests
    )
    models = tuple(
        replace(m, idle_left_s=max(0.0, m.idle_left_s - 1), state_s=m.state_s + 1) if m.idle_left_s else m
        for m in snapshot.models
    )
    return replace(
        snapshot,
        taken_at=snapshot.taken_at + 1,
        gpus=gpus,
        requests=requests,
        models=models,
        tokens_per_s=252 + 30 * math.sin(step / 3),
        host=replace(snapshot.host, cpu=0.3 + 0.1 * math.sin(step)),
    )


def crash(snapshot: Snapshot, step: int) -> Snapshot:
    api_key = "sk-a-secret-of-somebody"
    if step > 3:
        raise RuntimeError(f"the snapshot could not be made with a key of {len(api_key)} characters")
    return snapshot


async def beat(path: Path) -> None:
    """Write down how many milliseconds too late the loop came round, the worst of each 100 ms."""
    with path.open("w", buffering=1) as file:
        while True:
            worst = 0.0
            for _ in range(5):
                before = time.perf_counter()
                await asyncio.sleep(0.02)
                worst = max(worst, time.perf_counter() - before - 0.02)
            file.write(f"{worst * 1000:.1f}\n")


def main(arguments: list[str]) -> None:
    """Run the control center on a scene, as the command line does with a real backend."""
    import signal

    from tui.environment import prepare
    from tui.settings import ControlCenterSettings

    def option(name: str, default: str) -> str:
        return arguments[arguments.index(name) + 1] if name in arguments else default

    settings = ControlCenterSettings(theme=option("--theme", "llamarunner"), ascii="--ascii" in arguments)
    prepare(settings)
    from tui.app import ControlCenter

    named = arguments[0] if arguments and not arguments[0].startswith("-") else "busy"
    path = option("--beat", "")

    async def run() -> None:
        backend = FakeBackend.of(named)
        app = ControlCenter(backend, settings)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, app.drop_screen)
        loop.add_signal_handler(signal.SIGTERM, app.leave, "quit")
        heart = loop.create_task(beat(Path(path))) if path else None
        await app.run_async(mouse=settings.mouse)
        if heart is not None:
            Path(path).with_suffix(".outcome").write_text(f"{app.outcome}\n{app.crash}")
            if app.outcome != "quit":
                stop = asyncio.Event()
                loop.add_signal_handler(signal.SIGTERM, stop.set)
                await stop.wait()
            heart.cancel()
        if app.outcome != "detach" or not path:  # else nobody may be there any more
            print(f"outcome: {app.outcome}")

    if "--asyncio" in arguments:
        asyncio.run(run())
    else:
        import uvloop

        uvloop.run(run())


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])
    main(sys.argv[1:])
