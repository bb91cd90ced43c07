"""`make bench`: speed and size of the real program, on the scripted engine, against their budgets. One table.

For true figures the machine must be idle. What is compared (the engine asked directly, nginx) is measured in the same
run, in turn, so that ratios and differences hold on a slower machine too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import psutil

from bench.catalogue import catalogue
from bench.client import CHAT, OLLAMA_CHAT, alternate, ask, ask_once, client, knock, percentile, run, stream
from bench.downloads import downloads
from bench.nginx import nginx
from bench.program import Program, cpu_seconds, engine_of, prepare, serving
from bench.rows import QUICK, Effort, Row
from bench.scheduling import cold, scheduling
from tests.fakes.terminal import Terminal

MB = 1e6
STREAMS = 64


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--quick", action="store_true", help="only see that it works: the figures are rough")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {sorted(unknown)[0]}")
    effort = QUICK if options.quick else Effort()
    load = os.getloadavg()[0]
    rows: list[Row] = []
    for name in options.parts or PARTS:
        sys.stderr.write(f"bench: {name} ...\n")
        with tempfile.TemporaryDirectory(prefix="llamarunner-bench-") as folder:
            rows += PARTS[name](prepare(Path(folder)), effort)
    print_table(rows)
    over = sum(row.verdict == "OVER" for row in rows)
    print(
        f"\n{over} over budget; Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {load:.1f} at the start"
    )
    if load > 0.3:
        print("The machine was not idle: do not trust these figures.")
    return 0


def print_table(rows: list[Row]) -> None:
    table = [("what", "measured", "budget", ""), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    for number, line in enumerate(table):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths).rstrip())


def headless(program: Program, effort: Effort) -> Iterator[Row]:
    ready: list[float] = []
    for _ in range(effort.starts):
        with serving(program) as (process, seconds):
            ready.append(seconds)
    yield Row("headless: ready, median", statistics.median(ready), "s", 0.8)
    with serving(program) as (process, _):
        time.sleep(min(3.0, effort.rest_s))  # until what is done once is done: this is what rest looks like
        yield Row("headless: RSS", process.memory_info().rss / MB, "MB", 80)
        yield Row("headless: CPU at rest", 100 * _cpu_share(process, effort.rest_s), "%", 0.3)


def tui(program: Program, effort: Effort) -> Iterator[Row]:
    frames: list[float] = []
    for _ in range(effort.starts):
        with _terminal(program) as terminal:
            frames.append(terminal.wait_for("Models", 20))
    yield Row("TUI: first frame, median", statistics.median(frames), "s", 1.2)
    with _terminal(program) as terminal:
        terminal.wait_for("Models", 20)
        time.sleep(min(3.0, effort.rest_s))
        process, before = psutil.Process(terminal.process.pid), terminal.bytes_read
        share = _cpu_share(process, effort.rest_s)
        written = terminal.bytes_read - before
        yield Row("TUI: RSS", process.memory_info().rss / MB, "MB", 120)
        yield Row("TUI: CPU at rest", 100 * share, "%", 2)
        yield Row("TUI: to the terminal at rest", written / effort.rest_s / 1024, "KiB/s", 5)


def _terminal(program: Program) -> Terminal:
    return Terminal(program.argv, columns=120, rows=40, env=program.env)


def latency(program: Program, effort: Effort) -> Iterator[Row]:
    """One client, answers not streamed: what passing through the program adds."""
    program.tell_engine({"tokens": ["Hello", " there", "!"]})
    with serving(program) as (process, _):
        run(lambda: ask_once(program.lmstudio))
        port, key = engine_of(process)

        async def measure() -> list[list[float]]:
            async with client(key) as session:
                return await alternate(session, (port, program.lmstudio), effort.rounds)

        direct, through = run(measure)
    yield Row("engine asked directly, p50", 1000 * percentile(direct, 50), "ms")
    for percent, budget in ((50, 0.4), (99, 2.0)):
        added = percentile(through, percent) - percentile(direct, percent)
        yield Row(f"added latency, p{percent}", 1000 * added, "ms", budget)


def streams(program: Program, effort: Effort) -> Iterator[Row]:
    """Many answers streamed at once: the program and nginx on one core, engine and client on another."""
    token = {"choices": [{"finish_reason": None, "index": 0, "delta": {"content": " word"}}], "created": 1, "id": "c",
             "model": "m", "object": "chat.completion.chunk"}  # fmt: skip
    program.tell_engine({"raw": _events(token, effort.tokens)})
    cores = sorted(os.sched_getaffinity(0))
    ours, others = ({cores[0]}, set(cores[1:])) if len(cores) > 1 else (set(cores), set(cores))
    os.sched_setaffinity(0, others)
    try:
        with serving(program, ours) as (process, _):
            run(lambda: ask_once(program.lmstudio))
            upstream, key = engine_of(process)
            with nginx(program.home, upstream, ours) as other:
                yield from _compare_streams(program, effort, process, other, key)
    finally:
        os.sched_setaffinity(0, cores)


def _compare_streams(
    program: Program, effort: Effort, process: psutil.Process, other: tuple[int, psutil.Process] | None, key: str
) -> Iterator[Row]:
    ways = {"OpenAI": (program.lmstudio, CHAT, process), "Ollama": (program.ollama, OLLAMA_CHAT, process)}
    if other is not None:
        ways["nginx"] = (other[0], CHAT, other[1])
    rates: dict[str, list[float]] = {name: [] for name in ways}
    costs: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(effort.repeats + 1):
        for name, (port, path, worker) in ways.items():
            before = cpu_seconds(worker)
            _, seconds = run(lambda port=port, path=path: _stream(port, path, key))  # type: ignore[misc]  # bound at once
            if number:  # the first warms up
                rates[name].append(STREAMS * effort.tokens / seconds)
                costs[name].append((cpu_seconds(worker) - before) * 1e6 / STREAMS / effort.tokens)
    best = {name: max(series) for name, series in rates.items()}
    cost = {name: statistics.median(series) for name, series in costs.items()}
    for name in ways:
        yield Row(f"{STREAMS} streams, {name}: chunks", best[name], "/s")
        yield Row(f"{STREAMS} streams, {name}: CPU per chunk", cost[name], "µs")
    if "nginx" in ways:
        yield Row(f"{STREAMS} streams: chunks per second against nginx", best["OpenAI"] / best["nginx"], "x", 0.8, True)
    else:
        sys.stderr.write("bench: nginx is not installed: no comparison with it\n")
    yield Row("Ollama's dialect: CPU against OpenAI's", cost["Ollama"] / max(cost["OpenAI"], 1e-9), "x", 1.3)


def busy(program: Program, effort: Effort) -> Iterator[Row]:
    """32 streams at the speed of a quick model: whether the screen holds up those who ask meanwhile."""
    program.tell_engine({"tokens": [" word"] * int(effort.rest_s * 50), "delay_s": 0.02})

    async def measure() -> list[float]:
        async with client() as session:
            await ask(session, program.ollama, max_tokens=1)
            answers = asyncio.create_task(stream(session, program.ollama, CHAT, 32))
            took = await knock(session, program.ollama, answers)
            await answers
            return took

    with serving(program):
        headless_p99 = percentile(run(measure), 99)
    with _terminal(program) as terminal:
        terminal.wait_for("Models", 20)
        took = run(measure)
    yield Row("under 32 streams, headless: answers within, p99", 1000 * headless_p99, "ms")
    yield Row("under 32 streams, TUI: answers within, p99", 1000 * percentile(took, 99), "ms")
    yield Row("the one against the other", percentile(took, 99) / headless_p99, "x", 2)
    yield Row("under 32 streams, TUI: longest", 1000 * max(took), "ms", 25)


PARTS: dict[str, Callable[[Program, Effort], Iterator[Row]]] = {
    "headless": headless, "tui": tui, "latency": latency, "cold": cold, "streams": streams,
    "busy": busy, "scheduling": scheduling, "catalogue": catalogue, "downloads": downloads,
}  # fmt: skip


async def _stream(port: int, path: str, key: str) -> tuple[int, float]:
    async with client(key) as session:
        return await stream(session, port, path, STREAMS)


def _events(token: dict[str, object], count: int) -> dict[str, object]:
    """A whole stream for the engine to replay, an event a write. All events are of one length."""
    event = b"data: " + orjson.dumps(token) + b"\n\n"
    last = {**token, "choices": [{"finish_reason": "stop", "index": 0, "delta": {}}]}
    tail = b"data: " + orjson.dumps(last) + b"\n\ndata: [DONE]\n\n"
    return {"body": (event * count + tail).decode(), "chunk_bytes": len(event)}


def _cpu_share(process: psutil.Process, seconds: float) -> float:
    """Of one core, over so many seconds from now, its helpers included."""
    before, started = cpu_seconds(process, helpers=True), time.monotonic()
    time.sleep(seconds)
    return (cpu_seconds(process, helpers=True) - before) / (time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(main())
