"""What the screen about a model says of its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llamarunner.control.snapshot import ShareView
from tests.fakes.fake_backend import scene
from tui.screens.facts import model_facts

GIB = 1024**3


@pytest.mark.parametrize(
    ("gpu", "ram", "shown"),
    [
        ((10 * GIB, 8 * GIB), (GIB, 2 * GIB), ["8.0G (estimated 10.0G, +25%)", "2.0G (estimated 1.0G, -50%)", "+10%"]),
        ((10 * GIB, None), (GIB, 2 * GIB), ["GPU 0: estimated 10.0G", "2.0G (estimated 1.0G, -50%)", "11.0G in all"]),
        ((10 * GIB, None), (GIB, None), ["GPU 0: estimated 10.0G", "RAM: estimated 1.0G", "11.0G in all"]),
        ((None, 8 * GIB), (None, GIB), ["GPU 0: 8.0G", "RAM: 1.0G"]),
    ],
    ids=["measured", "the driver does not say", "nothing is measured yet", "nothing was estimated"],
)
def test_estimates_are_shown_with_their_error(
    gpu: tuple[int | None, int | None], ram: tuple[int | None, int | None], shown: list[str]
) -> None:
    snapshot = scene("busy")
    model = replace(snapshot.models[0], shares=(ShareView("gpu0", None, *gpu), ShareView("ram", None, *ram)))
    facts = model_facts(model.name)(replace(snapshot, models=(model,)))
    assert facts is not None
    labels = [label for label, _, _ in facts]
    told = [text for _, text, _ in facts][labels.index("lies on") :][: len(shown)]
    assert all(text.endswith(part) for text, part in zip(told, shown, strict=True)), told
