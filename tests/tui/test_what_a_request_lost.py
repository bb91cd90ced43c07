"""What was left out of a request, or passed over in it, is shown."""

from __future__ import annotations

from dataclasses import replace

from llamarunner.control.snapshot import RequestPhase, RequestView
from tests.fakes.fake_backend import request, scene
from tui.panes.requests import request_row
from tui.screens.detail import fact_lines
from tui.screens.facts import request_facts

WHOLE = request(1, RequestPhase.DONE, "smol", status=200, prompt_tokens=4000, output_tokens=12)


def details(view: RequestView) -> str:
    facts = request_facts(view.request_id)(replace(scene("busy"), requests=(view,)))
    assert facts is not None
    return "\n".join(line.text for line in fact_lines(facts, 100))


def test_a_prompt_that_was_cut() -> None:
    cut = replace(WHOLE, truncated="the oldest 4 of 9 messages")
    assert "truncated" not in details(WHOLE)
    assert "the oldest 4 of 9 messages: the prompt was longer than the context" in details(cut)
    assert request_row(cut).cells["state"].tail == " !"
    assert request_row(WHOLE).cells["state"].tail == ""


def test_options_nobody_knows() -> None:
    assert "ignored" not in details(WHOLE)
    ignored = replace(WHOLE, ignored="foo, num_cxt")
    assert "unknown options: foo, num_cxt" in details(ignored)
    assert request_row(ignored).cells["state"].tail == " !"
