"""What of Ollama's options is decided when a model is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from llamarunner.proxies.ollama.demands import demand_of
from llamarunner.proxies.ollama.errors import OptionError
from llamarunner.runners.demand import Demand


@pytest.mark.parametrize(
    ("options", "demand"),
    [
        ({}, Demand()), ({"temperature": 1, "stop": ["a"]}, Demand()), ({"num_ctx": 4096.7}, Demand(context=4096)),
        ({"num_ctx": 0}, Demand()), ({"num_ctx": None}, Demand()), ({"num_gpu": 0}, Demand(gpu_layers=0)),
        ({"num_gpu": 33}, Demand(gpu_layers=33)), ({"num_gpu": -1, "num_thread": 0, "main_gpu": 0}, Demand()),
        ({"use_mmap": True, "num_batch": 512, "low_vram": True}, Demand()),
        ({"num_thread": 4}, Demand(flags={"threads": 4})),
        ({"num_batch": 128}, Demand(flags={"batch-size": 128, "ubatch-size": 128})),
        ({"main_gpu": 1}, Demand(flags={"split-mode": "none", "main-gpu": 1})),
        ({"use_mmap": False}, Demand(flags={"load-mode": "none"})),
    ],
)  # fmt: skip
def test_what_a_request_demands(options: dict[str, Any], demand: Demand) -> None:
    assert demand_of(options, {}, "grow-only") == demand


def test_whose_context_counts() -> None:
    options, preset = {"num_ctx": 4096}, {"num_ctx": 16384}
    assert demand_of(options, preset, "grow-only") == Demand(context=4096)
    assert demand_of(options, preset, "honour") == Demand(context=4096, exact=True)
    assert demand_of(options, preset, "ignore") == Demand(context=16384)
    assert demand_of({}, preset, "grow-only") == Demand(context=16384)


@pytest.mark.parametrize("option", ["num_ctx", "num_gpu", "num_thread", "num_batch", "main_gpu"])
def test_wrong_types_are_told(option: str) -> None:
    with pytest.raises(OptionError, match=f'option "{option}" must be of type integer'):
        demand_of({option: "4096"}, {}, "ignore")
