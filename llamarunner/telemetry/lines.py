"""Bytes of a program's output as clean lines: whatever arrives, each line is short, printable and harmless to show.

A line may come in pieces or never end; an engine may write colours, cursor movements, other encodings or garbage.
"""

from __future__ import annotations

import re

MAX_LINE_BYTES = 8192

# String sequences end at their terminator; one that never ends loses its introducer only. Each class leaves out what
# starts another sequence, so that no input makes the search quadratic.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x80-\x9f]*(?:\x07|\x1b\\|\x9c)"  # OSC: titles, hyperlinks, clipboard
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x80-\x9f]*(?:\x1b\\|\x9c)"  # DCS, SOS, PM, APC
    r"|\x1b[ -/]*[0-~]"
)
# C0 and C1 controls, what turns the direction of text or hides in it, line separators, lone surrogates
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)

# llama.cpp: "0.01.234.567 W srv  init: ..." (time since start), or the letter alone
_LETTER = re.compile(r"(?:\d+\.\d{2}\.\d{3}\.\d{3} )?([DIWE]) ")
_LETTERS = {"D": "debug", "I": "info", "W": "warning", "E": "error"}
_WORD = re.compile(
    r"\b(?:(?P<debug>debug)|(?P<info>info)|(?P<warning>warn(?:ing)?)"
    r"|(?P<error>\w*error|fatal|critical|failed|traceback|ggml_assert|terminate called))\b",
    re.IGNORECASE,
)
_HINTS = ("error", "warn", "fail", "fatal", "critical", "debug", "traceback", "ggml_assert", "terminate called")


def clean(text: str) -> str:
    """One line without anything that could move a cursor, change a terminal or show other text than it holds."""
    if text.isprintable():
        return text
    return _UNSAFE.sub("", _SEQUENCE.sub("", text).expandtabs(4))


def guess_level(text: str) -> str:
    """ "debug", "info", "warning" or "error": by llama.cpp's letter, else by the first word that names a level."""
    letter = _LETTER.match(text)
    if letter is not None:
        return _LETTERS[letter[1]]
    lowered = text.lower()
    if not any(hint in lowered for hint in _HINTS):  # most lines; a tenth of what the search below takes
        return "info"
    word = _WORD.search(text)
    return word.lastgroup or "info" if word is not None else "info"


class LineSplitter:
    """Lines end with LF, CR or CRLF, however the bytes are cut into blocks. Blank lines, and blanks at the
    end of a line, are left out. A line is held up to `MAX_LINE_BYTES`; the rest of it is counted and thrown away."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._cut = 0
        self._after_cr = False

    def feed(self, block: bytes) -> list[str]:
        """The lines that `block` ended."""
        if not block:
            return []
        if self._after_cr and block.startswith(b"\n"):
            block = block[1:]
        self._after_cr = block.endswith(b"\r")
        *ended, rest = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        lines = []
        for part in ended:
            self._hold(part)
            if line := self._text():
                lines.append(line)
            self._held.clear()
            self._cut = 0
        self._hold(rest)
        return lines

    def flush(self) -> list[str]:
        """The line that was begun, if any: nothing more will come."""
        return self.feed(b"\n") if self._held else []

    @property
    def unfinished(self) -> str:
        return self._text()

    def begins_with(self, start: bytes) -> bool:
        """Whether the line that is not finished does."""
        return self._held.startswith(start)

    def _hold(self, part: bytes) -> None:
        room = MAX_LINE_BYTES - len(self._held)
        self._held += part[:room]
        self._cut += max(0, len(part) - room)

    def _text(self) -> str:
        text = clean(self._held.decode("utf-8", errors="replace")).rstrip()
        if not self._cut:
            return text
        whole = text.rstrip("\ufffd")  # the cut may go through a character
        return f"{whole} … ({self._cut} bytes more)"
