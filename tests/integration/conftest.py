from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from llamarunner.run import choose_task_factory, new_loop


def new_program_loop() -> asyncio.AbstractEventLoop:
    """The loop that the program runs on: its task factory is the eager one where Python has it."""
    loop = new_loop()
    choose_task_factory(loop)
    return loop


def pytest_asyncio_loop_factories(config: Any, item: Any) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Life's tests run with lazy tasks as well; where Python has only those, once."""
    factories = {"program": new_program_loop}
    if hasattr(asyncio, "eager_task_factory") and item.path.name == "test_life.py":
        factories["lazy"] = new_loop
    return factories
