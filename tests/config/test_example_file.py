"""config.toml.example: complete, true to the schema, and good in every line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llamarunner.config import shape
from llamarunner.config.keys import NAME, every_key
from llamarunner.config.load import load_config
from llamarunner.config.positions import KeyPath
from llamarunner.config.schema import Config

EXAMPLE = Path(__file__).parents[2] / "config.toml.example"
_HEADER = re.compile(r"\[([\w.]+)\]")
_DEFAULT = re.compile(r"# ([a-z_]+ = .*)")
_SAMPLE_HEADER = re.compile(r"# (\[[\w.-]+\])")

SECTIONS = [path for path, _ in every_key()]


def commented_defaults() -> list[tuple[KeyPath, Any, bool]]:
    """(key, value, whether it is a default) of every `# key = value` below a header of its own."""
    found: list[tuple[KeyPath, Any, bool]] = []
    section: tuple[str, ...] | None = None
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if header := _HEADER.match(line):
            section = tuple(header[1].split("."))
        elif line.startswith("# ---") or _SAMPLE_HEADER.match(line):
            section = None
        elif section and (pair := _DEFAULT.match(line)):
            ((key, value),) = tomllib.loads(pair[1]).items()
            found.append(((*section, key), value, "# not set" not in line))
    return found


def sample_keys(table: str, end: str) -> set[str]:
    """Keys of sample tables, which have names of their own."""
    text = EXAMPLE.read_text(encoding="utf-8")
    start = text.index(f"# [{table}.")
    sample = text[start : text.index(end, start)]
    return set(re.findall(r"^# ([a-z_]+) = ", sample, re.MULTILINE))


def generic(path: KeyPath) -> KeyPath:
    return (path[0], NAME, *path[2:]) if path[0] in ("engines", "models") else path


def test_it_loads_and_sets_nothing() -> None:
    loaded = load_config(EXAMPLE, environ={})
    assert loaded.config == Config()
    assert loaded.warnings == ()


def test_it_loads_with_every_line_taken_out_of_its_comment(tmp_path: Path) -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    active = [
        line[2:] if _DEFAULT.match(line) or re.match(r"# (\[[\w.-]+\]|[\w-]+ = )", line) else line for line in lines
    ]
    file = tmp_path / "config.toml"
    file.write_text("\n".join(active), encoding="utf-8")
    loaded = load_config(file, environ={}, validate_files=False)
    assert loaded.config.models.keys() == {"qwen3-14b", "qwen3-14b-long"}
    assert load_config(file, environ={}, validate_files=False, profile="production").config.server.host == "0.0.0.0"


def test_it_names_every_key_of_the_schema_and_no_other() -> None:
    named = {generic(path) for path, _, _ in commented_defaults()}
    named |= {("clients", NAME, key) for key in sample_keys("clients", "# ---")}
    named |= {("models", NAME, key) for key in sample_keys("models", "[discovery]")} | {
        ("models", NAME, *path[1:]) for path in named if path[0] == "defaults"
    }
    known = {path for path, _ in every_key()} | {("models", NAME, "inherits")}
    assert named == known


def test_it_has_a_place_for_every_section() -> None:
    headers = {
        match[1].split(".")[0] for match in re.finditer(r"^(?:# )?\[([\w.-]+)\]", EXAMPLE.read_text(), re.MULTILINE)
    }
    assert headers == {*Config.model_fields, "profiles"}


@pytest.mark.parametrize(("path", "value", "is_default"), commented_defaults(), ids=lambda value: str(value)[:40])
def test_each_commented_value_is_the_default(path: tuple[str, ...], value: Any, is_default: bool) -> None:
    data: dict[str, Any] = {path[-1]: value}
    for part in reversed(path[:-1]):
        data = {part: data}
    config, wrong = shape.validate(data, {})
    assert wrong == {}
    if is_default:
        assert config == Config()
    else:
        assert config != Config()
        found: Any = Config()
        for part in path:
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert found is None


def test_each_key_is_explained() -> None:
    """In the schema's own words or shorter: a comment stands above each first mention."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if _DEFAULT.match(line) and not any(_DEFAULT.match(lines[above]) for above in (number - 1,)):
            assert lines[number - 1].startswith("# "), line
