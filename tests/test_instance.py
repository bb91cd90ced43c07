"""The file by which other commands find the program that runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llamarunner.instance import InstanceFile

PROXIES = {"ollama": ("127.0.0.1", 11434)}


def test_what_is_written_is_found(tmp_path: Path) -> None:
    path = tmp_path / "state" / "instance.json"
    file = InstanceFile(path)
    assert file.read() is None
    file.write(12.5, PROXIES)
    found = InstanceFile(path).read()
    assert found is not None
    assert (found.pid, found.started_at, found.proxies) == (os.getpid(), 12.5, PROXIES)
    assert os.listdir(path.parent) == ["instance.json"], "no draft is left"
    file.remove()
    file.remove()
    assert file.read() is None


def test_what_another_program_wrote_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "instance.json"
    InstanceFile(path).write(1.0, PROXIES)
    InstanceFile(path).remove()
    assert path.exists()


def test_a_pid_that_now_belongs_to_another_is_nobody(tmp_path: Path) -> None:
    path = tmp_path / "instance.json"
    InstanceFile(path).write(1.0, PROXIES)
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "created": record["created"] - 1000}))
    assert InstanceFile(path).read() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": "x"}', '{"pid": 999999999, "created": 1}', "\xff"])
def test_leavings_are_nobody(tmp_path: Path, text: str) -> None:
    path = tmp_path / "instance.json"
    path.write_bytes(text.encode("latin-1"))
    assert InstanceFile(path).read() is None
