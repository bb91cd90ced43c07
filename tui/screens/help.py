"""All keys, one a line."""

from __future__ import annotations

from llamarunner.control.snapshot import Snapshot
from tui.screens.detail import Fact

_KEYS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Everywhere", (
        ("1 2 3 4", "go to hardware, models, requests, logs"),
        ("tab shift+tab", "next, previous pane"),
        ("z", "give the pane the whole screen, and back"),
        ("Esc", "back; clear the filter"),
        ("ctrl+p", "every command, by name"),
        ("T", "choose a theme"),
        ("?", "this page"),
        ("q ctrl+c", "leave: keep serving without a screen, or stop everything"),
    )),
    ("Models and requests", (
        ("j k ↓ ↑", "down, up; g and G first and last, PgDn and PgUp by the page"),
        ("Enter", "details"),
        ("/", "filter as you type; Enter keeps it, Esc clears it"),
        ("s S", "sort by the next column; turn the order round"),
        ("L", "load the chosen model, or try again one that failed"),
        ("U", "unload it: asks first, and names the answers in flight"),
        ("D X", "download a model by its name; cancel a download"),
    )),
    ("Logs", (
        ("[ ]", "the log of the program, and of each runner"),
        ("p f", "pause and go on; follow the newest"),
        ("/", "search; n older, N newer match"),
        ("w", "wrap long lines"),
    )),
)  # fmt: skip


def help_facts(snapshot: Snapshot) -> list[Fact]:
    facts: list[Fact] = []
    for title, keys in _KEYS:
        facts.append(("", title, "accent-strong"))
        facts += [(key, text, "") for key, text in keys]
        facts.append(("", " ", ""))
    config = snapshot.config_path or "none: defaults are used"
    facts += [("configuration", config, ""), ("version", snapshot.version, "")]
    return facts
