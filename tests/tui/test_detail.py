"""What the screen about a model says of its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_backend import scene

from tui.screens.detail import model_facts

GIB = 1024**3


@pytest.mark.parametrize(
    ("change", "gpus", "shown"),
    [
        ({"gpu_bytes": 8 * GIB, "memory_bytes": 2 * GIB}, True, "11.0G, +10% of what was measured"),
        ({"gpu_bytes": None, "memory_bytes": 10 * GIB}, False, "11.0G, +10% of what was measured"),
        ({"gpu_bytes": None, "memory_bytes": 2 * GIB}, True, "11.0G"),  # the driver does not say
        ({"gpu_bytes": None, "memory_bytes": None}, True, "11.0G"),
        ({"state": "loading", "gpu_bytes": GIB, "memory_bytes": GIB}, True, "11.0G"),  # it has not all yet
        ({"estimated_bytes": None}, True, None),
    ],
)
def test_the_estimate_is_shown_with_its_error(change: dict[str, Any], gpus: bool, shown: str | None) -> None:
    snapshot = scene("busy")
    ready = next(model for model in snapshot.models if model.state == "ready")
    if "state" in change:
        change = {**change, "state": type(ready.state)(change["state"])}
    model = replace(ready, **{"estimated_bytes": 11 * GIB, **change})
    facts = model_facts(model.name)(replace(snapshot, models=(model,), gpus=snapshot.gpus if gpus else ()))
    assert facts is not None
    assert {label: text for label, text, _ in facts}.get("estimated") == shown
