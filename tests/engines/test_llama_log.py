"""The log of llama.cpp, of its builds since 2024 and of its forks: `logs/*.log` and beside each what it tells.

The xllamacpp logs are recordings; the others hold the lines that those builds print, brought together from many.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamarunner.engines import builtin, builtin_worker
from llamarunner.engines.llama_log import LogReader
from llamarunner.engines.log_events import (
    MAX_SLOTS,
    Activity,
    BufferSize,
    ContextInfo,
    Device,
    Fatal,
    Loaded,
    LoadProgress,
    LoadStarted,
    LogEvent,
    OffloadedLayers,
    SlotGenerating,
    SlotPhase,
    SlotPrompt,
    SlotReleased,
    SlotTimings,
    Truncated,
)

LOGS = sorted((Path(__file__).parent / "logs").glob("*.log"))
MIB = 1024**2

# What a line must hold, at least, to be taken for the end of a load or of the engine.
LOADED_WORDS = ("model loaded", "all slots are idle", "server is listening", "cmd_child_to_router:")
FATAL_WORDS = (
    "error",
    "panic: ",
    "failed to ",
    "exiting due to",
    "couldn't bind",
    "GGML_ASSERT",
    "terminat",
    "Segmentation fault",
    "Illegal instruction",
    "unable to load model",
)


def lines_of(name: str) -> list[str]:
    return next(path for path in LOGS if path.stem == name).read_text(encoding="utf-8").splitlines()


def read(lines: Iterable[str]) -> list[LogEvent]:
    reader = LogReader()
    return [event for line in lines for event in reader.feed(line)]


def activity(events: Iterable[LogEvent]) -> Activity:
    view = Activity()
    for event in events:
        view = view.after(event)
    return view


def buffers(events: Iterable[LogEvent]) -> dict[tuple[str, str, str], int]:
    """As the events mean it: a later one replaces, a new load forgets."""
    known: dict[tuple[str, str, str], int] = {}
    for event in events:
        match event:
            case LoadStarted():
                known.clear()
            case BufferSize(component, device, kind, size):
                known[component, device, kind] = size
    return known


def on_gpu(events: list[LogEvent]) -> dict[str, int]:
    """MiB for each GPU."""
    sums: dict[str, int] = {}
    for (component, device, kind), size in buffers(events).items():
        if gpu := BufferSize(component, device, kind, size).gpu:
            sums[gpu] = sums.get(gpu, 0) + size
    return {gpu: round(size / MIB) for gpu, size in sums.items()}


# --- the corpus --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_what_each_log_tells(path: Path) -> None:
    expected = json.loads(path.with_suffix(".json").read_text())
    told = [[type(event).__name__, *dataclasses.astuple(event)] for event in read(lines_of(path.stem))]
    assert told == expected


@pytest.mark.parametrize(
    ("name", "gpus", "layers", "context"),
    [
        ("llama.cpp-2024-01", {"CUDA0": 3848 + 160 + 108}, (33, 33), ContextInfo(512, 1)),
        ("llama.cpp-2024-12", {"CUDA0": 31000 + 180 + 320, "CUDA1": 30500 + 172}, (80, 89), ContextInfo(2048, 1)),
        (
            "llama.cpp-2025-04-draft",  # the model, the draft model and its two contexts
            {"ROCm0": 18508 + 1024 + 307 + 500 + 2 * 6 + 2 * 298 + 1},
            (25, 25),
            ContextInfo(8192, 1),
        ),
        ("llama.cpp-2025-12", {}, (27, 27), ContextInfo(8192, 4)),
        ("llama.cpp-2026-05-router", {"CUDA0": 9000 + 640 + 125 + 501 + 25}, (41, 41), ContextInfo(65536, 1)),
        ("ik_llama.cpp-2025-05", {"CUDA0": 12061 + 1167 + 8470, "CUDA1": 11307}, (62, 62), ContextInfo(32768, 1)),
        ("xllamacpp-2026-10-verbose", {}, None, ContextInfo(2048, 2)),
    ],
)
def test_a_load(name: str, gpus: dict[str, int], layers: tuple[int, int] | None, context: ContextInfo) -> None:
    events = read(lines_of(name))
    assert on_gpu(events) == pytest.approx(gpus, abs=2)
    offloaded = [(event.done, event.total) for event in events if isinstance(event, OffloadedLayers)]
    assert (offloaded[-1] if offloaded else None) == layers
    assert [event for event in events if isinstance(event, ContextInfo)][-1] == context
    assert events.count(Loaded()) == 1
    assert not any(isinstance(event, Fatal) for event in events)


def test_both_caches_of_a_model_with_a_sliding_window_count() -> None:
    known = buffers(read(lines_of("llama.cpp-2025-12")))
    assert sum(size for (_, _, kind), size in known.items() if kind == "KV") == 2 * 416 * MIB


def test_the_files_of_a_split_model_add_up() -> None:
    known = buffers(read(lines_of("llama.cpp-2024-12")))
    mapped = known["llm_load_tensors", "CPU_Mapped", "model"]
    assert mapped / MIB == pytest.approx(22722.80 + 22813.64 + 12113.72, abs=0.01)


def test_what_is_told_while_trying_parameters_does_not_count() -> None:
    known = buffers(read(lines_of("xllamacpp-2026-10-debug")))
    assert ("load_tensors", "CPU", "model") not in known
    assert known["load_tensors", "CPU_Mapped", "model"] / MIB == pytest.approx(92.10)


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_progress_never_goes_back(path: Path) -> None:
    load = 0.0
    prompts: dict[tuple[int, int], tuple[int, float]] = {}
    for event in read(lines_of(path.stem)):
        match event:
            case LoadStarted():
                load = 0.0
            case LoadProgress():
                assert load <= event.fraction <= 1
                load = event.fraction
            case SlotPrompt():
                done, fraction = prompts.get((event.slot, event.task), (0, 0.0))
                now = event.fraction or 0.0
                assert done <= event.done_tokens
                assert fraction <= now <= 1
                prompts[event.slot, event.task] = event.done_tokens, now


@pytest.mark.parametrize("path", [path for path in LOGS if not path.stem.startswith("failure")], ids=lambda p: p.stem)
def test_at_the_end_every_slot_is_idle(path: Path) -> None:
    assert all(view.phase is SlotPhase.IDLE for view in activity(read(lines_of(path.stem))).slots)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("failure-argument-2025", "error: invalid argument: --no-such-flag"),
        ("failure-out-of-memory-2025", "llama_model_load: error loading model: unable to allocate CUDA0 buffer"),
        ("failure-ik-2025", "llama_model_load: error loading model: unknown model architecture: 'foo'"),
        ("failure-abort-2026", "CUDA error: out of memory"),
        ("failure-recovered-2025", None),
    ],
)
def test_how_an_engine_fails(name: str, first: str | None) -> None:
    fatal = [event.text for event in read(lines_of(name)) if isinstance(event, Fatal)]
    assert (fatal[0] if fatal else None) == first


def test_a_row_of_dots_may_be_read_while_it_grows() -> None:
    reader = LogReader()
    reader.feed("load_tensors: loading model tensors, this can take a while... (mmap = true)")
    fractions = [event.fraction for n in (2, 10, 10, 55, 100) for event in reader.feed("." * n)]  # type: ignore[union-attr]
    assert fractions == [0.02, 0.1, 0.55, 1.0]


def test_a_model_that_wakes_up_is_loaded_again() -> None:
    reader = LogReader()
    lines = lines_of("xllamacpp-2026-10-verbose")
    once = [event for line in lines for event in reader.feed(line)]
    again = [event for line in lines for event in reader.feed(line)]
    assert again == [event for event in once if not isinstance(event, Device)]  # told before the load


# --- lines that are not known --------------------------------------------------------------------------------------

_WORDS = """
slot srv main: id 0 | task 7 -1 INFO [ ] { } error: model loaded buffer size = MiB print_timing: \u0661 nan inf
99999999999999999999 release: stop processing truncated progress prompt eval time ms / tokens CUDA0 . .. 1e9
cmd_child_to_router:state:
"""
_words = st.sampled_from(_WORDS.split())
_text = st.one_of(st.text(max_size=200), st.lists(_words, max_size=25).map(" ".join))


def _mutated(draw: st.DrawFn) -> str:
    """A line of the corpus, with parts of it cut, doubled, or replaced."""
    lines = lines_of(draw(st.sampled_from([path.stem for path in LOGS])))
    line = draw(st.sampled_from(lines))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(line)))
        end = draw(st.integers(start, len(line)))
        line = line[:start] + draw(st.one_of(st.just(""), st.just(line[start:end] * 2), _text)) + line[end:]
    return line


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(_text, st.composite(_mutated)()), max_size=30))
def test_no_line_raises_and_none_is_loaded_or_fatal_without_saying_so(lines: list[str]) -> None:
    reader, view = LogReader(), Activity()
    for line in lines:
        for event in reader.feed(line):
            if isinstance(event, Loaded):
                assert any(word in line for word in LOADED_WORDS)
            if isinstance(event, Fatal):
                assert any(word in line for word in FATAL_WORDS)
            view = view.after(event)
            assert all(isinstance(each.label, str) for each in view.slots)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([path.stem for path in LOGS]), st.randoms(use_true_random=False))
def test_unknown_lines_in_between_change_nothing(name: str, chance: random.Random) -> None:
    unknown = (
        "",
        "hello",
        "   ",
        "0.00.738.014 D que    start_loop: update slots",
        "I think that the model loaded well",
        '{"role": "user", "content": "slot is processing task"}',
        "ggml_cuda_init: found 1 CUDA devices:",
        "srv  log_server_r: done request: GET /health 127.0.0.1 200",
        "0.00.738.015 I slot get_availabl: id  0 | task -1 |  - checking sim = 0.667 (24/36) > 0.100",
    )
    lines: list[str] = []
    for line in lines_of(name):
        lines += chance.choices(unknown, k=chance.randint(0, 2))
        lines.append(line)
    assert read(lines) == read(lines_of(name))


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("before", ["> ", "user: ", '"', "the engine said: ", "\u200b"])
def test_a_line_quoted_in_another_is_not_one(path: Path, before: str) -> None:
    assert read(before + line for line in lines_of(path.stem) if line.strip()) == []


@pytest.mark.parametrize(
    "line",
    [
        "E srv    send_error: task id = 39, error: request (3031 tokens) exceeds the available context size",
        "W srv          stop: cancel task, id_task = 39",
        "srv    operator(): http client error: Connection handling canceled",
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 2048.00 MiB on device 0: cudaMalloc failed",
        "llama_init_from_model: n_ctx         = 512",
        "main: HTTP server is listening, hostname: 127.0.0.1, port: 8080, http threads: 7",
        "main: router server is listening on http://127.0.0.1:8080",
        'INFO [                    main] HTTP server listening | tid="1" timestamp=1 port="8080"',
        "load_tensors: tensor 'token_embd.weight' cannot be used with preferred buffer type CPU_AARCH64, using CPU",
    ],
)
def test_lines_that_only_look_like_an_end(line: str) -> None:
    assert read([line]) == []


def test_after_the_load_an_error_of_a_request_is_not_fatal() -> None:
    assert read(["main: model loaded", "error: bad grammar", "srv  load_model: failed to load model"]) == [Loaded()]


# --- slots ---------------------------------------------------------------------------------------------------------


def transcript(slot: int, task: int, total: int) -> list[str]:
    at = f"id  {slot} | task {task} |"
    prompt = f"7568.41 ms / {total:5d} tokens ( 6.15 ms per token, 162.65 tokens per second)"
    answer = f" 381.24 ms / {task + 1:5d} tokens ( 3.46 ms per token,  28.85 tokens per second)"
    return [
        f"0.01.000.000 I slot launch_slot_: {at} processing task, is_child = 0",
        f"0.01.000.001 I slot   operator(): {at} new prompt, n_ctx_slot = 2048, n_keep = 0, task.n_tokens = {total}",
        f"0.01.000.002 I slot print_timing: {at} prompt processing, n_tokens = {total // 2:6d}, progress = 0.50",
        f"0.01.000.003 I slot init_sampler: {at} init sampler, took 0.14 ms, tokens: text = {total}, total = {total}",
        f"0.01.000.004 I slot print_timing: {at} n_decoded =    102, tg =  11.77 t/s",
        f"0.01.000.005 I slot print_timing: {at} prompt eval time = {prompt}",
        f"0.01.000.006 I slot print_timing: {at}        eval time = {answer}",
        f"0.01.000.007 I slot print_timing: {at}       total time = 7949.64 ms / {total:5d} tokens",
        f"0.01.000.008 I slot      release: {at} stop processing: n_tokens = {total}, truncated = {task % 2}",
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(2, 4000)), min_size=1, max_size=8), st.randoms())
def test_interleaved_slots_keep_apart(requests: list[tuple[int, int]], chance: random.Random) -> None:
    """Whatever the order in which the slots' lines come, each slot tells what it would tell alone."""
    queues: dict[int, list[str]] = {}
    for task, (slot, total) in enumerate(requests):
        queues.setdefault(slot, []).extend(transcript(slot, task, total))
    alone = {slot: read(lines) for slot, lines in queues.items()}
    mixed = []
    while waiting := [slot for slot, lines in queues.items() if lines]:
        mixed.append(queues[chance.choice(waiting)].pop(0))
    together = read(mixed)
    for slot, events in alone.items():
        assert [event for event in together if event.slot == slot] == events  # type: ignore[union-attr]


def test_one_request_as_a_person_sees_it() -> None:
    labels = []
    view, reader = Activity().after(ContextInfo(2048, 2)), LogReader()
    for line in transcript(1, 4, 1000):
        for event in reader.feed(line):
            view = view.after(event)
        labels.append(view.slots[1].label)
    assert labels == ["prompt", "prompt 0 %", "prompt 50 %", *["generating"] * 5, "idle"]
    assert view.slots[0] == Activity().after(ContextInfo(2048, 1)).slots[0]
    assert view.slots[1].output_tokens == 5
    assert view.slots[1].output_tokens_per_s == 28.85


def test_a_log_that_begins_in_the_middle() -> None:
    lines = transcript(0, 7, 100)
    assert read(lines[2:3]) == [SlotPrompt(0, 7, 50, None, 0.5)]
    assert read(lines[4:5]) == [SlotGenerating(0, 7, 102, 11.77)]
    assert read(lines[8:]) == [Truncated(0, 7), SlotReleased(0, 7)]


def test_a_figure_that_goes_back_is_not_told() -> None:
    """Builds count with and without the tokens from the cache, in turns."""
    lines = [line.replace("launch_slot_", "get_available") for line in transcript(0, 7, 100)[1:3]]
    again = "slot update_slots: id  0 | task 7 | prompt processing progress, n_tokens = 30, progress = 0.3"
    assert read([*lines, again])[-1] == SlotPrompt(0, 7, 50, 100, 0.5)


def test_a_task_whose_launch_was_not_told() -> None:
    done = "slot update_slots: id  0 | task 8 | prompt processing progress, n_tokens = 3, progress = 0.3"
    assert read([*transcript(0, 7, 100)[:5], done])[-1] == SlotPrompt(0, 8, 3, None, 0.3)


def test_a_second_model_and_context_are_counted_beside_the_first() -> None:
    """Also where nothing but the sizes is told."""
    one = [
        "load_tensors: CUDA0 model buffer size = 8.00 MiB",
        "llama_kv_cache: CUDA0 KV buffer size = 4.00 MiB",
        "llama_context: CUDA0 compute buffer size = 2.00 MiB",
    ]
    assert on_gpu(read([*one, *one])) == {"CUDA0": 28}
    assert on_gpu(read([one[0], one[2], one[0], one[2]])) == {"CUDA0": 20}
    assert on_gpu(read([*one, one[2]])) == {"CUDA0": 14}  # measured once more, for the same context


def test_timings_that_nothing_names_a_slot_for_belong_to_the_only_busy_one() -> None:
    timings = [
        "print_timings: prompt eval time = 232.47 ms / 492 tokens ( 0.47 ms per token, 2116.38 tokens per second)",
        "print_timings:       total time = 232.47 ms",
    ]
    one = ["slot 2 is processing [task id: 5]"]
    assert read([*one, *timings])[-1] == SlotTimings(2, 5, 492, 2116.38)
    two = [*one, "slot 3 is processing [task id: 6]"]
    assert not any(isinstance(event, SlotTimings) for event in read([*two, *timings]))


def test_rates_that_are_no_numbers() -> None:
    at = "slot print_timing: id  0 | task 1 |"
    lines = [
        f"{at} prompt eval time =    0.00 ms /     0 tokens (    -nan ms per token,     -nan tokens per second)",
        f"{at}        eval time =    0.00 ms /     1 tokens (    0.00 ms per token,      inf tokens per second)",
        f"{at}       total time =    0.00 ms /     1 tokens",
    ]
    assert read(lines) == [SlotTimings(0, 1, 0, None, 1, None)]


# --- activity ------------------------------------------------------------------------------------------------------


def test_what_comes_late_does_not_disturb_the_next_task() -> None:
    view = activity([SlotPrompt(0, 1), SlotReleased(0, 1), SlotPrompt(0, 2, 10, 100, 0.1)])
    assert view.after(SlotReleased(0, 1)) is view
    assert view.after(SlotTimings(0, 1, 5, 1.0, 5, 1.0)) is view
    assert view.slots[0].label == "prompt 10 %"


def test_events_of_no_slot_change_nothing() -> None:
    view = activity([SlotPrompt(0, 1)])
    for event in (Loaded(), Fatal("x"), LoadProgress(0.5, "text_model"), Truncated(0, 1), SlotTimings(-1, -1, 1, 1.0)):
        assert view.after(event) is view
    assert view.after(LoadStarted()) == Activity()


def test_activity_and_reader_do_not_grow() -> None:
    reader, view = LogReader(), Activity()
    sizes = []
    for number in range(8_000):
        for line in (
            f"slot launch_slot_: id  {number % 500} | task {number} | processing task",
            f"load_tensors:   CUDA{number} model buffer size = 1.00 MiB",
            f"unknown_{number}: line",
        ):
            for event in reader.feed(line):
                view = view.after(event)
        if number in (1_000, 7_999):
            sizes.append(_deep_size(reader))
    assert len(view.slots) == MAX_SLOTS
    assert sizes[1] < sizes[0] * 1.1
    assert sizes[1] < 400_000


def _deep_size(root: object) -> int:
    seen: set[int] = set()
    waiting, size = [root], 0
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type) or type(each).__name__ in ("module", "function"):
            continue
        seen.add(id(each))
        size += sys.getsizeof(each)
        waiting += gc.get_referents(each)
    return size


# --- speed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "0.00.738.014 D create_tensor: loading tensor blk.7.ffn_down.input_scale",
        "0.00.738.014 D srv  update_slots: posting NEXT_RESPONSE",
        "0.00.738.014 D slot process_toke: id  0 | task 7 | n_gen = 12, n_remaining = 30, next token:  1234 ' and'",
        '{"tid":"1","timestamp":1,"level":"INFO","function":"log_server_request","line":2887,"msg":"request","status":200}',
        "x" * 8000,
        "/" * 8000,
        "slot " + "a" * 8000,
        "error " * 1500,
        "INFO [a] " + " " * 990,
        " " * 990 + "|",
        "  - a : " + "(1 MiB, " * 100 + "MiB free",
        "a: using device a (" + "- 1 " * 230 + "MiB free",
    ],
    ids=lambda line: line[:30],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_an_uninteresting_line_is_quickly_left(line: str, loaded: bool) -> None:
    reader = LogReader()
    if loaded:
        reader.feed("main: model loaded")

    def once() -> float:
        start = time.perf_counter()
        for _ in range(300):
            reader.feed(line)
        return (time.perf_counter() - start) / 300

    assert min(once() for _ in range(10)) < 30e-6  # a tenth of that on an idle machine


# --- the engine as it is now ---------------------------------------------------------------------------------------


def test_the_built_in_engine_is_understood(smollm2: Path, tmp_path: Path) -> None:
    if not builtin.is_installed():
        pytest.skip("xllamacpp is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    flags = f"--host 127.0.0.1 --port {port} --ctx-size 2048 --parallel 2 --threads 1 --no-warmup --verbosity 4"
    argv = [sys.executable, "-P", builtin_worker.__file__, "--model", str(smollm2), *flags.split()]
    log = tmp_path / "log"
    with log.open("wb") as output:
        environment = {**os.environ, builtin_worker.API_KEY_VARIABLE: "key"}
        process = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        answer = _ask(f"http://127.0.0.1:{port}/v1/completions", {"prompt": "Hello", "max_tokens": 3}, process)
        events = _read_until(log, SlotReleased)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)

    assert events.count(Loaded()) == 1
    assert ContextInfo(1024, 2) in events
    sizes = buffers(events)
    weights = sum(size for (_, _, kind), size in sizes.items() if kind == "model")
    assert weights == pytest.approx(smollm2.stat().st_size, rel=0.1)
    assert {kind for _, _, kind in sizes} >= {"model", "KV", "compute", "output"}
    timings = next(event for event in events if isinstance(event, SlotTimings))
    assert timings.output_tokens == answer["usage"]["completion_tokens"]
    assert timings.prompt_tokens == answer["usage"]["prompt_tokens"]
    assert any(isinstance(event, SlotGenerating) for event in events)


def _ask(url: str, body: dict[str, Any], process: subprocess.Popen[bytes]) -> Any:
    """The answer, as soon as the engine is ready to give one."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Authorization": "Bearer key"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 503:
                    raise
        except OSError:
            pass
        time.sleep(0.02)  # between two polls
    pytest.fail("the engine does not get ready")


def _read_until(log: Path, kind: type[LogEvent]) -> list[LogEvent]:
    """The engine writes its log from a thread of its own."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        events = read(log.read_text(encoding="utf-8", errors="replace").splitlines())
        if any(isinstance(event, kind) for event in events):
            return events
        time.sleep(0.02)  # between two polls
    pytest.fail(f"the log has no {kind.__name__}: {log.read_text()[-2000:]}")
