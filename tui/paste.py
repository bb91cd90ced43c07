"""Pasted text, cut to what a field takes before anybody looks at its characters one by one. Pure."""

from __future__ import annotations

MAX_PASTE = 4096  # characters; no field here takes more
BEGIN, END = "\x1b[200~", "\x1b[201~"
"""The marks that a terminal puts around pasted text."""


class PasteLimit:
    """Takes a terminal's input as it comes, in any pieces. Parsing a whole megabyte in the input's thread would let the
    loop have the interpreter only every few milliseconds, for a second."""

    def __init__(self) -> None:
        self._left: int | None = None  # characters of a paste that may still pass; None outside of one
        self._before = ""  # the end of what has passed outside, where a mark may have begun
        self._held = ""  # of a paste, what may be the beginning of its end

    def feed(self, text: str) -> str:
        passed: list[str] = []
        while text:
            if self._left is None:
                piece, text = self._until_paste(text)
            else:
                piece, text = self._within_paste(self._held + text, self._left)
            passed.append(piece)
        return "".join(passed)

    def _until_paste(self, text: str) -> tuple[str, str]:
        whole = self._before + text
        begin = whole.find(BEGIN)
        if begin < 0:
            self._before = whole[-(len(BEGIN) - 1) :]
            return text, ""
        cut = begin + len(BEGIN) - len(self._before)
        self._left, self._before, self._held = MAX_PASTE, "", ""
        return text[:cut], text[cut:]

    def _within_paste(self, text: str, left: int) -> tuple[str, str]:
        pasted, end, rest = text.partition(END)
        if end:
            self._left = None
            return pasted[:left] + end, rest
        held = next((n for n in range(len(END) - 1, 0, -1) if pasted.endswith(END[:n])), 0)
        pasted, self._held = pasted[: len(pasted) - held], pasted[len(pasted) - held :]
        self._left = max(left - len(pasted), 0)
        return pasted[:left], ""
