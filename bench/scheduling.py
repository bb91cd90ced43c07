"""What sharing the machine costs: a decision about many models and waiters, a cold request, a switch from one model to
another, and a thousand requests for more models than are loaded at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence

import aiohttp
import orjson
import psutil

from bench.client import OLLAMA_CHAT, QUESTION, ask_once, client, percentile, run
from bench.program import Program, answers, free_port, serving, until
from bench.rows import Effort, Row
from llamarunner.events import RunnerState
from llamarunner.runners.facts import Facts, Resident, Waiting
from llamarunner.runners.memory import Layer, Need
from llamarunner.runners.placement import RAM, Device
from llamarunner.runners.scheduler import decide

GIB = 1024**3
MODELS, WAITERS = 200, 1000
LOAD_S = 0.2
SHARED, TOGETHER = 5, 2  # models, and how many of them are loaded at once
CLIENTS, TOKENS, TOKEN_S = 48, 10, 0.004
MAX_WAIT_S = 1.0


def scheduling(program: Program, effort: Effort) -> Iterator[Row]:
    yield from _decisions(effort)
    yield from _switches(program, effort)
    yield from _sharing(program, effort)


# --- a decision -----------------------------------------------------------------------------------------------------


def _decisions(effort: Effort) -> Iterator[Row]:
    ram, gpus = Device(RAM, "RAM", 256 * GIB), [_gpu(number) for number in range(8)]
    machines: dict[str, list[Device]] = {
        "no memory facts": [], "RAM": [ram], "1 GPU": [ram, gpus[0]], "8 GPUs": [ram, *gpus]
    }  # fmt: skip
    for name, devices in machines.items():
        took: list[float] = []
        for seed in range(effort.decisions):
            facts = make_facts(devices, random.Random(seed))
            started = time.perf_counter()
            decide(facts)
            took.append(1000 * (time.perf_counter() - started))
        for percent in (50, 99):
            what = f"decision, {MODELS} models, {WAITERS:,} waiters, {name}: p{percent}"
            yield Row(what, percentile(took, percent), "ms", 1)


def make_facts(devices: Sequence[Device], dice: random.Random) -> Facts:
    """A machine that is full of models in all states, and a queue for the others."""
    needs = [_need(f"m{number}", dice) for number in range(MODELS)]
    free = {device.id: device.free_bytes for device in devices}
    residents: list[Resident] = []
    for need in needs[: MODELS // 5]:
        device = dice.choice([device.id for device in devices if device.id != RAM or len(devices) == 1] or [""])
        size = need.on_cpu() if device in (RAM, "") else sum(need.unit_sizes()) + need.on_each_gpu
        if device and free[device] < size:
            continue
        if device:
            free[device] -= size
        residents.append(_resident(need.model, {device: size} if device else {}, dice))
    there = {resident.model for resident in residents}
    waits = sorted(dice.uniform(900, 1000) for _ in range(WAITERS))
    first: dict[str, Waiting] = {}
    for since in waits:
        need = dice.choice(needs)
        if need.model not in there:
            first.setdefault(need.model, Waiting(need.model, since, need if devices else None))
    return Facts(
        1000, residents, tuple(first.values()), 60, max_loaded=0 if devices else len(residents), devices=devices
    )


def _gpu(number: int) -> Device:
    return Device(f"gpu{number}", f"GPU {number}", (24, 80, 16, 48)[number % 4] * GIB, uuid=f"GPU-{number}")


def _need(model: str, dice: random.Random) -> Need:
    size = int(dice.choice([0.5, 2, 4, 8, 18, 40]) * GIB)
    layers = dice.choice([24, 32, 48, 80])
    return Need(
        model=model, layers=(Layer(size // layers, 0, size // layers // 8),) * layers, input=size // 20,
        output=size // 20, cpu_weights=size, compute=GIB // 4, host_compute=GIB // 16, logits=0, process=GIB // 8,
        snapshots=0,
    )  # fmt: skip


def _resident(model: str, held: dict[str, int], dice: random.Random) -> Resident:
    state = dice.choice([RunnerState.READY] * 7 + [RunnerState.LOADING, RunnerState.DRAINING, RunnerState.STOPPING])
    is_busy = state is RunnerState.DRAINING or (state is RunnerState.READY and dice.random() < 0.5)
    is_idle = state is RunnerState.READY and not is_busy
    return Resident(
        model, state,
        leases=dice.randint(1, 4) if is_busy else 0,
        waiters=1 if state is RunnerState.LOADING else 0,
        pinned=dice.random() < 0.1,
        idle_since=dice.uniform(900, 1000) if is_idle else None,
        keep_alive_s=dice.choice([60, 300, 3600]),
        held=held,
    )  # fmt: skip


# --- a load ---------------------------------------------------------------------------------------------------------


def cold(program: Program, effort: Effort) -> Iterator[Row]:
    """A request for a model that is not loaded, beyond what its engine takes by itself."""
    program.tell_engine({"load_s": LOAD_S})
    alone, asked = list[float](), list[float]()
    with serving(program) as (process, _):
        for _ in range(effort.cold):
            alone.append(_start_engine(program))
            asked.append(run(lambda: ask_once(program.ollama, keep_alive=0)))
            until(lambda: not _has_engine(process), "end of the engine")
    yield Row("engine alone, start to first answer", 1000 * statistics.median(alone), "ms")
    added = statistics.median(asked) - statistics.median(alone)
    yield Row("cold request, beyond that", 1000 * added, "ms", 50)


def _switches(program: Program, effort: Effort) -> Iterator[Row]:
    """Where one model is loaded at once and idle, a request for another."""
    _configure(program, ("a", "b"), max_loaded=1, min_residency=0)  # no model is so new that it may not leave
    program.tell_engine({"load_s": LOAD_S})
    alone, asked = list[float](), list[float]()
    with serving(program):
        run(lambda: ask_once(program.ollama, model="a"))
        for number in range(2 * effort.cold):
            alone.append(_start_engine(program))
            model = "ba"[number % 2]
            asked.append(run(lambda model=model: ask_once(program.ollama, model=model)))  # type: ignore[misc]  # bound at once
    added = [1000 * (seconds - statistics.median(alone)) for seconds in asked]
    yield Row("switch from A to B, beyond B's own load: median", statistics.median(added), "ms", 100)
    yield Row("switch from A to B, beyond B's own load: longest", max(added), "ms")


def _start_engine(program: Program) -> float:
    """Seconds from the start of an engine of our own to the end of its first answer."""
    port, started = free_port(), time.perf_counter()
    argv = [str(program.engine), "--model", str(program.model), "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: answers(port, "/health"), "answer from the engine")
            run(lambda: ask_once(port))
            return time.perf_counter() - started
        finally:
            process.terminate()


def _has_engine(process: psutil.Process) -> bool:
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if any("fake_engine" in word for word in child.cmdline()):
                return True
    return False


def _configure(program: Program, models: Sequence[str], max_loaded: int, min_residency: float = 5) -> None:
    """More models on the same engine, in place of the one."""
    config = program.home / "config.toml"
    replaced = ("models.", "scheduler ")
    lines = [line for line in config.read_text().splitlines() if not line.startswith(replaced)]
    table = f'{{ path = "{program.model}", parallel = 4, keep_alive = "1h" }}'
    lines += [f"models.{name} = {table}" for name in models]
    waits = f"max_wait = {MAX_WAIT_S}, min_residency = {min_residency}"
    lines += [f"scheduler = {{ max_loaded = {max_loaded}, {waits}, max_queue = 5000 }}"]
    config.write_text("\n".join(lines) + "\n")


# --- many requests --------------------------------------------------------------------------------------------------


def _sharing(program: Program, effort: Effort) -> Iterator[Row]:
    """As many clients as there are go on asking for any of the models. Every answer is looked at."""
    names = [f"m{number}" for number in range(SHARED)]
    _configure(program, names, max_loaded=TOGETHER)
    program.tell_engine({"tokens": [" word"] * TOKENS, "delay_s": TOKEN_S, "load_s": LOAD_S})
    dice = random.Random(1)
    wanted = [dice.choice(names) for _ in range(effort.requests)]
    waits: list[float] = []
    cut: list[str] = []

    async def ask_for(model: str, session: aiohttp.ClientSession) -> None:
        started = time.perf_counter()
        async with session.post(
            f"http://127.0.0.1:{program.ollama}{OLLAMA_CHAT}", json={**QUESTION, "model": model}
        ) as response:
            first = await response.content.readline()
            waits.append(time.perf_counter() - started)
            lines = (first + await response.read()).splitlines()
        if response.status != 200 or not _is_whole(lines):
            cut.append(model)

    async def one_client(session: aiohttp.ClientSession) -> None:
        while wanted:
            await ask_for(wanted.pop(), session)

    async def all_clients() -> None:
        async with client() as session:
            await asyncio.gather(*(one_client(session) for _ in range(CLIENTS)))

    with serving(program):
        started = time.perf_counter()
        run(all_clients)
        took = time.perf_counter() - started
    what = f"{effort.requests:,} requests for {SHARED} models, {TOGETHER} at once"
    yield Row(f"{what}: lost", effort.requests - len(waits), "answers", 0)
    yield Row(f"{what}: cut", len(cut), "answers", 0)
    yield Row(f"{what}: took", took, "s")
    for percent in (50, 99):
        yield Row(f"{what}: first token, p{percent}", percentile(waits, percent), "s")
    # the turn of any model comes after those of the others, and each may keep its place for the longest wait
    turns = -(-(SHARED - 1) // TOGETHER)
    yield Row(f"{what}: first token, longest", max(waits), "s", turns * (MAX_WAIT_S + LOAD_S + 1))


def _is_whole(lines: Sequence[bytes]) -> bool:
    """All tokens and the end, each once."""
    events = [orjson.loads(line) for line in lines if line.strip()]
    said = "".join(event.get("message", {}).get("content", "") for event in events)
    return said == " word" * TOKENS and [bool(event.get("done")) for event in events].count(True) == 1
