"""Flags in the words of one build of llama-server: renamed ones, those that took on a value or lost it, those that came
or went. Pure. What no build ever had is refused with the nearest that this one has.

A build that has only one of `--x` and `--no-x` does the other anyway; that much holds of llama.cpp from 2024 to 2026
and of ik_llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from llamarunner.config.values import FlagValue
from llamarunner.engines.flags import Flags, long_spellings
from llamarunner.engines.probe import Probe
from llamarunner.errors import UnsupportedError

_OPTIONAL = ("jinja", "no-webui", "slots")  # we ask for them, where the program has them
# A load mode in the flags before there was one; builds without "direct-io" refuse that one.
_LOAD_MODES: dict[str, tuple[str, ...]] = {
    "auto": (),
    "mmap": (),
    "none": ("no-mmap",),
    "mlock": ("no-mmap", "mlock"),
    "mmap+mlock": ("mlock",),
    "dio": ("direct-io",),
}
# What a build does that does not have the flag at all.
_WITHOUT: dict[str, tuple[FlagValue, ...]] = {
    "fit": ("off",),
    "cache-ram": (0, "0"),
    "kv-unified": (True,),
    "no-context-shift": (True,),
    "no-jinja": (True,),
    "flash-attn": ("off", "auto"),
    "load-mode": ("auto", "mmap"),
    "spec-type": ("none",),
}


def as_known(flags: Flags, known: Probe, written: Mapping[str, str], model: str) -> Flags:
    """`flags` in the words of a build that was probed; for one that was not, in those of the person who set them.
    `written` is how they wrote theirs. Raises UnsupportedError for one of them that the build does not have."""
    if not known.flags:
        return {
            spelled if (spelled := written.get(name, "")) in long_spellings(name) else name: (
                "on" if name == "flash-attn" and value is True else value
            )
            for name, value in flags.items()
        }
    adapted: Flags = {}
    for name, value in _load_mode(flags, known).items():
        if value is False:
            continue
        if spelling := _spelling(name, known):
            adapted |= _valued(spelling, value, known)
        elif name in _OPTIONAL or not _is_missed(name, value, known):
            continue
        elif name in written:
            raise UnsupportedError(f"model '{model}': unknown flag '{written[name]}'", hint=_hint(name, known))
        else:
            adapted[name] = value  # the engine itself will say what it makes of it
    return adapted


def _spelling(name: str, known: Probe) -> str:
    """How this build spells a flag; "" where it does not have it."""
    return next((spelling for spelling in (name, *long_spellings(name)) if spelling in known.flags), "")


def _valued(spelling: str, value: FlagValue, known: Probe) -> Flags:
    if spelling in known.switches and value is True:
        return {spelling: "on"}
    if spelling in known.bare and value in ("on", "off", "auto"):
        if value == "on":
            return {spelling: True}
        opposite = _spelling(_opposite(spelling), known) if value == "off" else ""
        return {opposite: True} if opposite else {}
    return {spelling: value}


def _is_missed(name: str, value: FlagValue, known: Probe) -> bool:
    """Whether a build without this flag would do something else."""
    if value in _WITHOUT.get(name, ()):
        return False
    return value not in (True, "on") or not _spelling(_opposite(name), known)


def _opposite(name: str) -> str:
    return name.removeprefix("no-") if name.startswith("no-") else f"no-{name}"


def _load_mode(flags: Flags, known: Probe) -> Flags:
    """How the file is read took three flags before it took one."""
    has_mode = bool(_spelling("load-mode", known))
    mode = flags.get("load-mode")
    if not has_mode and isinstance(mode, str):
        rest = {name: value for name, value in flags.items() if name != "load-mode"}
        needed = _LOAD_MODES.get(mode, ())
        if mode in _LOAD_MODES and all(_spelling(name, known) for name in needed):
            return rest | dict.fromkeys(needed, True)
        return flags
    asked = [name for name in ("no-mmap", "mlock", "direct-io") if flags.get(name) is True]
    if mode is not None or not has_mode or all(_spelling(name, known) for name in asked):
        return flags
    rest = {name: value for name, value in flags.items() if name not in asked}
    found = next((mode for mode, needed in _LOAD_MODES.items() if needed == tuple(asked)), None)
    return flags if found is None else rest | {"load-mode": found}


def _hint(name: str, known: Probe) -> str:
    near = get_close_matches(name, sorted(known.flags), n=1)
    return f"did you mean '{near[0]}'?" if near else "this build of the engine does not have it: leave it out"
