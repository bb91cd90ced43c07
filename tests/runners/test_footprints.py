from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.catalog.catalog import Model, ModelDetails, Weights
from llamarunner.config.schema import ModelSettings
from llamarunner.runners import footprints
from llamarunner.runners.footprints import Footprints, Measured, footprint_key
from llamarunner.runners.memory import MIB, estimate
from llamarunner.runners.placement import RAM, Device, Placement, place

GIB = 1024 * MIB
IN_RAM = Placement({RAM: 100})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "footprints.json"


def model(**more: object) -> Model:
    weights = Weights((500 * MIB,) * 10, (0,) * 10, embedding=100 * MIB, output=100 * MIB)
    made = Model(
        "m", Path("/m.gguf"), ModelSettings(), ModelDetails("llama", metadata={}, weights=weights), size_bytes=7
    )
    return replace(made, **more)  # type: ignore[arg-type]  # names of its fields


def key(of: Model, version: str = "1", placement: Placement = IN_RAM) -> str:
    return footprint_key(of, engine="builtin", version=version, placement=placement)


# --- what a key tells apart -------------------------------------------------------------------------------------------


def test_a_key_stays_while_nothing_that_matters_changes() -> None:
    first = key(model())
    assert key(model(name="other", aliases=("x",), settings=ModelSettings(keep_alive=7))) == first
    assert key(model(settings=ModelSettings(flags={"ctk": "q8_0"}))) == key(
        model(settings=ModelSettings(flags={"cache-type-k": "q8_0"}))
    )
    others = {
        key(model(modified_at=1.0)),
        key(model(size_bytes=8)),
        key(model(path=Path("/n.gguf"))),
        key(model(settings=ModelSettings(context=512))),
        key(model(settings=ModelSettings(parallel=2))),
        key(model(settings=ModelSettings(flags={"cache-type-k": "q8_0"}))),
        key(model(mmproj=Path("/p.gguf"))),
        key(model(), version="2"),
        key(model(), placement=Placement({}, 11, (), ("gpu0",))),
        key(model(), placement=Placement({}, 10, (), ("gpu0",))),
        key(model(), placement=Placement({}, 11, (6, 5), ("gpu0", "gpu1"))),
    }
    assert len(others | {first}) == 12


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_the_most_of_the_recent_runs(path: Path) -> None:
    known = Footprints(path)
    assert known.lookup("k") is None
    for ram, gpu, load_s in ((900, 1, 9.0), (10, 20, 1.0), (30, 5, 2.0), (20, 5, 3.0), (1, 2, 4.0), (2, 2, 50.0)):
        known.record("k", Measured({RAM: ram, "gpu0": gpu}, load_s))
    assert known.lookup("k") == Measured({RAM: 30, "gpu0": 20}, 3.0)  # the first is too long ago


def test_a_run_grows(path: Path) -> None:
    known = Footprints(path)
    known.grow("k", {RAM: 5})  # of a run that was never recorded
    assert len(known) == 0
    known.record("k", Measured({RAM: 10}, 1.0))
    known.grow("k", {RAM: 8, "gpu0": 4})
    known.grow("k", {RAM: 12})
    assert known.lookup("k") == Measured({RAM: 12, "gpu0": 4}, 1.0)


def test_the_best_figure_is_the_measured_one_with_the_estimates_error(path: Path) -> None:
    known = Footprints(path)
    estimated = {RAM: 50, "gpu0": 110}
    assert known.best("k", estimated) == footprints.Best(estimated, "estimated")
    known.record("k", Measured({RAM: 0, "gpu0": 100}, 2.0))  # RAM could not be measured
    best = known.best("k", estimated)
    assert (best.bytes_by_device, best.source, best.load_s) == ({RAM: 50, "gpu0": 100}, "measured", 2.0)
    assert best.error == pytest.approx(0.1)


def test_a_measured_model_is_placed_by_its_measure(path: Path) -> None:
    asked = model()
    need = estimate(asked)
    card = Device("gpu0", "GPU 0", need.on_gpus((11,)).gpus[0], uuid="GPU-0")
    found = place(need, [card], partial="refuse")
    assert isinstance(found, Placement)
    smaller, known = replace(card, total_bytes=card.total_bytes - 300 * MIB), Footprints(path)
    assert not isinstance(place(need, [smaller], partial="refuse"), Placement)
    known.record(key(asked, placement=found), Measured({"gpu0": card.total_bytes - 400 * MIB}, 1.0))
    better = known.corrected(need, key(asked, placement=found), found)
    again = place(better, [smaller], partial="refuse")
    assert isinstance(again, Placement)
    assert again.bytes_by_device["gpu0"] == card.total_bytes - 400 * MIB
    assert again.bytes_by_device[RAM] == found.bytes_by_device[RAM]
    assert again.key == found.key
    assert known.corrected(need, "unknown", found) == need


def test_only_the_newest_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprints, "MAX_FOOTPRINTS", 3)
    known = Footprints(path)
    for name in ("a", "b", "c", "a", "d", "e"):
        known.record(name, Measured({RAM: 1}, 1.0))
    assert [name for name in "abcde" if known.lookup(name)] == ["a", "d", "e"]
    assert len(known) == 3


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_it_comes_back(path: Path) -> None:
    known = Footprints(path)
    known.load()  # there is no file yet
    known.record("a", Measured({RAM: 10, "gpu0": 2**40}, 1.25))
    known.record("b", Measured({RAM: 11}, 2.5))
    known.save()
    again = Footprints(path)
    again.load()
    assert (again.lookup("a"), again.lookup("b")) == (known.lookup("a"), known.lookup("b"))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no temporary file is left
    assert path.stat().st_mode & 0o777 == 0o600


BROKEN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"version": 2, "footprints": {}}',
    b'{"version": 1}',
    b'{"version": 1, "footprints": []}',
    b'{"version": 1, "footprints": {"a": 3}}',
    b'{"version": 1, "footprints": {"a": [{"bytes": {"ram": -1}, "load_s": 1}]}}',
    b'{"version": 1, "footprints": {"a": [{"bytes": {"ram": 1.5}, "load_s": 1}]}}',
    b'{"version": 1, "footprints": {"a": [{"bytes": {"ram": 1}, "load_s": NaN}]}}',
    b'{"version": 1, "footprints": {"a": [{"bytes": 3, "load_s": 1}]}}',
    b"\xff\xfe\x00",
    b"[" * 100_000,
]


@pytest.mark.parametrize("data", BROKEN)
def test_a_broken_file_is_put_aside(path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(data)
    known = Footprints(path)
    known.load()
    assert len(known) == 0
    assert "damaged" in caplog.text
    assert path.with_name("footprints.json.broken").read_bytes() == data
    known.record("a", Measured({RAM: 1}, 1.0))
    known.save()
    again = Footprints(path)
    again.load()
    assert again.lookup("a") == Measured({RAM: 1}, 1.0)


def test_a_file_too_large_is_not_believed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprints, "_MAX_FILE_BYTES", 100)
    path.parent.mkdir()
    path.write_text(json.dumps({"version": 1, "footprints": {}, "x": "y" * 100}))
    Footprints(path).load()
    assert not path.exists()


def test_a_disk_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Footprints(path)
    known.record("a", Measured({RAM: 1}, 1.0))
    known.save()
    before = path.read_bytes()
    known.record("b", Measured({RAM: 2}, 1.0))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        known.save()
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_folder_in_the_files_place_is_said_and_no_more(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.mkdir(parents=True)
    Footprints(path).load()
    assert "not read" in caplog.text


async def test_it_may_be_recorded_while_it_is_saved(path: Path) -> None:
    known = Footprints(path)
    saving = asyncio.gather(*(asyncio.to_thread(known.save) for _ in range(20)))
    for number in range(2000):
        known.record(str(number), Measured({RAM: number}, 1.0))
        if number % 100 == 0:
            await asyncio.sleep(0)
    await saving
    again = Footprints(path)
    again.load()
    assert len(again) <= footprints.MAX_FOOTPRINTS


@given(st.binary(max_size=200))
def test_no_file_breaks_it(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "f.json"
    path.write_bytes(data)
    Footprints(path).load()
