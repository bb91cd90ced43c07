"""Where in a TOML document each key stands, for messages that name a line. Knows nothing of our configuration.

`tomllib` gives no positions. This reads the same text once more, and only text that `tomllib` has accepted: it
tells keys from values and never judges either.
"""

from __future__ import annotations

import re
import tomllib

KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"[ \t\r\n]*(?:#[^\n]*[ \t\r\n]*)*")
_KEY_PART = re.compile(r"""[ \t]*(?:([A-Za-z0-9_-]+)|"([^"\\]*(?:\\.[^"\\]*)*)"|'([^']*)')[ \t]*""")
_SCALAR = re.compile(
    r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"{3,5}'
    r"|'''[^']*(?:'(?!'')[^']*)*'{3,5}"
    r'|"[^"\\]*(?:\\.[^"\\]*)*"'
    r"|'[^']*'"
    r"|[^,\]}#\n]+",  # a number, a boolean or a date
    re.DOTALL,
)


def locate(source: str) -> dict[KeyPath, int]:
    """The line (from 1) of each key path of a valid document; array elements are numbered from 0.

    A table that is never written on its own has the line of the first key that implies it.
    """
    return _Locator(source).read()


class _Locator:
    def __init__(self, source: str) -> None:
        self._text = source
        self._at = 0
        self._counted_to, self._line = 0, 1
        self._lines: dict[KeyPath, int] = {}
        self._array_lengths: dict[KeyPath, int] = {}  # of [[arrays]] of tables

    def read(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self._blank()
        while self._at < len(self._text):
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._blank()
        return self._lines

    def _header(self) -> KeyPath:
        line, is_array = self._line_here(), self._text.startswith("[[", self._at)
        self._at += 2 if is_array else 1
        keys = self._key()
        self._at += 2 if is_array else 1
        table: KeyPath = ()
        for number, key in enumerate(keys, start=1):
            table += (key,)
            self._lines.setdefault(table, line)
            if is_array and number == len(keys):
                self._array_lengths[table] = self._array_lengths.get(table, 0) + 1
            if length := self._array_lengths.get(table):
                table += (length - 1,)
        self._lines[table] = line  # its own header says more than a key that only implied it
        return table

    def _pair(self, table: KeyPath) -> None:
        line = self._line_here()
        for key in self._key():
            table += (key,)
            self._lines.setdefault(table, line)
        self._at += 1  # the equals sign
        self._blank()
        self._value(table)

    def _key(self) -> list[str]:
        keys = []
        while True:
            match = _KEY_PART.match(self._text, self._at)
            if match is None:
                raise ValueError(f"no key at line {self._line_here()}: the document is not valid TOML")
            self._at = match.end()
            bare, basic, literal = match.groups()
            if basic is not None and "\\" in basic:
                keys.append(tomllib.loads(f'key = "{basic}"')["key"])
            else:
                keys.append(next(part for part in (bare, basic, literal) if part is not None))
            if not self._text.startswith(".", self._at):
                return keys
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        match self._text[self._at]:
            case "[":
                self._items("]", path)
            case "{":
                self._items("}", path)
            case _:
                scalar = _SCALAR.match(self._text, self._at)
                if scalar is None:
                    raise ValueError(f"no value at line {self._line_here()}: the document is not valid TOML")
                self._at = scalar.end()

    def _items(self, closing: str, path: KeyPath) -> None:
        """The elements of an array, or the pairs of an inline table."""
        self._at += 1
        index = 0
        while True:
            self._blank()
            if self._text[self._at] == closing:
                self._at += 1
                return
            if closing == "}":
                self._pair(path)
            else:
                self._lines[(*path, index)] = self._line_here()
                self._value((*path, index))
                index += 1
            self._blank()
            if self._text[self._at] == ",":
                self._at += 1

    def _blank(self) -> None:
        match = _BLANK.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _line_here(self) -> int:
        """Each stretch of text is counted once: positions only go forward."""
        self._line += self._text.count("\n", self._counted_to, self._at)
        self._counted_to = self._at
        return self._line
