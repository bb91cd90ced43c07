from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.telemetry.logfiles import BackgroundWriter, LogFiles, RotatedFile, safe_name
from llamarunner.telemetry.logs import PROGRAM, LogBook, LogRing, install

logger = logging.getLogger("llamarunner.runners.manager")


def until(done: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.002)  # between two looks at another thread's work


def texts(book: LogBook, source: str = PROGRAM) -> list[str]:
    return [line.text for line in book.page(source, 0, 10**6)[0]]


@pytest.fixture
def book(tmp_path: Path) -> Iterator[LogBook]:
    made = LogBook(tmp_path / "logs")
    yield made
    made.close()


@pytest.fixture
def program(book: LogBook) -> Iterator[LogBook]:
    uninstall = install(book, "debug")
    yield book
    uninstall()


# ---- rings


@given(st.integers(1, 20), st.lists(st.integers(0, 7), max_size=20), st.integers(0, 80), st.integers(0, 30))
def test_a_page_is_what_a_plain_list_would_give(capacity: int, sizes: list[int], after: int, limit: int) -> None:
    ring, plain = LogRing(capacity), []
    for size in sizes:
        batch = [f"line {len(plain) + offset + 1}" for offset in range(size)]
        plain += batch
        ring.extend(0.0, [("info", text) for text in batch])
    kept = [(number, text) for number, text in enumerate(plain, 1)][-capacity:]
    above = [(number, text) for number, text in kept if number > after]
    expected = above[len(above) - min(limit, len(above)) :]
    lines, missed = ring.page(after, limit)
    assert [(line.number, line.text) for line in lines] == expected
    assert missed == max(0, len(plain) - after) - len(expected)


def test_a_follower_sees_every_line_once() -> None:
    ring, seen, after = LogRing(100), [], 0
    for number in range(1000):
        ring.extend(0.0, [("info", str(number))])
        if number % 37 == 0 or number == 999:
            lines, missed = ring.page(after, 500)
            assert missed == 0
            seen += [int(line.text) for line in lines]
            after = lines[-1].number
    assert seen == list(range(1000))


def test_a_ring_of_the_longest_lines_stays_small() -> None:
    ring = LogRing()
    for _ in range(5000):
        ring.extend(0.0, [("info", "x" * 8192)])
    lines, missed = ring.page(0, 10_000)
    assert sum(len(line.text) for line in lines) <= 4_000_000
    assert len(lines) + missed == 5000


# ---- engine logs


def test_an_engine_log_in_ring_and_file(book: LogBook, tmp_path: Path) -> None:
    log = book.open("qwen")
    version = book.version
    log.feed(b"0.00.000.625 I loading\r\n0.00.001.000 E no ")
    assert log.tail(5) == ("0.00.000.625 I loading", "0.00.001.000 E no")
    log.feed("Größe\n\x1b[31mcoloured".encode())
    assert log.tail(1) == ("coloured",)
    log.close()
    log.close()
    assert [(line.number, line.level) for line in book.page("qwen")[0]] == [(1, "info"), (2, "error"), (3, "info")]
    assert log.tail(2) == ("0.00.001.000 E no Größe", "coloured")
    assert log.tail(0) == ()
    assert book.version > version
    book.close()
    written = (tmp_path / "logs" / "qwen.log").read_text(encoding="utf-8").splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4} "
    assert [re.sub(f"^{stamp}", "", line) for line in written] == texts(book, "qwen")


def test_the_next_engine_of_a_model_goes_on_counting(book: LogBook) -> None:
    for word in ("first", "second"):
        log = book.open("qwen")
        log.feed(word.encode())
        log.close()
    assert [(line.number, line.text) for line in book.page("qwen")[0]] == [(1, "first"), (2, "second")]
    assert book.sources() == (PROGRAM, "qwen")
    assert book.page("unknown") == ((), 0)


def test_each_line_is_told_once_and_a_row_of_dots_while_it_grows(book: LogBook) -> None:
    log, told = book.open("qwen"), list[str]()
    log.feed(b"before anybody listens\n")
    log.on_line = told.append
    for block in (b"one\ntw", b"o\n\n.", b".", b"..", b".\nthree", b" and\r\n", b"the last"):
        log.feed(block)
    assert told == ["one", "two", "..", "....", ".....", "three and"]
    log.close()
    assert told[-1] == "the last"
    assert texts(book, "qwen") == ["before anybody listens", "one", "two", ".....", "three and", "the last"]


def test_order_is_kept_over_a_hundred_thousand_lines(book: LogBook, tmp_path: Path) -> None:
    log = book.open("busy")
    data = b"".join(b"line %d\n" % number for number in range(100_000))
    for start in range(0, len(data), 4096):
        log.feed(data[start : start + 4096])
    log.close()
    assert [int(line.text[5:]) for line in book.page("busy", 0, 10_000)[0]] == list(range(95_000, 100_000))
    book.close(timeout_s=30)
    with (tmp_path / "logs" / "busy.log").open() as file:
        assert [int(line.rsplit(" ", 1)[1]) for line in file] == list(range(100_000))


def test_sources_are_bounded_and_the_open_ones_stay(book: LogBook) -> None:
    in_use = book.open("in use")
    in_use.feed(b"still here\n")
    versions = []
    for number in range(200):
        log = book.open(f"model {number}")
        log.feed(b"a line\n")
        log.close()
        versions.append(book.version)
    assert len(book.sources()) <= 64
    assert texts(book, "in use") == ["still here"]
    assert texts(book, "model 199") == ["a line"]
    assert versions == sorted(set(versions))


def test_without_a_directory_there_is_only_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    book = LogBook(None)
    book.open("qwen").feed(b"a line\n")
    book.close()
    assert texts(book, "qwen") == ["a line"]
    assert list(tmp_path.iterdir()) == []


# ---- files


def test_files_are_private_and_their_names_safe(tmp_path: Path) -> None:
    book = LogBook(tmp_path / "logs")
    names = [
        "qwen/qwen3:4b",
        "模型",
        "🦙 llama",
        "../../etc/passwd",
        ".hidden",
        "x" * 500,
        "a b",
        "a_b",
        "bad\udcff",
        "nul\0",
    ]
    for name in names:
        book.open(name).feed(b"a line\n")
    book.close()
    assert stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o700
    files = list((tmp_path / "logs").iterdir())
    assert len(files) == len(names)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert sorted(tmp_path.iterdir()) == [tmp_path / "logs"]
    assert (tmp_path / "logs" / "模型.log").exists()


@given(st.text(max_size=300))
def test_any_name_is_one_path_component(name: str) -> None:
    safe = safe_name(name)
    assert "/" not in safe
    assert "\0" not in safe
    assert not safe.startswith(".")
    assert 0 < len(safe.encode()) <= 100


def test_a_file_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.touch(0o644)
    path.chmod(0o644)
    file = RotatedFile(path, 1000, 1)
    file.write(b"a line\n")
    file.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_rotation_keeps_so_many_and_bounds_each(tmp_path: Path, keep: int) -> None:
    file = RotatedFile(tmp_path / "x.log", 100, keep)
    for start in range(0, 60, 3):
        file.write(b"".join(b"line %04d\n" % number for number in range(start, start + 3)))
    file.close()
    names = [f"x.log.{number}" for number in range(keep, 0, -1)] + ["x.log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    contents = [(tmp_path / name).read_bytes() for name in names]
    assert all(len(content) <= 100 for content in contents)
    lines = b"".join(contents).splitlines()
    assert lines == [b"line %04d" % number for number in range(60 - len(lines), 60)]
    assert len(lines) == 10 * (keep + 1)


@given(
    st.lists(
        st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"") + b"\n"), max_size=5), max_size=12
    )
)
def test_rotation_loses_no_line_and_splits_none(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[list[bytes]]
) -> None:
    directory = tmp_path_factory.mktemp("rotation")
    file = RotatedFile(directory / "x.log", 30, 100)
    for chunk in chunks:
        file.write(b"".join(chunk))
    file.close()
    paths = sorted(directory.iterdir(), key=lambda path: int(path.suffix[1:]) if path.suffix != ".log" else 0)
    contents = [path.read_bytes() for path in reversed(paths)]
    assert b"".join(contents) == b"".join(line for chunk in chunks for line in chunk)
    assert all(len(content) <= 30 or content.count(b"\n") == 1 for content in contents)


def test_a_restart_appends_and_counts_what_is_there(tmp_path: Path) -> None:
    for word in (b"first", b"other"):
        file = RotatedFile(tmp_path / "x.log", 10, 1)
        file.write(word + b"\n")
        file.close()
    assert (tmp_path / "x.log.1").read_bytes() == b"first\n"
    assert (tmp_path / "x.log").read_bytes() == b"other\n"


def test_more_sources_than_open_files(tmp_path: Path) -> None:
    files = LogFiles(tmp_path, 1000, 0)
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(50), *range(50)]:
        files.write(f"model {number}", b"a line\n")
    assert len(os.listdir("/proc/self/fd")) - before <= 32
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(path.read_bytes() == b"a line\n" * 2 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 50


def test_a_full_disk_is_said_once_and_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.log").symlink_to("/dev/full")
    files = LogFiles(tmp_path, 1000, 1, retry_s=0.0)
    for _ in range(5):
        files.write("one", b"lost\n")
        files.write("two", b"lost\n")
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert os.strerror(errno.ENOSPC) in warning.getMessage()
    (tmp_path / "one.log").unlink()
    caplog.set_level(logging.INFO)
    files.write("one", b"kept\n")
    files.close()
    assert (tmp_path / "one.log").read_bytes() == b"kept\n"
    assert caplog.messages[-1] == "logs are written to files again"


def test_while_the_disk_is_full_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "one.log").symlink_to("/dev/full")
    files = LogFiles(tmp_path, 1000, 1, retry_s=3600)
    files.write("one", b"lost\n")
    (tmp_path / "one.log").unlink()
    files.write("one", b"lost\n")
    assert list(tmp_path.iterdir()) == []
    files.close()


def test_a_file_size_limit_and_an_unwritable_directory_cost_only_the_files(tmp_path: Path) -> None:
    """In a process of its own: the limit would hold for this one to its end."""
    script = """
import logging, resource, sys
from pathlib import Path
from llamarunner.telemetry.logs import LogBook, install, PROGRAM
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for directory in (Path(sys.argv[1]), Path("/proc/none")):
    book = LogBook(directory)
    uninstall = install(book)
    log = book.open("qwen")
    for number in range(2000):
        log.feed(b"line %d\\n" % number)
    log.close()
    book.close()
    uninstall()
    assert len(book.page("qwen", 0, 5000)[0]) == 2000
    (warning,) = [line.text for line in book.page(PROGRAM)[0]]
    assert "kept in memory only" in warning, warning
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, cwd=Path(__file__).parents[2], check=False
    )
    assert (run.returncode, run.stderr, run.stdout) == (0, b"", b"")
    assert (tmp_path / "qwen.log").stat().st_size == 10_000


# ---- the writer


def test_a_writer_that_cannot_keep_up_drops_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    gate, written = threading.Event(), []

    def write(key: str, data: bytes) -> None:
        gate.wait(10)
        written.append(data)

    writer = BackgroundWriter("slow files", write, max_pending=100)
    writer.put("a", b"first\n")
    until(lambda: not writer._pending)  # it is in `write` now
    started = time.monotonic()
    for _ in range(50):
        writer.put("a", b"123456789\n")
    assert time.monotonic() - started < 1
    gate.set()
    assert writer.close()
    assert written == [b"first\n", b"123456789\n" * 10]
    assert caplog.messages == ["40 log lines were dropped: slow files could not keep up"]


def test_closing_does_not_wait_for_a_disk_that_hangs() -> None:
    gate = threading.Event()
    writer = BackgroundWriter("hanging files", lambda key, data: gate.wait(60) and None)
    writer.put("a", b"a line\n")
    started = time.monotonic()
    assert not writer.close(timeout_s=0.05)
    assert time.monotonic() - started < 5
    gate.set()
    assert writer.close(timeout_s=10)
    writer.put("a", b"too late\n")


def test_keys_keep_their_order_from_many_threads() -> None:
    written: dict[str, bytes] = {}
    writer = BackgroundWriter("files", lambda key, data: written.update({key: written.get(key, b"") + data}))

    def fill(key: str) -> None:
        for number in range(2000):
            writer.put(key, b"%d\n" % number)

    threads = [threading.Thread(target=fill, args=(key,)) for key in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.close(10)
    expected = b"".join(b"%d\n" % number for number in range(2000))
    assert written == dict.fromkeys("abcd", expected)


# ---- the program's own log


def test_records_in_ring_and_file(program: LogBook, tmp_path: Path) -> None:
    logger.info("loading %s", "qwen")
    logger.warning("forged\n2026-01-01T00:00:00 ERROR x: \x1b[31mlie")
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("it failed")
    lines = program.page(PROGRAM, 0, 1000)[0]
    assert [(line.level, line.text) for line in lines[:4]] == [
        ("info", "runners.manager: loading qwen"),
        ("warning", "runners.manager: forged"),
        ("warning", "    2026-01-01T00:00:00 ERROR x: lie"),
        ("error", "runners.manager: it failed"),
    ]
    assert lines[-1].text == "    ValueError: broken"
    program.close()
    written = (tmp_path / "logs" / "llamarunner.log").read_text().splitlines()
    records = [line for line in written if not line.startswith("    ")]
    assert [line.split(" ", 1)[1] for line in records] == [
        "INFO    runners.manager: loading qwen",
        "WARNING runners.manager: forged",
        "ERROR   runners.manager: it failed",
    ]


def test_levels_and_bad_records(program: LogBook, capfd: pytest.CaptureFixture[str]) -> None:
    class Mute:
        def __str__(self) -> str:
            raise RuntimeError("I say nothing")

    logger.debug("seen")
    logger.critical("%d is no number", "x")
    logger.info("%s", Mute())
    logger.info("")
    logger.error("x" * 100_000)
    logger.info("\n".join(map(str, range(10_000))))
    first, second, third, fourth, fifth, *many = program.page(PROGRAM, 0, 1000)[0]
    assert (first.level, first.text) == ("debug", "runners.manager: seen")
    assert second.level == "error"
    assert "could not be formatted" in second.text
    assert "I say nothing" in third.text
    assert fourth.text == "runners.manager: "
    assert len(fifth.text) < 9000
    assert len(many) == 201
    assert "9800 lines left out" in many[100].text
    assert capfd.readouterr() == ("", "")


def test_the_level_is_kept_to_and_everything_is_put_back(book: LogBook) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions, warnings.showwarning
    uninstall = install(book, "warning")
    logger.info("unseen")
    logger.warning("seen")
    uninstall()
    assert texts(book) == ["runners.manager: seen"]
    assert (root.handlers[:], root.level, logging.raiseExceptions, warnings.showwarning) == before


def test_warnings_go_to_the_log(program: LogBook, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("mind the gap", stacklevel=1)
        logging.captureWarnings(False)
    assert any("mind the gap" in text for text in texts(program))
    assert capfd.readouterr() == ("", "")


def test_stderr_only_where_wanted(book: LogBook, capfd: pytest.CaptureFixture[str]) -> None:
    uninstall = install(book, "info", to_stderr=True)
    logger.info("serving")
    uninstall()
    assert capfd.readouterr().err.endswith(" INFO    runners.manager: serving\n")


def test_a_stderr_nobody_reads_blocks_nobody() -> None:
    script = """
import logging, time
from llamarunner.telemetry.logs import LogBook, install
book = LogBook(None)
uninstall = install(book, to_stderr=True)
started = time.monotonic()
for number in range(3000):
    logging.getLogger("x").info("%d %s", number, "y" * 200)
print(time.monotonic() - started, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        took = float(process.stdout.readline())
        assert process.wait(10) == 0
    assert took < 5


async def test_bad_requests_leave_no_tracebacks(book: LogBook) -> None:
    async def fail(request: web.Request) -> web.Response:
        raise RuntimeError("our own mistake")

    async def send(data: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        await reader.read()
        writer.close()
        await writer.wait_closed()

    uninstall = install(book, "info")
    app = web.Application()
    app.router.add_get("/", fail)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        for garbage in (b"GET / HTTP/9\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"):
            await send(garbage)
        assert texts(book) == []
        logging.getLogger().setLevel(logging.DEBUG)
        await send(b"GET / HTTP/1.1\r\nHost: a\r\nbad header\r\n\r\n")
        refused = [text for text in texts(book) if "aiohttp.server" in text]
        assert len(refused) == 1
        assert "refused a malformed request" in refused[0]
        await send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert texts(book)[-1] == "    RuntimeError: our own mistake"
    finally:
        await runner.cleanup()
        uninstall()
