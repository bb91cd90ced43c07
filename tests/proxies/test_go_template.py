"""The little of Go's templates that is understood."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarunner.errors import UnsupportedError
from llamarunner.proxies.ollama.go_template import render

CHATML = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""


def test_a_template_of_one_turn() -> None:
    assert render(CHATML, "Be brief", "Hi") == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(CHATML, "", "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("", ""), ("plain", "plain"), ("{{.Prompt}}", "P"), ("a {{- .Prompt -}} b", "aPb"), ("{{ .System }}|", "S|"),
        ("{{ if .Suffix }}x{{ else }}y{{ end }}", "y"), ("{{ if .System }}x{{ else }}y{{ end }}", "x"),
        ("{{ if .Suffix }}{{ if .System }}x{{ else }}y{{ end }}{{ end }}z", "z"), ("{{/* said */}}x", "x"),
        ("{{ if .Suffix }}x{{ else if .System }}y{{ else if .Prompt }}z{{ end }}", "y"),
        ("{{ if .System }}x{{ else if .M }}{{ range .M }}{{ end }}y{{ else }}{{ .Tools }}{{ end }}|", "x|"),
        ("{{ if .Suffix }}{{ range .M }}{{ if eq .R 1 }}{{ else if x }}{{ end }}{{ end }}{{ else }}z{{ end }}", "z"),
        ("a{{ .Response }}b", "a"), ("{{ if .Suffix }}{{ .Response }}{{ end }}b", "b"), ("}}", "}}"),
    ],
)  # fmt: skip
def test_actions(template: str, rendered: str) -> None:
    assert render(template, "S", "P") == rendered


@pytest.mark.parametrize(
    "template",
    [
        "{{ if .Suffix }}x{{ else if .Messages }}y{{ end }}",
        "{{ range .Messages }}{{ .Content }}{{ end }}", "{{ .Tools }}", "{{ end }}", "{{ else }}", "{{ if .System }}x",
        '{{ if eq .System "x" }}y{{ end }}', "{{ $x := .Prompt }}", "{{}}", "{{ if .System .Prompt }}x{{ end }}",
        "{{", "x{{ .Prompt", "{{ .Prompt }}{{ if .System",
    ],
)  # fmt: skip
def test_what_needs_more_is_refused(template: str) -> None:
    with pytest.raises(UnsupportedError):
        render(template, "S", "P")


@given(
    st.lists(st.sampled_from(["{{", "}}", "{{-", "-}}", " ", "if .System", "else", "end", ".Prompt", "x"])).map("".join)
)
def test_any_template_is_rendered_or_refused(template: str) -> None:
    with contextlib.suppress(UnsupportedError):
        assert isinstance(render(template, "S", "P"), str)
