"""Lines of an engine's log that quote a request or an answer, told from all others: prompt text is never kept.

llama.cpp quotes a grammar or schema it cannot use, and with a higher `verbosity` whole requests and each token. What it
quotes may have line breaks, and then goes on for lines that look like anything; it ends where lines look like a log
again. The messages are those of llama.cpp's and ik_llama.cpp's sources from 2024 to 2026."""

from __future__ import annotations

import re

_LEFT_OUT = "… (left out: it quotes a request)"
_ENOUGH = 3  # lines of a log, until what follows is taken for no part of the quotation: they may come in its midst

# Each with a part that every such line has: looking for that is a tenth of the price. What is matched stays.
_OPENERS = tuple(
    (hint, re.compile(pattern))
    for hint, pattern in (
        ("parsing grammar", r"error parsing grammar: "),
        ("Grammar", r"\bGrammar(?: \([^)]*\))?: "),
        ("Grammar", r"\bGrammar (?:still awaiting trigger|triggered on)\b"),
        ("generated parser:", r"\bgenerated parser:"),  # of the tools' schemas
        ("JSON schema", r"\bJSON schema (?:conversion [\w ]+|error\b[^:]*): ?"),
        ("request:  ", r"\blog_server_\w+: +request:  "),
        ("response: ", r"\blog_server_\w+: +response: "),
        ("streamed chunk", r"\bstreamed chunk: "),
        ("Parsing ", r"\bParsing (?:PEG )?(?:chat message|input)\b[^:]*:"),
        ("Parsed ", r"\bParsed (?:partial )?message: "),
        ("Partial parse", r"\bPartial parse: "),
        ("ailed to parse ", r"\b[Ff]ailed to parse (?:input|tool|function|messages?|JSON)\b[^:]*:"),
        ("empty grammar stack", r"\bempty grammar stack after accepting piece\b:?"),
        ("unparsed ", r"\bunparsed (?:[\w-]+ )?(?:input|output)\b[^:]*:"),
        ("rompt: ", r"\b(?:[Ff]ormatted|[Rr]endered|[Cc]hat|[Ff]inal|[Rr]aw)[ _-]prompt: "),
        ("rompt: ", r"\b[Pp]rompt: (?=['\"`])"),
        ("prompt token", r"\bprompt token +\d+: +-?\d+ "),
        ("ext token: ", r"\bnext token: +-?\d+ "),
        ("sampled token", r"\bsampled token\b[: =]+-?\d+[: ]"),
        ("launching slot", r"\blaunching slot ?: "),
        ("topp", r"\bstopp(?:ed by|ing) word\b[^:]*: ?"),
        ("VERB", r"^VERB \[[^\]]*\][^|]*"),
        ('"VERB"', r'"level": ?"VERB"'),
    )
)
_EXCEPTION = re.compile(r"\bgot exception: ")
_EXCEPTION_FACT = re.compile(r'"(?:code|type)": ?(?:-?\d+|"\w+")')
_END = re.compile(r"failed to (?:parse grammar|initialize samplers)|Failed to initialize samplers")
_LOG = re.compile(
    r"\d+\.\d{2}\.\d{3}\.\d{3} [DIWE] "
    r"|(?:[DIWE] )?(?:slot|srv|que|res|main|cmn) +[\w(]+[^:]*: "
    r"|(?:[DIWE] )?(?:llama|common|ggml|gguf|clip|mtmd)_\w+: "
    r"|(?:INFO|WARN|VERB|ERR|ERROR) \["
    r'|\{"(?:tid|timestamp|level|function)":'
    r"|terminate called|  what\(\): |\S*:\d+: GGML_|GGML_|CUDA error|Segmentation fault|Aborted|libc\+\+abi"
    r"|parse: error parsing grammar: "  # not logged but printed, in the midst of what another thread quotes
    r"|--- starting .*: runner \d+, attempt \d+ ---$"
)


class QuoteFilter:
    """Takes the lines of one engine as they come."""

    def __init__(self) -> None:
        self._is_inside = False
        self._passed = 0
        self._skipped = 0

    def feed(self, lines: list[str]) -> list[str]:
        """`lines` without what is quoted. How many were left out is said in their place, once the next is there."""
        if not self._is_inside and not any(_may_quote(line) for line in lines):
            return lines
        kept: list[str] = []
        for line in lines:
            if self._is_inside and not self._is_of_log(line):
                self._skipped += 1
            else:
                kept += (*self.flush(), self._without_quotation(line))
        return kept

    def flush(self) -> list[str]:
        """What there is to say of lines left out that was not said yet."""
        skipped, self._skipped = self._skipped, 0
        if not skipped:
            return []
        what = "1 line quoting a request was" if skipped == 1 else f"{skipped} lines quoting a request were"
        return [f"({what} left out)"]

    def peek(self, unfinished: str) -> str:
        """A line that has not ended; "" where it may be part of a quotation."""
        if self._is_inside and not _LOG.match(unfinished):
            return ""
        return _cut(unfinished)[0]

    def _is_of_log(self, line: str) -> bool:
        if "::=" in line or not _LOG.match(line):
            return False
        self._passed += 1
        if self._passed >= _ENOUGH or _END.search(line):
            self._is_inside = False
        return True

    def _without_quotation(self, line: str) -> str:
        text, goes_on = _cut(line)
        if goes_on:
            self._is_inside, self._passed = True, 0
        return text


def _may_quote(line: str) -> bool:
    return "got exception" in line or any(hint in line for hint, _ in _OPENERS)


def _cut(line: str) -> tuple[str, bool]:
    """The line up to its quotation, and whether that may go on in the next one."""
    if exception := _EXCEPTION.search(line):
        facts = ", ".join(_EXCEPTION_FACT.findall(line[exception.end() :]))
        return f"{line[: exception.end()]}{facts}{_LEFT_OUT}", False
    found = [match.end() for hint, opener in _OPENERS if hint in line and (match := opener.search(line))]
    return (f"{line[: min(found)]}{_LEFT_OUT}", True) if found else (line, False)
