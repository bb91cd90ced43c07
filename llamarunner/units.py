"""Durations ("5m"), sizes ("8GiB") and how both are shown. Knows nothing else."""

from __future__ import annotations

import math
import re

_DURATION_UNITS_S = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "μs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_DURATION_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([^0-9.]*)")
_FOREVER = ("forever", "never", "inf", "∞")

_SIZE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]*)")
_SIZE_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _SIZE_UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def parse_duration(text: str) -> float:
    """Seconds of a duration in Go's notation ("1h30m", "500ms", "-1m"), with days ("7d") beside it.

    "forever", "never" and "inf" are `math.inf`. Raises ValueError in Go's own words, which Ollama's clients know.
    """
    stripped = text.strip()
    if stripped.lower() in _FOREVER:
        return math.inf
    sign, digits = 1.0, stripped
    if digits[:1] in ("+", "-"):
        sign, digits = (-1.0 if digits[0] == "-" else 1.0), digits[1:]
    if digits == "0":
        return 0.0
    total, position = 0.0, 0
    while position < len(digits):
        part = _DURATION_PART.match(digits, position)
        if part is None:
            break
        number, unit = part.groups()
        if not unit:
            raise ValueError(f'time: missing unit in duration "{text}"')
        if unit not in _DURATION_UNITS_S:
            raise ValueError(f'time: unknown unit "{unit}" in duration "{text}"')
        total += float(number) * _DURATION_UNITS_S[unit]
        position = part.end()
    if not digits or position != len(digits):
        raise ValueError(f'time: invalid duration "{text}"')
    return sign * total


def format_duration(seconds: float) -> str:
    """At most two units, short enough for a table cell: "0.4s", "12s", "3m05s", "2h10m", "5d03h", "∞"."""
    if math.isinf(seconds):
        return "∞" if seconds > 0 else "-∞"
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 0.9995:
        return f"{round(seconds * 1000)}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "8G" (both binary), "8GB" (decimal) or "1024". Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].lower() if match else ""
    size = float(match[1]) * _SIZE_UNITS[unit] if match and unit in _SIZE_UNITS else math.inf
    if math.isinf(size):
        raise ValueError(f'"{text}" is not a size such as "8GiB" or "500MB"')
    return round(size)


def format_size(size_bytes: float) -> str:
    """Binary units with one decimal ("18.2 GiB"); whole numbers below a KiB ("512 B")."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1023.95 or (unit == "B" and abs(value) < 1024):
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
