"""What llama.cpp quotes of requests is told from the rest of its log. The lines were recorded; CANARY stands where the
request's own text was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.telemetry.logs import EngineLog, LogRing
from llamarunner.telemetry.quotes import QuoteFilter

MALFORMED_GRAMMAR = """\
0.00.725.480 I slot get_availabl: id  0 | task -1 | selected slot by LRU, t_last = 1377086071
parse: error parsing grammar: expecting ::= at CANARY line
I am CANARY
root ::= "CANARY" CANARY-x
second CANARY line
error: CANARY
0.00.728.854 E failed to parse grammar
0.00.728.902 E srv    send_error: task id = 8, error: Failed to initialize samplers: failed to parse grammar
terminate called without an active exception
"""
OLD_GRAMMAR = """\
slot launch_slot_: id  0 | task 0 | processing task
parse: error parsing grammar: Undefined rule identifier 'CANARY'
root ::= "{" CANARY "}"
CANARY-kv ::= "x"
llama_grammar_init_impl: failed to parse grammar
srv  update_slots: all slots are idle
"""
MULTI_LINE_REQUEST = """\
srv  log_server_r: request: POST /v1/chat/completions 127.0.0.1 200
srv  log_server_r: request:  {
  "messages": [{"role": "user", "content": "CANARY"}],
  "CANARY": 1
}
srv  log_server_r: response: {"choices":[{"message":{"content":"CANARY"}}]}
srv  update_slots: all slots are idle
"""
PARSED = """\
srv  update_chat_: Parsing chat message: <think>CANARY
CANARY
Parsing input with format Hermes 2 Pro: CANARY
CANARY
Partial parse: CANARY
Parsed message: {"role":"assistant","content":"CANARY"}
slot      release: id  0 | task 12 | stop processing: n_tokens = 43, truncated = 0
"""


def kept(text: str) -> list[str]:
    lines = QuoteFilter()
    return lines.feed(text.splitlines()) + lines.flush()


def test_a_malformed_grammar_is_left_out_and_nothing_else() -> None:
    before, *_, failed, refused, crash = MALFORMED_GRAMMAR.splitlines()
    assert kept(MALFORMED_GRAMMAR) == [
        before,
        "parse: error parsing grammar: … (left out: it quotes a request)",
        "(4 lines quoting a request were left out)",
        failed,
        refused,
        crash,
    ]


def test_what_is_told_of_a_grammar_in_the_midst_of_another_quotation_is_seen() -> None:
    """It is printed by one thread and the rest logged by another."""
    lines = kept(
        "D srv  operator(): http: streamed chunk: CANARY\nCANARY\nparse: error parsing grammar: CANARY\nCANARY"
    )
    assert "parse: error parsing grammar: … (left out: it quotes a request)" in lines
    assert not [line for line in lines if "CANARY" in line]


@pytest.mark.parametrize("text", [MALFORMED_GRAMMAR, OLD_GRAMMAR, MULTI_LINE_REQUEST, PARSED])
def test_whole_recordings(text: str) -> None:
    lines = kept(text)
    assert not [line for line in lines if "CANARY" in line]
    for line in text.splitlines():
        if "CANARY" not in line and line.strip() not in ("}", "{") and "request:  " not in line:
            assert line in lines


@pytest.mark.parametrize(
    ("line", "stays"),
    [
        (
            '0.00.734.831 W srv    operator(): got exception: {"error":{"code":400,"message":"JSON schema error at #: '
            'unrecognized type CANARY","type":"invalid_request_error"}}',
            'got exception: "code":400, "type":"invalid_request_error"…',
        ),
        ("WARNING: JSON schema conversion was incomplete: pattern ^CANARY$ is not supported", "was incomplete: …"),
        ("JSON schema conversion failed:", "failed:"),
        ("0.0.1 D slot process_toke: id 0 | task 0 | n_gen = 1, next token:  8970 'CANARY'", "next token:  8970 …"),
        ("slot process_toke: id 0 | task 0 | n_decoded = 1, next token: 198 '", "next token: 198 …"),
        ('D srv    operator(): http: streamed chunk: data: {"delta":{"content":"CANARY"}}', "streamed chunk: …"),
        ('D slot launch_slot_: id 0 | task -1 | launching slot : {"prompt":"CANARY"}', "launching slot : …"),
        ('D srv    operator(): Grammar (): root ::= "CANARY"', "Grammar (): …"),
        (
            "srv operator(): got exception: Unexpected empty grammar stack after accepting piece: CANARY (5)",
            "exception",
        ),
        ("  what():  Unexpected empty grammar stack after accepting piece: CANARY", "accepting piece:…"),
        ("0.0.1 E common_chat_peg_parse: unparsed peg-native output: CANARY", "output:…"),
        ("Failed to parse input at pos 12: CANARY", "at pos 12:…"),
        ("slot update_slots: id 0 | task 0 | prompt token   3: 8970 'CANARY'", "prompt token   3: 8970 …"),
        ('VERB [      update_slots] prompt ingested | tid="1" to_eval="CANARY"', "prompt ingested …"),
        ('{"tid":"1","level":"VERB","msg":"next token","token_text":"CANARY"}', '"level":"VERB"…'),
    ],
)
def test_one_line(line: str, stays: str) -> None:
    shown = "\n".join(kept(line))
    assert "CANARY" not in shown
    assert stays in shown


@pytest.mark.parametrize(
    "line",
    [
        "srv  log_server_r: request: POST /v1/chat/completions 127.0.0.1 200",
        "srv  log_server_r: done request: POST /completion 127.0.0.1 200",
        "slot print_timing: id  0 | task 4 | prompt eval time =      16.43 ms /    41 tokens",
        "common_chat_format: Grammar lazy: true",
        "0.00.01 I srv  params_from_: Chat format: Hermes 2 Pro",
        "llama_model_loader: - kv  26: tokenizer.chat_template str = {% for message in messages %}",
        "slot   load_model: id  0 | task -1 | new slot n_ctx_slot = 1024",
        "error: unknown argument: --cache-typ-k",
        "stopped by user",
    ],
)
def test_what_quotes_nobody_stays(line: str) -> None:
    assert kept(line) == [line]


def test_every_recorded_log_stays_as_it_is_but_for_quotations() -> None:
    from pathlib import Path

    logs = Path(__file__).parents[1] / "engines" / "logs"
    for path in sorted(logs.glob("*.log")):
        lines = path.read_text(errors="replace").splitlines()
        shown = kept("\n".join(lines))
        lost = [line for line in lines if line.strip() and line not in shown]
        assert all("token" in line or "exception" in line or "rammar" in line or "message" in line or "slot" in line
                   or "chunk" in line for line in lost), (path, lost)  # fmt: skip


@given(st.lists(st.sampled_from([*MALFORMED_GRAMMAR.splitlines(), *PARSED.splitlines(), "llama_x: y", "plain"])))
def test_however_the_lines_are_cut_into_blocks_it_is_the_same(lines: list[str]) -> None:
    whole, pieces = QuoteFilter(), QuoteFilter()
    at_once = whole.feed(lines) + whole.flush()
    one_by_one = [out for line in lines for out in pieces.feed([line])] + pieces.flush()
    assert at_once == one_by_one


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_the_log_of_an_engine_never_shows_it(step: int) -> None:
    ring, written, seen = LogRing(), list[str](), list[str]()
    log = EngineLog(ring, lambda _, lines: written.extend(lines), lambda: None)
    log.on_line = seen.append
    data = (MALFORMED_GRAMMAR + PARSED).encode() + b"Parsing chat message: CANARY"
    tails = list[str]()
    for start in range(0, len(data), step):
        log.feed(data[start : start + step])
        tails += log.tail(20)
    log.close()
    rows = [line.text for line in ring.tail(1000)]
    assert rows == written == seen
    assert "(4 lines quoting a request were left out)" in rows
    assert not [line for line in (*rows, *tails) if "CANARY" in line]
